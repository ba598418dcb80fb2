"""hstu_attn_varlen_func and hstu_attn_qkvpacked_func against the reference, on every device, for every kernel."""

from __future__ import annotations

import functools
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hstu_ext
from attention_cases import (
    CONTEXTS,
    DTYPE_NAMES,
    NAMED,
    NAMED_BY_NAME,
    SHORT,
    TARGETS,
    Case,
    Problem,
    assert_accurate,
    kernel_grid,
    long_cases,
    random_case,
)
from hstu_ext import hstu_attn_qkvpacked_func, hstu_attn_varlen_func

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.bfloat16, torch.float16)


def attention(**arguments: Any) -> Tensor:
    """The op; the gradient of rab is wanted wherever there is a rab."""
    return hstu_attn_varlen_func(has_drab="rab" in arguments, **arguments)


def require_cells(case: Case, device: str, dtype: torch.dtype, *directions: str) -> None:
    """Skips the test where this build has no kernel for it, on whatever architecture."""
    if device == "cpu":
        return
    built = {re.sub(r"_sm\d+_", "_sm80_", cell) for cell in hstu_ext.cells()}
    for direction in directions:
        cell = case.cell(direction, device, dtype)
        if cell not in built:
            pytest.skip(f"{cell} is not in this build")


def default_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


@functools.lru_cache(maxsize=2)
def references(case: Case, device: str, dtype: torch.dtype) -> tuple[Problem, dict[str, Tensor], dict[str, Tensor]]:
    problem = case.problem(device, dtype)
    return problem, problem.run_reference(), problem.run_reference(dtype)


def assert_close(actual: Tensor, expected: Tensor, ulps: float | None = None) -> None:
    """For two runs of the kernels on the same numbers in another arrangement: sums in another order."""
    if ulps is None:
        ulps = 2 if actual.dtype in GPU_DTYPES else 16  # sums are in fp32, and rounded to half precision once
    tolerance = ulps * torch.finfo(actual.dtype).eps
    scale = expected.double().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


def accuracy_parameters() -> Iterator[Any]:
    for case, dtype, direction in itertools.product([*NAMED, *kernel_grid()], CPU_DTYPES, ("fwd", "bwd")):
        if case.name.startswith("grid") and (dtype in (torch.float64, torch.float16) or case.dim in (64, 128)):
            continue  # the CPU kernels do not depend on buckets
        yield pytest.param(case, "cpu", dtype, direction, False, id=f"{case.cell(direction, 'cpu', dtype)}-{case.name}")
    cases = [*NAMED, *kernel_grid(), *long_cases()]
    kinds = (("fwd", False), ("bwd", False), ("bwd", True))
    for case, dtype, (direction, deterministic) in itertools.product(cases, GPU_DTYPES, kinds):
        name = f"{case.cell(direction, 'cuda', dtype)}-{case.name}" + ("-deterministic" if deterministic else "")
        yield pytest.param(case, "cuda", dtype, direction, deterministic, id=name, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("case", "device", "dtype", "direction", "deterministic"), list(accuracy_parameters()))
def test_accuracy(case: Case, device: str, dtype: torch.dtype, direction: str, deterministic: bool) -> None:
    require_cells(case, device, dtype, *{"fwd", direction})
    problem, expected, eager = references(case, device, dtype)
    if direction == "fwd":
        actual = problem.run(attention, backward=False)
        expected = {"out": expected["out"]}
    else:
        actual = problem.run(attention, deterministic=deterministic)
    assert_accurate(actual, expected, eager, dtype)


@pytest.mark.parametrize("seed", range(120))
def test_random_problems(device: str, seed: int) -> None:
    case = random_case(seed)
    dtype = random.Random(seed).choice(CPU_DTYPES if device == "cpu" else GPU_DTYPES)
    print(case)
    require_cells(case, device, dtype, "fwd", "bwd")
    problem, expected, eager = references(case, device, dtype)
    assert_accurate(problem.run(attention, deterministic=seed % 2 == 1), expected, eager, dtype)


