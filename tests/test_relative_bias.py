"""What is special to the relative bias: bucket edges, layouts of the tables, which gradients come, and autocast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cpp_program
import hstu_ext
from attention_cases import NAMED_BY_NAME, SHORT, TABLES, Case, assert_accurate
from hstu_ext import RelativeBias, hstu_attn_qkvpacked_func, hstu_attn_varlen_func, reference
from hstu_ext.bias import time_bucket
from test_attention import assert_close, attention, default_dtype, require_cells

BUCKETS = 147  # no 64-bit difference has a later one
INT64_MIN = -(2**63)


def signed(x: int) -> int:
    """An integer modulo 2^64 as torch holds it."""
    return (x + 2**63) % 2**64 - 2**63


def times_apart(differences: list[int]) -> tuple[Tensor, Tensor]:
    """Pairs of times so far apart: in any order, and about zero where they need all of the range."""
    pairs = []
    for n, x in enumerate(differences):
        low = INT64_MIN if x >= 2**63 else -(x // 2) if n % 3 else 1_700_000_000 % (2**63 - x)
        pairs.append((low, low + x) if n % 2 else (low + x, low))
    first, second = torch.tensor(pairs, dtype=torch.int64).T.contiguous()
    return first, second


def edges() -> list[int]:
    """The smallest difference in each bucket, by bisection of the definition."""

    def bucket(x: int) -> int:
        return int(time_bucket(torch.tensor(signed(INT64_MIN + x)), torch.tensor(INT64_MIN), BUCKETS))

    found = []
    for wanted in range(1, BUCKETS + 1):
        low, high = 1, 2**64 - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if bucket(middle) >= wanted else (middle + 1, high)
        found.append(low)
    return found


def counted(first: Tensor, second: Tensor, device: str, num_buckets: int, together: bool) -> Tensor:
    """How many pairs of times the op puts into each bucket: the gradient of a table of zeros, where every pair has the
    same. Each pair is a sequence of its own, or all queries see all keys (then the times of the keys are few)."""
    dtype = default_dtype(device)
    require_cells(Case("", bias="time"), device, dtype, "fwd", "bwd")
    sequences = 1 if together else len(first)
    cu_q, cu_k = (
        torch.linspace(0, len(x), sequences + 1, dtype=torch.float64).int().to(device) for x in (first, second)
    )
    q, k = (torch.zeros(len(x), 1, 64, dtype=dtype, device=device) for x in (first, second))
    table = torch.zeros(num_buckets + 1, device=device, requires_grad=True)
    bias = RelativeBias(time_table=table, query_times=first.to(device), key_times=second.to(device))
    longest_q, longest_k = (len(first), len(second)) if together else (1, 1)
    out = hstu_attn_varlen_func(
        q, k, torch.ones_like(k), cu_q, cu_k, longest_q, longest_k, bias=bias, scaling_seqlen=1, deterministic=True
    )
    out.backward(torch.full_like(out, 1 / 32))  # silu'(0) = 1/2, times 64 / 32
    return table.grad


def expected_counts(first: Tensor, second: Tensor, num_buckets: int) -> Tensor:
    return torch.bincount(time_bucket(first, second, num_buckets).flatten(), minlength=num_buckets + 1).float()


@pytest.mark.parametrize("num_buckets", [BUCKETS, 300, 128, 5, 0])
@pytest.mark.parametrize("step", [-1, 0, 1])
def test_edges(device: str, num_buckets: int, step: int) -> None:
    """Every edge of 64-bit differences and its two neighbours, one pair a sequence."""
    differences = [min(edge + step, 2**64 - 1) for edge in edges()]
    first, second = times_apart([*differences, 0, 1, 2**64 - 1, 2**63, 2**63 - 1, 2**32, 2**32 - 1, 2**31])
    counts = counted(first, second, device, num_buckets, together=False)
    assert torch.equal(counts.cpu(), expected_counts(first, second, num_buckets))


@pytest.mark.parametrize("unit", [1, 1000, 2**30], ids=str)
@pytest.mark.parametrize("order", ["ascending", "shuffled", "negative"])
def test_edges_in_one_sequence(device: str, unit: int, order: str) -> None:
    """The same in tiles of many queries and keys, whose differences are far apart or few: every path of the kernels."""
    near = [edge + step for edge in edges()[:100] for step in (-1, 0, 1)]
    first = torch.tensor([*near, *range(1024), *range(10**6, 10**6 + 600)]) * unit
    second = torch.tensor([0, 0, 1, 7, 100, 3, 60, 64] * 20) * unit
    if order == "shuffled":
        first = first[torch.randperm(len(first), generator=torch.Generator().manual_seed(0))]
    elif order == "negative":
        first, second = -first, -second
    counts = counted(first, second, device, 128, together=True)
    assert torch.equal(counts.cpu(), expected_counts(first[:, None], second[None], 128))


def test_definition() -> None:
    """Bucket by bucket, against arithmetic on Python's integers."""
    import math

    for x in (0, 1, 2, 3, 10, 12345, 2**31, 2**40 + 1, 2**63, 2**64 - 1):
        for n, num_buckets in enumerate((BUCKETS, 30)):
            first, second = times_apart([x, x])
            expected = min(math.floor(math.log(max(x, 1)) / 0.301), num_buckets)
            assert time_bucket(first, second, num_buckets).tolist() == [expected] * 2, n


