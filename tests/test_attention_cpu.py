"""What is special to the CPU kernels: a variant per instruction set, and results that no number of threads changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hstu_ext
from attention_cases import NAMED_BY_NAME, Case
from hstu_ext import hstu_attn_varlen_func

TESTS = Path(__file__).resolve().parent


def run_python(*arguments: str, variant: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HSTU_EXT_CPU": variant}
    return subprocess.run([sys.executable, *arguments], cwd=TESTS, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("variant", hstu_ext.build_info()["cpu_variants"])
def test_every_variant(variant: str) -> None:
    """Some of the random problems again, with each set of kernels that this machine can run."""
    program = "import hstu_ext; print(hstu_ext.build_info()['cpu_variant'])"
    chosen = run_python("-c", program, variant=variant)
    if chosen.returncode != 0 and "HSTU_EXT_CPU must be one of" in chosen.stderr:
        pytest.skip(f"this machine has no {variant}")
    assert chosen.stdout.strip() == variant, chosen.stderr
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", "test_random_problems and cpu-1")
    suite = run_python("-m", "pytest", *options, "test_attention.py", variant=variant)
    assert suite.returncode == 0, suite.stdout[-4000:]


def test_unknown_variant() -> None:
    program = "import hstu_ext; hstu_ext.build_info()"
    failed = run_python("-c", program, variant="avx1024")
    assert failed.returncode == 1
    assert "ValueError: hstu_ext.attention: HSTU_EXT_CPU must be one of" in failed.stderr
    assert "got avx1024" in failed.stderr


# One long sequence is split between threads, sequences of like length are not, and many short ones share a thread.
SPLIT = Case("split", (700,), heads=1, dim=40)
WHOLE = Case("whole", (130,) * 12, heads=3, dim=40)
MIXED = Case("mixed", (900, *(7 * n for n in range(12))), heads=2, dim=40)


@pytest.mark.parametrize("case", [SPLIT, WHOLE, MIXED, NAMED_BY_NAME["rab"]], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(case: Case, dtype: torch.dtype) -> None:
    problem = case.problem("cpu", dtype)

    def attention(**arguments: object) -> Tensor:
        return hstu_attn_varlen_func(has_drab="rab" in arguments, **arguments)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = problem.run(attention)
        for count in (2, 3, 16):
            torch.set_num_threads(count)
            for key, value in problem.run(attention).items():
                assert torch.equal(value, expected[key]), f"{key} with {count} threads"
    finally:
        torch.set_num_threads(threads)