GRADCHECK_CASES = [
    "causal", "full", "window_both", "delta_q", "more_queries", "dim_v_larger", "layout_fused", "target_groups",
    "interval_5", "rab", "rab_one", "rab_delta_q", "rab_target", "rab_interval", "scaling", "bias", "bias_heads",
    "bias_time", "bias_position", "bias_full", "bias_target", "bias_interval", "bias_delta_q", "bias_more_queries",
]  # fmt: skip


@pytest.mark.parametrize("name", GRADCHECK_CASES)
def test_gradcheck(name: str) -> None:
    problem = NAMED_BY_NAME[name].shrunk(sequences=3).problem("cpu", torch.float64)
    inputs = {key: x.detach().requires_grad_() for key, x in problem.inputs().items()}

    def function(*values: Tensor) -> Tensor:
        return attention(**problem.grouped(dict(zip(inputs, values))), **problem.arguments())

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["causal", "window_both", "target_groups", "interval_5", "rab", "rab_one", "dim_128", "bias", "bias_heads"]
)
@pytest.mark.parametrize("by_argument", [True, False], ids=["argument", "torch_setting"])
def test_deterministic(device: str, name: str, by_argument: bool) -> None:
    case = NAMED_BY_NAME[name]
    dtype = default_dtype(device)
    require_cells(case, device, dtype, "fwd", "bwd")
    problem = case.problem(device, dtype)
    if not by_argument:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = problem.run(attention, deterministic=by_argument)
        for _ in range(5):
            again = problem.run(attention, deterministic=by_argument)
            for key, value in first.items():
                assert torch.equal(value, again[key]), f"{key} differs between runs"
    finally:
        torch.use_deterministic_algorithms(False)


def test_number_of_threads_does_not_matter() -> None:
    problem = NAMED_BY_NAME["heavy_tailed"].problem("cpu", torch.float32)
    results = [problem.run(attention, threads=threads, deterministic=True) for threads in (1, 2, 5, 64)]
    for result in results[1:]:
        for key, value in results[0].items():
            assert_close(result[key], value)


@pytest.mark.parametrize("name", ["causal", "target_groups", "interval_5", "rab", "seqused", "empty_batch"])
def test_packed(device: str, name: str) -> None:
    """The same as with q, k and v apart, and one gradient for all three."""
    case = replace(NAMED_BY_NAME[name], layout="packed")
    dtype = default_dtype(device)
    require_cells(case, device, dtype, "fwd", "bwd")
    problem = case.problem(device, dtype)
    expected = problem.run(attention, deterministic=True)
    arguments = problem.arguments()
    for key in ("cu_seqlens", "max_seqlen", "seqused"):
        arguments[key] = arguments.pop(key + "_q")
        del arguments[key + "_k"]
    qkv = torch.stack([problem.q, problem.k, problem.v], dim=1).requires_grad_()
    inputs = [qkv] if problem.rab is None else [qkv, problem.rab.detach().requires_grad_()]
    for grad_mode in (False, True):
        with torch.set_grad_enabled(grad_mode):
            out = hstu_attn_qkvpacked_func(
                qkv,
                rab=inputs[1] if len(inputs) > 1 else None,
                has_drab=len(inputs) > 1,
                deterministic=True,
                **arguments,
            )
        assert torch.equal(out, expected["out"])
    dqkv, *drab = torch.autograd.grad(out, inputs, problem.dout)
    for key, grad in zip("qkv", dqkv.unbind(1)):
        assert torch.equal(grad, expected[key]), key
    if drab:
        assert torch.equal(drab[0], expected["rab"])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "rab"])
def test_gradients_of_some_inputs(device: str, wanted: str) -> None:
    case = NAMED_BY_NAME["rab"]
    dtype = default_dtype(device)
    require_cells(case, device, dtype, "fwd", "bwd")
    problem = case.problem(device, dtype)
    expected = problem.run(attention, deterministic=True)
    names = ["rab"] if wanted == "rab" else list(wanted)
    inputs = {key: x.detach().requires_grad_(key in names) for key, x in problem.inputs().items()}
    out = hstu_attn_varlen_func(**inputs, **problem.arguments(), has_drab="rab" in names, deterministic=True)
    out.backward(problem.dout)
    for key, x in inputs.items():
        if key in names:
            assert torch.equal(x.grad, expected[key]), key
        else:
            assert x.grad is None, key