def problem_of(device: str, name: str = "bias_heads", **changes: Any) -> Any:
    case = replace(NAMED_BY_NAME[name], **changes)
    require_cells(case, device, default_dtype(device), "fwd", "bwd")
    return case.problem(device, default_dtype(device))


@pytest.mark.parametrize("wanted", ["position_table", "time_table", "q", "none"])
def test_gradients_of_some_inputs(device: str, wanted: str) -> None:
    problem = problem_of(device)
    expected = problem.run(attention, deterministic=True)
    inputs = {key: x.detach().requires_grad_(key == wanted) for key, x in problem.inputs().items()}
    out = attention(**problem.grouped(inputs), **problem.arguments(), deterministic=True)
    assert torch.equal(out, expected["out"])
    if wanted == "none":
        assert not out.requires_grad
        return
    out.backward(problem.dout)
    for key, x in inputs.items():
        if key == wanted:
            assert torch.equal(x.grad, expected[key]), key
        else:
            assert x.grad is None, key


def test_layouts_of_tables(device: str) -> None:
    """One table for all heads, the same table expanded over the heads, and rows far apart."""
    problem = problem_of(device, "bias")
    shared = problem.run(attention, deterministic=True)
    heads = problem.case.heads
    for layout in ("copied", "expanded", "padded"):
        other = problem_of(device, "bias")
        for name in TABLES:
            table = getattr(problem, name)
            rows = table.expand(heads, -1)
            if layout == "copied":
                rows = rows.contiguous()
            elif layout == "padded":
                rows = torch.nn.functional.pad(rows, (3, 5), value=torch.nan)[:, 3:-5]
            setattr(other, name, rows)
        result = other.run(attention, deterministic=True)
        for key in ("out", "q", "k", "v"):
            assert torch.equal(result[key], shared[key]), key
        for name in TABLES:
            assert_close(result[name].sum(0), shared[name], ulps=64)


def test_times_without_a_time_table(device: str) -> None:
    problem = problem_of(device, "bias_position")
    expected = problem.run(attention, backward=False)["out"]
    bias = RelativeBias(problem.position_table, query_times=torch.zeros(3), key_times=None)
    out = attention(q=problem.q, k=problem.k, v=problem.v, bias=bias, **problem.arguments())
    assert torch.equal(out, expected)


