"""Random attention problems against the reference, many in one run.

    python -m pytest tests/test_attention_fuzz.py -m gpu -s
    HSTU_EXT_FUZZ=20000 HSTU_EXT_FUZZ_SEED=123000 python -m pytest tests/test_attention_fuzz.py -m gpu -s

HSTU_EXT_FUZZ is the number of cases (2,000 on a GPU, 100 on the CPU), HSTU_EXT_FUZZ_SEED the first seed (0). A failure
names the seed of its case; the next run finds it again with HSTU_EXT_FUZZ=1 HSTU_EXT_FUZZ_SEED=<seed>.
"""

from __future__ import annotations

import os
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import hstu_ext
from attention_cases import Case, assert_accurate, random_case
from hstu_ext import hstu_attn_varlen_func

PARTS = 10  # tests that share the seeds, so that they can run side by side
LONGEST = 700  # several tiles of every kernel
DEFAULT_CASES = {"cpu": 100, "cuda": 2000}
DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.bfloat16, torch.float16)}


def attention(**arguments: Any) -> Tensor:
    return hstu_attn_varlen_func(has_drab="rab" in arguments, **arguments)


def is_built(case: Case, device: str, dtype: torch.dtype, direction: str) -> bool:
    """Whether this build has a kernel for the case, of whatever architecture."""
    built = {re.sub(r"_sm\d+_", "_sm80_", cell) for cell in hstu_ext.cells()}
    return device == "cpu" or case.cell(direction, device, dtype) in built


def check(seed: int, device: str, allocations: Any) -> bool:
    """False where this build has no kernel for the seed's case."""
    case = random_case(seed, LONGEST if device == "cuda" else 150)
    dtype = random.Random(seed).choice(DTYPES[device])
    if not is_built(case, device, dtype, "fwd"):
        return False
    backward = is_built(case, device, dtype, "bwd")
    problem = case.problem(device, dtype, seed)
    expected, eager = problem.run_reference(), problem.run_reference(dtype)
    actual = problem.run(attention, backward, **({"deterministic": seed % 2 == 1} if backward else {}))
    try:
        assert_accurate(actual, {name: expected[name] for name in actual}, eager, dtype)
        allocations.check()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {dtype}: {error}\n{case}") from error
    allocations.guards.clear()
    return True


@pytest.mark.parametrize("part", range(PARTS))
def test_random_problems(device: str, part: int, guarded_allocations: Any) -> None:
    count = int(os.environ.get("HSTU_EXT_FUZZ", DEFAULT_CASES[device]))
    first = int(os.environ.get("HSTU_EXT_FUZZ_SEED", 0))
    seeds = range(first + part, first + count, PARTS)
    checked = sum(check(seed, device, guarded_allocations) for seed in seeds)
    print(f"{checked} of the {len(seeds)} seeds {seeds.start} to {seeds.stop - 1} in steps of {seeds.step} on {device}")
    if seeds and not checked:
        pytest.skip("no kernel for any of the cases is in this build")