def test_rab_without_gradient(device: str) -> None:
    """Without has_drab the other gradients are the same and rab has none."""
    case = NAMED_BY_NAME["rab"]
    dtype = default_dtype(device)
    require_cells(case, device, dtype, "fwd", "bwd")
    problem = case.problem(device, dtype)
    expected = problem.run(attention, deterministic=True)
    inputs = {key: x.detach().requires_grad_() for key, x in problem.inputs().items()}
    out = hstu_attn_varlen_func(**inputs, **problem.arguments(), deterministic=True)
    out.backward(problem.dout)
    assert inputs["rab"].grad is None
    for key in "qkv":
        assert torch.equal(inputs[key].grad, expected[key]), key


@pytest.mark.parametrize("layout", ["expanded", "transposed", "padded"])
def test_layout_of_the_output_gradient(device: str, layout: str) -> None:
    case = NAMED_BY_NAME["causal"]
    dtype = default_dtype(device)
    require_cells(case, device, dtype, "fwd", "bwd")
    problem = case.problem(device, dtype)
    if layout == "expanded":
        problem.dout = torch.ones((), dtype=dtype, device=device).expand(problem.dout.shape)
    elif layout == "transposed":
        problem.dout = problem.dout.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        problem.dout = torch.nn.functional.pad(problem.dout, (8, 8), value=torch.nan)[..., 8:-8]
    assert_accurate(problem.run(attention), problem.run_reference(), problem.run_reference(dtype), dtype)


def test_rows_at_any_address(device: str) -> None:
    """Views that start, or have rows, at addresses that are no multiple of 16 bytes."""
    case = NAMED_BY_NAME["causal"]
    dtype = default_dtype(device)
    require_cells(case, device, dtype, "fwd", "bwd")
    problem = case.problem(device, dtype)
    expected, eager = problem.run_reference(), problem.run_reference(dtype)
    for name in ("q", "k", "v", "dout"):
        x = getattr(problem, name)
        padded = torch.full((x.shape[0], x.shape[1], x.shape[2] + 3), torch.nan, dtype=dtype, device=device)
        padded[..., 1:-2] = x
        setattr(problem, name, padded[..., 1:-2])
    assert_accurate(problem.run(attention), expected, eager, dtype)