def test_packed(device: str) -> None:
    problem = problem_of(device, "bias_heads", layout="packed")
    expected = problem.run(attention, deterministic=True)
    arguments = problem.arguments()
    for key in ("cu_seqlens", "max_seqlen", "seqused"):
        arguments[key] = arguments.pop(key + "_q")
        del arguments[key + "_k"]
    qkv = torch.stack([problem.q, problem.k, problem.v], dim=1).requires_grad_()
    tables = {name: getattr(problem, name).detach().requires_grad_() for name in TABLES}
    bias = RelativeBias(**tables, query_times=problem.query_times, key_times=problem.key_times)
    out = hstu_attn_qkvpacked_func(qkv, bias=bias, deterministic=True, **arguments)
    assert torch.equal(out, expected["out"])
    dqkv, *dtables = torch.autograd.grad(out, [qkv, *tables.values()], problem.dout)
    for key, grad in zip([*"qkv", *tables], [*dqkv.unbind(1), *dtables]):
        assert torch.equal(grad, expected[key]), key


def test_autocast(device: str) -> None:
    """q, k and v are cast, the tables are not."""
    problem = problem_of(device, "bias")
    inputs = {key: x.float() for key, x in problem.inputs().items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        out = attention(**problem.grouped(inputs), **problem.arguments())
    assert out.dtype == torch.bfloat16
    rounded = {key: x if key in TABLES else x.bfloat16() for key, x in inputs.items()}
    assert torch.equal(out, attention(**problem.grouped(rounded), **problem.arguments()))


def test_bias_is_outside_of_alpha(device: str) -> None:
    """alpha = 0 leaves the bias alone, as in rows that only count."""
    problem = problem_of(device, "bias_alpha_zero")
    dtype = default_dtype(device)
    assert_accurate(problem.run(attention), problem.run_reference(), problem.run_reference(dtype), dtype)


def test_same_as_a_dense_rab(device: str) -> None:
    """With alpha = 1 the bias is a rab that is as large as the scores."""
    dtype = default_dtype(device)
    problem = problem_of(device, "bias", lengths=SHORT, alpha=1.0, dim=16)
    require_cells(replace(problem.case, bias="", rab="heads"), device, dtype, "fwd", "bwd")
    inputs = problem.grouped(problem.inputs())
    bias, longest = inputs.pop("bias"), problem.max_k
    rab = torch.zeros(len(SHORT), 1, longest, longest, dtype=dtype, device=device)
    for b, (q0, len_q, k0, len_k) in enumerate(problem.spans()):
        rab[b, :, :len_q, :len_k] = bias.materialize(slice(q0, q0 + len_q), slice(k0, k0 + len_k))
    expected = hstu_attn_varlen_func(**inputs, rab=rab, **problem.arguments())
    actual = hstu_attn_varlen_func(**inputs, bias=bias, **problem.arguments())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2e-2, atol=2e-3)


def test_warp_level_code_on_the_host(tmp_path: Path) -> None:
    """What the GPU kernels compute of the bias and its gradients, by a warp of coroutines."""
    host = str(cpp_program.ROOT / "tests/cpp/host")
    cpp_program.run("test_relative.cpp", tmp_path, "-Wno-unknown-pragmas", "-I", host)


def test_threads_change_no_bit() -> None:
    case = Case("", (900, *(7 * n for n in range(12))), dim=40, bias="position+time")
    problem = case.problem("cpu", torch.float32)
    expected = problem.run(attention, threads=1)
    for threads in (2, 5):
        for key, value in problem.run(attention, threads=threads).items():
            assert torch.equal(value, expected[key]), f"{key} with {threads} threads"


def test_reference_without_times() -> None:
    problem = Case("", (3,), bias="time").problem("cpu", torch.float64)
    bias = RelativeBias(time_table=problem.time_table)
    with pytest.raises(ValueError, match="query_times and key_times must be given"):
        reference.attention(problem.q, problem.k, problem.v, bias=bias, **problem.arguments())
    with pytest.raises(ValueError, match="got neither"):
        RelativeBias().materialize(slice(0, 3), slice(0, 3))


def test_exported() -> None:
    assert hstu_ext.RelativeBias is RelativeBias
