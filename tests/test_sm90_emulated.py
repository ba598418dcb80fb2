"""The sm90 kernels on the emulator of tests/cpp/emulated: no GPU is needed, and a deadlock is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

import cpp_program


@pytest.mark.parametrize(
    ("head_dim", "tile", "dim_qk", "dim_v"),
    [
        (64, "ShortForwardTile", 40, 64),
        (64, "RelativeForwardTile", 40, 64),
        pytest.param(128, "RelativeForwardTile", 72, 128, marks=pytest.mark.slow),
        (256, "ForwardTile", 40, 136),
        pytest.param(32, "ForwardTile", 24, 32, marks=pytest.mark.slow),
        pytest.param(64, "ForwardTile", 64, 24, marks=pytest.mark.slow),
        pytest.param(128, "ForwardTile", 72, 128, marks=pytest.mark.slow),
        pytest.param(128, "ShortForwardTile", 128, 72, marks=pytest.mark.slow),
    ],
)
def test_forward(head_dim: int, tile: str, dim_qk: int, dim_v: int, tmp_path: Path) -> None:
    """Every mask, ragged and equal batches, unused rows, other dimensions than the bucket's; early and late copies."""
    cpp_program.run(
        "test_sm90_forward.cpp", tmp_path, emulated=True, HEAD_DIM=head_dim, TILE=tile, DIM_QK=dim_qk, DIM_V=dim_v
    )


@pytest.mark.parametrize(
    ("head_dim", "tile", "dim_qk", "dim_v"),
    [
        (64, "BackwardTile", 40, 64),
        pytest.param(32, "BackwardTile", 24, 32, marks=pytest.mark.slow),
        pytest.param(32, "ShortBackwardTile", 24, 32, marks=pytest.mark.slow),
        pytest.param(128, "BackwardTile", 72, 128, marks=pytest.mark.slow),
        pytest.param(128, "ShortBackwardTile", 128, 72, marks=pytest.mark.slow),
        pytest.param(256, "BackwardTile", 40, 136, marks=pytest.mark.slow),
    ],
)
def test_backward(head_dim: int, tile: str, dim_qk: int, dim_v: int, tmp_path: Path) -> None:
    """The same masks and batches; blocks that wait for one another, the same bits in any order where promised."""
    cpp_program.run(
        "test_sm90_backward.cpp", tmp_path, emulated=True, HEAD_DIM=head_dim, TILE=tile, DIM_QK=dim_qk, DIM_V=dim_v
    )


@pytest.mark.parametrize(
    ("head_dim", "dim_qk", "dim_v"), [(64, 40, 64), pytest.param(128, 72, 128, marks=pytest.mark.slow)]
)
def test_backward_with_relative_bias(head_dim: int, dim_qk: int, dim_v: int, tmp_path: Path) -> None:
    """By position: all masks, distances within and beyond the table, tables shared or per head."""
    cpp_program.run(
        "test_sm90_backward.cpp", tmp_path, emulated=True, HEAD_DIM=head_dim, TILE="RelativeBackwardTile",
        DIM_QK=dim_qk, DIM_V=dim_v, RELATIVE="true",
    )  # fmt: skip


def test_relative_bias(tmp_path: Path) -> None:
    """What the bias warps write, pair by pair: all kinds of times and tables, queries or keys as rows."""
    cpp_program.run("test_sm90_relative.cpp", tmp_path, emulated=True)
