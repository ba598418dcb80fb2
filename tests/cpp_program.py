"""Compiles and runs a C++ test program of tests/cpp, which exits with 0 when all holds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


EMULATED = ROOT / "tests/cpp/emulated"  # stands in for CUDA and the headers that hold PTX


def run(source: str, folder: Path, *options: str, emulated: bool = False, **defines: object) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / Path(source).stem
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    if emulated:  # fibers and half-precision pairs as the GPU code writes them
        flags = [
            *flags[:2],
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-Wno-strict-aliasing",
            "-Wno-clobbered",
        ]
        flags += ["-fno-strict-aliasing", "-I", str(EMULATED)]
    flags += [*options, *(f"-D{name}={value}" for name, value in defines.items())]
    subprocess.run([compiler, *flags, "-I", ROOT / "csrc", ROOT / "tests/cpp" / source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout + result.stderr
