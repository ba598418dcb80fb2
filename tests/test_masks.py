"""The masks: mask.h (what the kernels call) and masks.py (what people read), each against the table by brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

import cpp_program
import reference
from hstu_ext.masks import IntervalMask, Mask, TargetMask, WindowMask


def test_kernel_masks(tmp_path: Path) -> None:
    """Every kept pair is covered by the ranges, and no full tile hides a masked pair. Exhaustive on small problems."""
    cpp_program.run("test_mask.cpp", tmp_path)


def assert_equal(mask: Mask, keep: reference.Keep, len_q: int, len_k: int) -> None:
    expected = [[keep(i, j) for j in range(len_k)] for i in range(len_q)]
    actual = mask.materialize(len_q, len_k)
    assert actual.dtype == torch.bool
    assert actual.shape == (len_q, len_k)
    assert actual.tolist() == expected, f"{mask} at {len_q} x {len_k}"


def test_window_mask() -> None:
    for len_q, len_k in itertools.product(range(6), repeat=2):
        for left, right in itertools.product((-1, 0, 1, 3, 9), repeat=2):
            assert_equal(WindowMask(left, right), reference.window(len_q, len_k, left, right), len_q, len_k)


def test_target_mask() -> None:
    for len_q, len_k in itertools.product(range(7), repeat=2):
        for contexts in range(len_k + 1):
            for targets in range(len_k - contexts + 1):
                for group in (1, 2, 3, 9):
                    mask = TargetMask(contexts, targets, group)
                    assert_equal(mask, reference.target(len_q, len_k, contexts, targets, group), len_q, len_k)


def test_interval_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    for len_q, len_k, count in itertools.product(range(4), range(5), (1, 3, 5)):
        for _ in range(10):
            bounds = torch.randint(-1, len_k + 3, (count, len_q + 1), generator=generator, dtype=torch.int32)
            assert_equal(IntervalMask(bounds), reference.interval(bounds.tolist()), len_q, len_k)


def test_special_windows() -> None:
    assert WindowMask(-1, -1).materialize(4, 5).all()
    assert torch.equal(WindowMask(-1, 0).materialize(5, 5), torch.ones(5, 5).tril().bool())
    assert torch.equal(WindowMask(0, 0).materialize(5, 5), torch.eye(5).bool())
    assert torch.equal(TargetMask().materialize(3, 5), WindowMask(-1, 0).materialize(3, 5))
    assert torch.equal(TargetMask().materialize(5, 3), WindowMask(-1, 0).materialize(5, 3))