def test_autocast(device: str) -> None:
    case = NAMED_BY_NAME["causal"]
    require_cells(case, device, torch.bfloat16, "fwd", "bwd")
    problem = case.problem(device, torch.bfloat16)
    expected = problem.run(attention, deterministic=True)
    inputs = {key: x.float().detach().requires_grad_() for key, x in problem.inputs().items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        out = attention(**inputs, **problem.arguments(), deterministic=True)
    assert torch.equal(out, expected["out"])
    out.backward(problem.dout)
    for key, x in inputs.items():
        assert torch.equal(x.grad, expected[key].float()), key


def test_saved_tensors_are_guarded() -> None:
    """Changing an input between forward and backward is an error, not a wrong gradient."""
    problem = NAMED_BY_NAME["regular"].problem("cpu", torch.float32)
    inputs = {key: x.detach().requires_grad_() for key, x in problem.inputs().items()}
    out = attention(**inputs, **problem.arguments())
    with torch.no_grad():
        inputs["k"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(problem.dout)


def test_no_second_derivative() -> None:
    problem = NAMED_BY_NAME["regular"].problem("cpu", torch.float64)
    problem.dout.requires_grad_()
    q = problem.q.detach().requires_grad_()
    out = attention(q=q, k=problem.k, v=problem.v, **problem.arguments())
    (dq,) = torch.autograd.grad(out, q, problem.dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_buffers_are_guarded(device: str, guarded_allocations: Any) -> None:
    """The fixture that every test leans on does see the op's buffers: out, dq, dk, dv and drab at the least."""
    case = NAMED_BY_NAME["rab"]
    dtype = default_dtype(device)
    require_cells(case, device, dtype, "fwd", "bwd")
    case.problem(device, dtype).run(attention)
    guards = guarded_allocations.guards
    assert len(guards) >= 10
    guarded_allocations.check()
    guards[-1][0] = 0
    with pytest.raises(AssertionError, match="1 guards"):
        guarded_allocations.check()
    guards.clear()


# Properties


def test_permuting_the_batch(device: str) -> None:
    dtype = default_dtype(device)
    case = Case("", SHORT, contexts=CONTEXTS, targets=TARGETS, group=2)
    require_cells(case, device, dtype, "fwd", "bwd")
    order = [3, 0, 6, 5, 1, 2, 4]
    permuted = replace(
        case, **{key: tuple(getattr(case, key)[b] for b in order) for key in ("lengths", "contexts", "targets")}
    )
    problem, other = case.problem(device, dtype), permuted.problem(device, dtype)
    rows = torch.cat([torch.arange(problem.starts_q[b], problem.starts_q[b + 1]) for b in order]).to(device)
    for name in ("q", "k", "v", "dout"):
        setattr(other, name, getattr(problem, name)[rows])
    expected, actual = problem.run(attention), other.run(attention)
    for key, value in expected.items():
        assert_close(actual[key], value[rows])


def test_concatenating_batches(device: str) -> None:
    """A batch gives what its sequences give one at a time."""
    dtype = default_dtype(device)
    case = Case("", SHORT, window=(50, 3), scaling=130)
    require_cells(case, device, dtype, "fwd", "bwd")
    problem = case.problem(device, dtype)
    together = problem.run(attention)
    for b, length in enumerate(case.lengths):
        rows = slice(problem.starts_q[b], problem.starts_q[b + 1])
        alone = replace(case, lengths=(length,)).problem(device, dtype)
        for name in ("q", "k", "v", "dout"):
            setattr(alone, name, getattr(problem, name)[rows])
        for key, value in alone.run(attention).items():
            assert_close(value, together[key][rows])


def test_adding_a_target_changes_no_other_row(device: str) -> None:
    dtype = default_dtype(device)
    case = Case("", (90,), contexts=(5,), targets=(12,), group=1, scaling=64)
    require_cells(case, device, dtype, "fwd")
    longer = replace(case, lengths=(91,), targets=(13,)).problem(device, dtype)
    shorter = case.problem(device, dtype)
    for name in ("q", "k", "v"):
        setattr(shorter, name, getattr(longer, name)[:90])
    with_target = longer.run(attention, backward=False)["out"]
    without = shorter.run(attention, backward=False)["out"]
    assert_close(with_target[:90], without)
    assert with_target[90].abs().sum() > 0


SAME = {
    "full_is_a_wide_window": ({"window": (-1, -1)}, {"window": (10**6, 10**6)}),
    "causal_is_no_contexts_no_targets": ({"window": (-1, 0)}, {"contexts": (0,) * 7, "targets": (0,) * 7}),
    "one_group_of_targets_is_causal": ({"window": (-1, 0)}, {"targets": SHORT, "group": 1000}),
    "only_contexts_is_full": ({"window": (-1, -1)}, {"contexts": SHORT}),
    "delta_q_is_the_last_rows": ({"window": (9, 0), "lengths_q": SHORT}, {"window": (9, 0)}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_mask_said_in_two_ways(device: str, name: str) -> None:
    dtype = default_dtype(device)
    cases = [Case(name, SHORT, **more) for more in SAME[name]]
    for case in cases:
        require_cells(case, device, dtype, "fwd", "bwd")
    one, other = (case.problem(device, dtype).run(attention) for case in cases)
    for key, value in one.items():
        assert_close(other[key], value)


def test_interval_as_causal(device: str) -> None:
    dtype = default_dtype(device)
    causal, interval = Case("", SHORT), Case("", SHORT, bounds=3, bounds_per_head=False)
    for case in (causal, interval):
        require_cells(case, device, dtype, "fwd", "bwd")
    problem = interval.problem(device, dtype)
    position = torch.cat([torch.arange(length) for length in SHORT])
    first_end = position // 2  # [0, p // 2) and [p // 2, p + 1)
    problem.func = torch.stack([first_end, first_end, position + 1])[None].int().to(device)
    expected = causal.problem(device, dtype).run(attention)
    for key, value in problem.run(attention).items():
        assert_close(value, expected[key])


def test_delta_q_gives_the_last_rows(device: str) -> None:
    """As in serving: the new rows over a cache of keys give the last rows of the whole."""
    dtype = default_dtype(device)
    lengths, lengths_q = (150, 200, 129), (1, 64, 128)
    for more in ({}, {"window": (30, 0)}, {"contexts": (9, 0, 5), "targets": (7, 20, 0)}):
        whole = Case("", lengths, scaling=200, **more)
        require_cells(whole, device, dtype, "fwd")
        problem = whole.problem(device, dtype)
        part = replace(whole, lengths_q=lengths_q).problem(device, dtype)
        ends = list(itertools.accumulate(lengths))
        rows = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, lengths_q)]).to(device)
        part.q, part.k, part.v = problem.q[rows], problem.k, problem.v
        expected = problem.run(attention, backward=False)["out"][rows]
        assert_close(part.run(attention, backward=False)["out"], expected)


# Sizes


def test_offsets_past_2_31_elements_on_cpu() -> None:
    """Rows so far apart that an element's index needs more than 32 bits. Only the pages that hold rows are touched."""
    rows, heads, dim, stride = 9, 2, 16, 1 << 28
    problem = Case("", (4, 5), heads=heads, dim=dim).problem("cpu", torch.bfloat16)
    expected = problem.run(attention, deterministic=True)
    for name in ("q", "k", "v", "dout"):
        far = torch.empty(rows * stride, dtype=torch.bfloat16).as_strided((rows, heads, dim), (stride, dim, 1))
        far.copy_(getattr(problem, name))
        setattr(problem, name, far)
    for key, value in problem.run(attention, deterministic=True).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.gpu
@pytest.mark.plain_allocations
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_tensors_past_2_31_elements_on_gpu(direction: str) -> None:
    heads, dim, length = 4, 128, 128
    case = Case("", (length,), heads=heads, dim=dim)
    require_cells(case, "cuda", torch.bfloat16, *{"fwd", direction})
    torch.cuda.empty_cache()
    needed = 14 if direction == "fwd" else 36
    if torch.cuda.mem_get_info()[0] < needed * 2**30:
        pytest.skip(f"needs {needed} GiB of GPU memory")
    batch = 2**31 // (heads * dim * length) + 40
    x = torch.empty(batch * length, heads, dim, dtype=torch.bfloat16, device="cuda").normal_()
    x.requires_grad_(direction == "bwd")
    offsets = torch.arange(batch + 1, device="cuda") * length
    out = attention(
        q=x, k=x, v=x, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=length, max_seqlen_k=length,
        window_size=(-1, 0), alpha=case.alpha,
    )  # fmt: skip
    actual = {"out": out.detach()}
    if direction == "bwd":
        out.backward(x.detach())
        actual["q"] = x.grad
    for b in (0, batch // 2, batch - 39, batch - 1):
        rows = slice(b * length, (b + 1) * length)
        problem = case.problem("cuda", torch.bfloat16)
        problem.q = problem.k = problem.v = problem.dout = x.detach()[rows]

        def summed(result: dict[str, Tensor]) -> dict[str, Tensor]:
            grads = {"q": result["q"] + result["k"] + result["v"]} if direction == "bwd" else {}
            return {"out": result["out"], **grads}

        expected = summed(problem.run_reference())
        eager = summed(problem.run_reference(torch.bfloat16))
        assert_accurate({key: value[rows] for key, value in actual.items()}, expected, eager, torch.bfloat16)


@pytest.mark.gpu
def test_many_sequences_on_gpu() -> None:
    """More sequences than a grid's y or z dimension can count."""
    case = Case("", tuple(itertools.chain.from_iterable([(0, 3, 1)] * 23000)), heads=1, dim=32)
    require_cells(case, "cuda", torch.bfloat16, "fwd", "bwd")
    problem = case.problem("cuda", torch.bfloat16)
    few = replace(case, lengths=case.lengths[-30:]).problem("cuda", torch.bfloat16)
    for name in ("q", "k", "v", "dout"):
        setattr(few, name, getattr(problem, name)[-40:])
    expected = few.run(attention, deterministic=True)
    for key, value in problem.run(attention, deterministic=True).items():
        assert_close(value[-40:], expected[key])


@pytest.mark.gpu
def test_lengths_above_max_seqlen_on_gpu() -> None:
    """The offsets cannot be checked on the host; rows past max_seqlen do not attend and give 0."""
    case = Case("", (100, 40, 257))
    require_cells(case, "cuda", torch.bfloat16, "fwd", "bwd")
    problem = case.problem("cuda", torch.bfloat16)
    problem.max_q = problem.max_k = 70
    expected, eager = problem.run_reference(), problem.run_reference(torch.bfloat16)
    actual = problem.run(attention)
    assert_accurate(actual, expected, eager, torch.bfloat16)
    assert actual["out"][70:100].eq(0).all()


@pytest.mark.gpu
def test_backwards_side_by_side_on_gpu() -> None:
    """Blocks of a backward may wait for one another: two on two streams must not keep each other from starting."""
    case = Case("", (3000,) * 8, heads=4, dim=64)
    require_cells(case, "cuda", torch.bfloat16, "fwd", "bwd")
    problem = case.problem("cuda", torch.bfloat16)
    expected = problem.run(attention, deterministic=True)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[dict[str, Tensor]] = []
    for stream in streams * 10:
        with torch.cuda.stream(stream):
            results.append(problem.run(attention, deterministic=True))
    torch.cuda.synchronize()
    for result in results:
        for key, value in result.items():
            assert torch.equal(value, expected[key]), key


def run_accuracy_tests(which: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", f"test_accuracy and {which}", __file__]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.gpu
def test_tiles_of_small_gpus() -> None:
    """GPUs with 99 KB of shared memory a block take other tiles, which a large GPU can run as well."""
    run_accuracy_tests("(d128 or d256)", HSTU_EXT_GPU="sm80", HSTU_EXT_MAX_SHARED_KB="99")


@pytest.mark.gpu
@pytest.mark.skipif(not any("_sm90_" in cell for cell in hstu_ext.cells()), reason="this build has no sm90 kernels")
def test_sm80_family_on_hopper() -> None:
    """Where the sm90 family serves a call, the sm80 family is right too."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU: every other test runs the sm80 family")
    run_accuracy_tests("not rab and not interval", HSTU_EXT_GPU="sm80")


@pytest.mark.gpu
def test_missing_kernel() -> None:
    """A kernel that was not built is an error that says which one, and how to get it."""
    built = set(hstu_ext.cells())
    for dim, mask, rab, dtype in itertools.product(
        (32, 64, 128, 256), ({"window": (-1, 0)}, {"targets": (1,)}, {"bounds": 1}), ("", "one"), GPU_DTYPES
    ):
        case = Case("", (5,), dim=dim, rab=rab, **mask)
        cell = case.cell("fwd", "cuda", dtype)
        if any(re.sub(r"_sm\d+_", "_sm80_", name) == cell for name in built):
            continue
        with pytest.raises(hstu_ext.MissingKernelError, match="HSTU_EXT_SET") as error:
            case.problem("cuda", dtype).run(attention, backward=False)
        assert re.search(cell.replace("sm80", r"sm\d+"), str(error.value))
        return
    pytest.skip("every kernel is in this build")


def test_cells_are_named_as_documented() -> None:
    names = "|".join(DTYPE_NAMES.values())
    for cell in hstu_ext.cells():
        assert re.fullmatch(
            rf"attn_(fwd|bwd)_sm\d+_({names})_d(32|64|128|256)_(window|target|interval)(_rab|_relative)?", cell
        ), cell
