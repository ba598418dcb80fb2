"""The attention op inside torch.compile, torch.export and CUDA graphs, on several streams and threads; its overhead."""

from __future__ import annotations

import gc
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hstu_ext  # noqa: F401  (registers the ops)
from attention_cases import CONTEXTS, NAMED_BY_NAME, SHORT, TARGETS, Case, Problem
from hstu_ext import hstu_attn_qkvpacked_func, hstu_attn_varlen_func
from test_attention import assert_close, attention, default_dtype, require_cells

COMPILED = [
    "causal",
    "window_both",
    "target_groups",
    "interval_5",
    "rab_one",
    "seqused",
    "bias",
    "bias_position",
    "dim_v_larger",
    "layout_fused",
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def problem_of(name: str, device: str) -> Problem:
    case = NAMED_BY_NAME[name]
    require_cells(case, device, default_dtype(device), "fwd", "bwd")
    return case.problem(device, default_dtype(device))


def assert_same_as_eager(function: Callable[..., Tensor], problem: Problem) -> None:
    expected = problem.run(attention, deterministic=True)
    for key, value in problem.run(function, deterministic=True).items():
        assert_close(value, expected[key])


@pytest.mark.parametrize("name", COMPILED)
def test_compile(device: str, name: str) -> None:
    problem = problem_of(name, device)
    assert_same_as_eager(torch.compile(attention, fullgraph=True, backend="aot_eager"), problem)
    without_gradient = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out = problem.run(without_gradient, backward=False)["out"]
    assert_close(out, problem.run(attention, backward=False)["out"])


def test_compile_with_inductor(device: str) -> None:
    """In the middle of a model: what comes before and after is compiled around the op."""
    if device == "cpu" and shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler")
    problem = problem_of("target_groups", device)

    def model(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        return torch.nn.functional.silu(attention(q=2 * q, k=k, v=v + 1, **arguments)) * 3

    expected = problem.run(model, deterministic=True)
    actual = problem.run(torch.compile(model, fullgraph=True), deterministic=True)
    for key, value in actual.items():
        assert_close(value, expected[key], ulps=16)  # inductor rounds less often than eager PyTorch


def test_compile_with_changing_shapes(device: str) -> None:
    """Batches differ in rows, sequences and longest length; the graph is compiled once or twice, not per batch."""
    frames = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(attention, fullgraph=True, backend=backend, dynamic=True)
    for lengths in ((5, 9), (100, 3, 7), (64,) * 4, (33, 2, 8, 1, 50)):
        case = Case("", lengths)
        require_cells(case, device, default_dtype(device), "fwd", "bwd")
        assert_same_as_eager(compiled, case.problem(device, default_dtype(device)))
    assert len(frames) <= 2


def test_compile_packed(device: str) -> None:
    problem = problem_of("layout_packed", device)
    qkv = torch.stack([problem.q, problem.k, problem.v], dim=1).requires_grad_()
    offsets, longest = problem.arguments()["cu_seqlens_q"], problem.max_q

    def function(x: Tensor) -> Tensor:
        return hstu_attn_qkvpacked_func(x, offsets, longest, window_size=(-1, 0), alpha=0.2, deterministic=True)

    expected = function(qkv)
    (expected_grad,) = torch.autograd.grad(expected, qkv, problem.dout)
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(qkv)
    (grad,) = torch.autograd.grad(out, qkv, problem.dout)
    assert_close(out, expected)
    assert_close(grad, expected_grad)


def test_export() -> None:
    problem = Case("", SHORT, contexts=CONTEXTS, targets=TARGETS).problem("cpu", torch.float32)
    arguments = problem.arguments()
    names = list(arguments)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in arguments.items():
                if isinstance(value, Tensor):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return hstu_attn_varlen_func(q, k, v, **{name: getattr(self, name) for name in names})

    program = torch.export.export(Model(), (problem.q, problem.k, problem.v))
    assert any("hstu_ext.attention_forward" in str(node.target) for node in program.graph.nodes)
    expected = problem.run(attention, backward=False)["out"]
    assert_close(program.module()(problem.q, problem.k, problem.v), expected)


@pytest.mark.plain_allocations  # opcheck compares what the op does with what torch does in its place
@pytest.mark.parametrize("name", ["causal", "target_groups", "interval_5", "rab_one", "seqused", "bias", "bias_heads"])
def test_opcheck(device: str, name: str) -> None:
    problem = Case.problem(NAMED_BY_NAME[name].shrunk(), device, default_dtype(device))
    require_cells(problem.case, device, default_dtype(device), "fwd", "bwd")
    for key, x in problem.inputs().items():
        setattr(problem, key, x.nan_to_num())
    given = problem.arguments()
    left, right = given.pop("window_size")
    schema = torch.ops.hstu_ext.attention_forward.default._schema
    named = {**given, "window_left": left, "window_right": right}
    named |= {"query_times": problem.query_times, "key_times": problem.key_times}
    differentiable = ("q", "k", "v", "rab", "position_table", "time_table")
    assert differentiable == tuple(argument.name for argument in schema.arguments[:6])
    rest = [named[argument.name] for argument in schema.arguments[6:-2]]
    has_rab = problem.rab is not None
    plain = [problem.inputs().get(name) for name in differentiable]
    inputs = [None if x is None else x.detach().requires_grad_() for x in plain]
    torch.library.opcheck(torch.ops.hstu_ext.attention_forward, (*inputs, *rest, has_rab, True))
    torch.library.opcheck(
        torch.ops.hstu_ext.attention_backward,
        (problem.dout.nan_to_num(), *plain, *rest, has_rab, bool(problem.case.bias), True),
    )


def test_threads(device: str) -> None:
    """Several Python threads at once give what one gives."""
    names = ["causal", "target_groups", "interval_5", "bias"]
    problems = [problem_of(name, device) for name in names]
    expected = [problem.run(attention, deterministic=True) for problem in problems]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            stream = torch.cuda.Stream() if device == "cuda" else None
            for n in range(6):
                which = (index + n) % len(problems)
                with torch.cuda.stream(stream):
                    result = run_once(problems[which])
                if stream is not None:
                    stream.synchronize()
                for key, value in expected[which].items():
                    assert torch.equal(result[key], value), f"{names[which]}: {key}"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    if device == "cuda":
        torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def run_once(problem: Problem) -> dict[str, Tensor]:
    """Problem.run without its change of torch's number of threads, which is for the whole process."""
    inputs = {name: x.detach().requires_grad_() for name, x in problem.inputs().items()}
    out = attention(**problem.grouped(inputs), **problem.arguments(), deterministic=True)
    return {"out": out.detach(), **dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), problem.dout)))}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "window_both", "target_groups", "interval_5", "rab_one", "delta_q", "bias"])
