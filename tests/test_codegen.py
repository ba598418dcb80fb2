"""The code generator: the manifest is sound, and what is written is what the manifest says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hstu_ext

CODEGEN = Path(__file__).resolve().parents[1] / "tools" / "codegen"
sys.path.insert(0, str(CODEGEN))

import generate  # noqa: E402

SETS = generate.load()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CODEGEN / "generate.py", *arguments], capture_output=True, text=True, check=False
    )


def test_sets_are_nested() -> None:
    ci, default, full = (set(SETS[name]) for name in generate.SETS)
    assert ci
    assert ci <= default <= full


def test_default_has_every_combination() -> None:
    found = {(c.direction, c.dtype, c.head_dim, c.mask) for c in SETS["default"] if c.arch == "sm80"}
    expected = {
        (direction, dtype, head_dim, mask)
        for direction in ("fwd", "bwd")
        for dtype in ("bf16", "fp16")
        for head_dim in (32, 64, 128, 256)
        for mask in ("window", "target", "interval")
    }
    assert found == expected


def test_ci_covers_every_mask_direction_and_bias() -> None:
    assert {c.mask for c in SETS["ci"]} == set(generate.LEGAL["mask"])
    assert {c.direction for c in SETS["ci"]} == set(generate.LEGAL["direction"])
    assert {c.bias for c in SETS["ci"]} == set(generate.LEGAL["bias"])


def test_names_are_unique_and_give_the_cell_back() -> None:
    names = [cell.name for cell in SETS["full"]]
    assert len(set(names)) == len(names)
    pattern = re.compile(r"attn_(fwd|bwd)_(sm80|sm90)_(bf16|fp16)_d(\d+)_(window|target|interval)(?:_(rab|relative))?")
    for cell in SETS["full"]:
        match = pattern.fullmatch(cell.name)
        assert match, cell.name
        direction, arch, dtype, head_dim, mask, bias = match.groups()
        assert cell == generate.Cell("attn", direction, arch, dtype, int(head_dim), mask, bias or "none")


def test_forward_instance() -> None:
    cell = generate.Cell("attn", "fwd", "sm80", "bf16", 64, "window", "none")
    assert '#include "attention/sm80/forward.h"' in cell.source
    assert "void attn_fwd_sm80_bf16_d64_window(const Params& p, void* stream)" in cell.source
    assert "sm80::run_forward<bf16, 64, WindowMask, NoBias>(p, stream);" in cell.source


def test_sm90_instance() -> None:
    cell = generate.Cell("attn", "fwd", "sm90", "fp16", 256, "target", "none")
    assert '#include "attention/sm90/forward.h"' in cell.source
    assert "void attn_fwd_sm90_fp16_d256_target(const Params& p, void* stream)" in cell.source
    assert "sm90::run_forward<fp16, 256, TargetMask, NoBias>(p, stream);" in cell.source
    assert "Arch::kSm90" in cell.row


def test_backward_instance_with_rab() -> None:
    cell = generate.Cell("attn", "bwd", "sm80", "fp16", 128, "interval", "rab")
    assert '#include "attention/sm80/backward.h"' in cell.source
    assert "void attn_bwd_sm80_fp16_d128_interval_rab(const BackwardParams& p, void* stream)" in cell.source
    call = "sm80::run_backward<fp16, 128, IntervalMask, RabBias<fp16>>(p, stream);"
    assert call in cell.source


def test_instance_with_a_relative_bias() -> None:
    cell = generate.Cell("attn", "bwd", "sm80", "bf16", 64, "target", "relative")
    assert "void attn_bwd_sm80_bf16_d64_target_relative(const BackwardParams& p, void* stream)" in cell.source
    assert "sm80::run_backward<bf16, 64, TargetMask, RelativeBias<float>>(p, stream);" in cell.source


@pytest.mark.parametrize("name", generate.SETS)
def test_files(name: str, tmp_path: Path) -> None:
    result = run("--set", name, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    written = [Path(line) for line in result.stdout.splitlines()]
    assert {path.name for path in written} == {*(cell.file_name for cell in SETS[name]), "dispatch.cpp"}
    table = (tmp_path / "dispatch.cpp").read_text()
    for cell in SETS[name]:
        text = (tmp_path / cell.file_name).read_text()
        assert len(text.splitlines()) <= 10
        assert table.count(f'"{cell.name}"') == 1
        assert table.count(f"void {cell.name}(") == 1
    assert run("--set", name, "--out", tmp_path, "--check").returncode == 0


def test_unchanged_files_keep_their_time(tmp_path: Path) -> None:
    files = generate.render(SETS["ci"])
    generate.write(files, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    changed = tmp_path / SETS["ci"][0].file_name
    changed.write_text("")
    generate.write(files, tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path for path in before if before[path] != after[path]} == {changed}


@pytest.mark.parametrize("damage", ["missing", "out of date", "not in the manifest's set"])
def test_check_finds_a_tree_that_is_not_current(damage: str, tmp_path: Path) -> None:
    run("--set", "ci", "--out", tmp_path)
    victim = tmp_path / SETS["ci"][0].file_name
    if damage == "missing":
        victim.unlink()
    elif damage == "out of date":
        victim.write_text(victim.read_text() + "\n")
    else:
        victim = tmp_path / "attn_fwd_sm80_bf16_d96_window.cu"
        victim.write_text("")
    result = run("--set", "ci", "--out", tmp_path, "--check")
    assert result.returncode == 1
    assert result.stderr.strip() == f"{damage}: {victim.name}"


ENTRY = """
[[ci]]
op = "attn"
direction = ["fwd"]
arch = ["sm80"]
dtype = ["bf16"]
head_dim = [64]
mask = ["window"]
bias = ["none"]
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTRY.replace("64", "48"), "head_dim must be one of (32, 64, 128, 256), got 48"),
        (ENTRY.replace('"fwd"', '"forward"'), "direction must be one of ('fwd', 'bwd'), got 'forward'"),
        (ENTRY.replace('bias = ["none"]', ""), "an entry must have exactly the keys"),
        (
            ENTRY.replace("sm80", "sm90").replace("window", "interval"),
            "sm90 has the masks ('window', 'target') and the biases ('none', 'relative'), got attn_fwd_sm90_bf16_d64",
        ),
        (
            ENTRY.replace("sm80", "sm90").replace("none", "relative").replace("fwd", "bwd").replace("64", "256"),
            "sm90 has a relative bwd for the head dimensions (64, 128), got attn_bwd_sm90_bf16_d256_window_relative",
        ),
        (ENTRY.replace("[[ci]]", "[[tiny]]"), "sets must be among ('ci', 'default', 'full'), got ['tiny']"),
        (ENTRY + ENTRY, "set ci lists cells twice: ['attn_fwd_sm80_bf16_d64_window']"),
        ("[[ci]\n", "Expected"),
    ],
)
def test_a_bad_manifest_is_named(text: str, message: str, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.toml"
    manifest.write_text(text)
    result = run("--manifest", manifest, "--check")
    assert result.returncode == 1
    assert message in result.stderr


def test_a_family_can_be_left_out(tmp_path: Path) -> None:
    names = run("--list", "--families", "sm80").stdout.split()
    assert names == [cell.name for cell in SETS["default"] if cell.arch == "sm80"]
    run("--families", "sm80", "--out", tmp_path)
    assert {path.stem for path in tmp_path.glob("*.cu")} == set(names)
    assert "sm90" not in (tmp_path / "dispatch.cpp").read_text()


def test_list_and_count() -> None:
    assert run("--list", "--set", "ci").stdout.split() == [cell.name for cell in SETS["ci"]]
    assert run("--count").stdout.splitlines() == [f"{name} {len(cells)}" for name, cells in SETS.items()]


def test_this_build_has_the_cells_of_its_set() -> None:
    info = hstu_ext.build_info()
    hopper = {"90", "90a"} & set(info["archs"])
    expected = [c.name for c in SETS[info["set"]] if c.arch != "sm90" or hopper] if info["set"] else []
    assert hstu_ext.cells() == expected