def test_cuda_graph(name: str) -> None:
    """Captured once, replayed on other numbers and other lengths in the same buffers."""
    problem = problem_of(name, "cuda")
    other = problem.case.problem("cuda", problem.dtype, seed=1)
    arguments = problem.arguments()
    inputs = {key: x.detach().clone().requires_grad_() for key, x in problem.inputs().items()}
    given = problem.grouped(inputs)
    dout = problem.dout.clone()

    def step() -> tuple[Tensor, ...]:
        out = attention(**given, **arguments)
        return out.detach(), *torch.autograd.grad(out, list(inputs.values()), dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    with torch.no_grad():
        for key, x in other.inputs().items():
            inputs[key].copy_(x)
        dout.copy_(other.dout)
        if problem.func is not None:
            problem.func.copy_(other.func)
        if problem.query_times is not None:
            problem.query_times.copy_(other.query_times)
            problem.key_times.copy_(other.key_times)
    expected = other.run(attention)
    for _ in range(3):
        graph.replay()
        for value, key in zip(results, expected):
            assert_close(value, expected[key])

    # Other offsets in the same buffers: only the first sequence is left.
    if name == "causal":
        offsets = arguments["cu_seqlens_q"]
        offsets[1:] = offsets[1].clone()
        arguments["cu_seqlens_k"].copy_(offsets)
        graph.replay()
        first = int(offsets[1])
        assert_close(results[0][:first], expected["out"][:first])
        assert results[0][first:].eq(0).all()


@pytest.mark.gpu
def test_streams() -> None:
    """The op runs on the caller's current stream: work queued before it there is seen, on every one of several."""
    problem = problem_of("causal", "cuda")
    expected = problem.run(attention, deterministic=True)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            late = Case.problem(problem.case, "cuda", problem.dtype)
            late.q = torch.zeros_like(problem.q)
            torch.cuda._sleep(20_000_000)
            late.q.copy_(problem.q)
            results.append(late.run(attention, deterministic=True))
    torch.cuda.synchronize()
    for result in results:
        for key, value in expected.items():
            assert torch.equal(result[key], value), key


@pytest.mark.gpu
@pytest.mark.plain_allocations  # guarded buffers outlive the test, so that torch would have to ask CUDA for memory
def test_never_synchronizes() -> None:
    problem = problem_of("target_groups", "cuda")
    arguments = problem.arguments()
    inputs = {key: x.detach().requires_grad_() for key, x in problem.inputs().items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention(**inputs, **arguments)
        torch.autograd.grad(out, list(inputs.values()), problem.dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # set_sync_debug_mode sees torch's own calls only; a sleeping stream shows the op's.
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    started = time.perf_counter()
    out = attention(**inputs, **arguments)
    torch.autograd.grad(out, list(inputs.values()), problem.dout)
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    waited = time.perf_counter() - started
    assert queued < waited / 2, f"{queued * 1e3:.1f} ms to queue, {waited * 1e3:.1f} ms to run"


def host_microseconds(function: Callable[[], Any], calls: int = 300, rounds: int = 15) -> float:
    """Median over rounds of the mean host time of a call, the GPU's queue being empty at the start of a round."""
    times = []
    gc.collect()
    gc.disable()  # a collection walks all that the tests before have made
    try:
        for _ in range(rounds):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                function()
            times.append((time.perf_counter() - started) / calls * 1e6)
    finally:
        gc.enable()
    torch.cuda.synchronize()
    return statistics.median(times[2:])


@pytest.mark.gpu
@pytest.mark.plain_allocations
def test_host_overhead() -> None:
    case = Case("", (16,) * 4, heads=1, dim=64)
    require_cells(case, "cuda", torch.bfloat16, "fwd")
    problem = case.problem("cuda", torch.bfloat16)
    q, k, v = problem.q, problem.k, problem.v
    offsets = problem.arguments()["cu_seqlens_q"]
    op = host_microseconds(lambda: hstu_attn_varlen_func(q, k, v, offsets, offsets, 16, 16, window_size=(-1, 0)))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    autograd = host_microseconds(lambda: hstu_attn_varlen_func(q, k, v, offsets, offsets, 16, 16, window_size=(-1, 0)))
    print(f"host overhead of a forward call: {op:.1f} us, with autograd {autograd:.1f} us")
    assert op < 12
    assert autograd < 25
