"""l2norm and sampled_softmax_loss on a GPU: against float64, over every way to read rows, and what a GPU adds.

Buffers of the ops are full of NaN between guards (conftest.py), so every case also tests what is written and where.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_ext import l2norm, sampled_softmax_loss
from hstu_ext.ops import similarity
from test_similarity import TEMPERATURE, assert_as_good_as_eager, gradients, unit

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of one element, of 16 bytes, of 8 (4 for half types), of odd length; in registers, and longer than those hold.
DIMS = [1, 3, 10, 50, 64, 128, 200, 256, 300, 301, 600, 1030, 4100]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def randint(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(high, shape, device=DEVICE, dtype=dtype)


# l2norm


def assert_l2norm(x: Tensor, dout: Tensor) -> None:
    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = function(x)
        return out.detach(), torch.autograd.grad(out, x, dout.to(out.dtype))[0]

    ours, eager, exact = run(l2norm, x), run(lambda x: F.normalize(x, dim=-1), x), run(unit, x.double())
    assert ours[0].dtype == x.dtype
    assert_as_good_as_eager(ours[0], eager[0], exact[0], 2)
    assert_as_good_as_eager(ours[1], eager[1], exact[1], 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_l2norm(dtype: torch.dtype, dim: int) -> None:
    assert_l2norm(randn(3, 13, dim, dtype=dtype), randn(3, 13, dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2norm_of_views(dtype: torch.dtype) -> None:
    """Rows with gaps, rows that begin anywhere, columns with gaps, and a gradient that is one number."""
    wide = randn(21, 80, dtype=dtype)
    for x in (wide[:, 8:72], wide[:, 3:67], wide[::2, :50], wide.t(), wide[:, ::2]):
        assert_l2norm(x, randn(*x.shape, dtype=dtype))
        assert_l2norm(x, torch.ones((), device=DEVICE, dtype=dtype).expand(x.shape))
        assert_l2norm(x, randn(1, x.shape[1], dtype=dtype).expand(x.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2norm_of_short_and_no_rows(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [3e-4, 4e-4], [3.0, 4.0]], device=DEVICE, dtype=dtype).requires_grad_()
    out = l2norm(x, 1e-2)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    expected = torch.tensor([[0, 0], [0.03, 0.04], [0.6, 0.8]], device=DEVICE)
    assert torch.allclose(out.float(), expected, rtol=1e-2, atol=1e-6)
    assert torch.allclose(dx[:2].float(), torch.full((2, 2), 100.0, device=DEVICE), rtol=1e-2)
    empty = torch.empty(0, 64, device=DEVICE, dtype=dtype).requires_grad_()
    assert torch.autograd.grad(l2norm(empty).sum(), empty)[0].shape == (0, 64)
    assert l2norm(torch.full((2, 7), math.nan, device=DEVICE, dtype=dtype)).isnan().all()


# sampled_softmax_loss


def oracle(
    query: Tensor, table: Tensor, pos: Tensor, neg: Tensor, log_q: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Everything at once, in the dtype of the rows; a masked negative weighs nothing."""
    ids = torch.cat([pos.unsqueeze(1), neg], 1)
    logits = (unit(F.embedding(ids, table)) * unit(query).unsqueeze(1)).sum(2) / TEMPERATURE
    if log_q is not None:
        logits = logits - log_q[ids]
    masked = F.pad(neg == pos.unsqueeze(1), (1, 0))
    losses = F.cross_entropy(logits.masked_fill(masked, -math.inf), torch.zeros_like(pos).long(), reduction="none")
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def problem(
    dtype: torch.dtype, dim: int = 10, samples: int = 40, rows: int = 13, items: int = 30
) -> tuple[Tensor, ...]:
    ids = randint(items, rows), randint(items, rows, samples)
    return randn(rows, dim, dtype=dtype), randn(items, dim, dtype=dtype), *ids


def run(query: Tensor, table: Tensor, pos: Tensor, neg: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return gradients(lambda q, e: sampled_softmax_loss(q, e, pos, neg, TEMPERATURE, **options), query, table)


def assert_sampled(query: Tensor, table: Tensor, pos: Tensor, neg: Tensor, **options: Any) -> None:
    got = run(query, table, pos, neg, **options)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == got[2].dtype == query.dtype
    if options.pop("sparse", False):
        assert got[2].is_sparse
        assert got[2].is_coalesced()
        assert got[2].indices()[0].tolist() == sorted({*pos.tolist(), *neg.flatten().tolist()})
        got = (got[0], got[1], got[2].to_dense())
    exact = gradients(lambda q, e: oracle(q, e, pos, neg, **options), query.double(), table.double())
    eager = gradients(lambda q, e: oracle(q, e, pos, neg, **options), query, table)
    for mine, theirs, truth, factor in zip(got, eager, exact, (2, 3, 3)):
        if neg.shape[1] == 0:
            assert mine.abs().max() <= 1e-6
        elif query.shape[1] == 1 and mine.dim() > 0:
            assert mine.abs().max() <= 1e-3  # a unit row of one element is constant
        else:
            assert_as_good_as_eager(mine, theirs, truth, factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_sampled_softmax(dtype: torch.dtype, dim: int) -> None:
    assert_sampled(*problem(dtype, dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [0, 1, 31, 32, 33, 130])
@pytest.mark.parametrize("dim", [7, 50, 256])
def test_numbers_of_samples(dtype: torch.dtype, samples: int, dim: int) -> None:
    assert_sampled(*problem(dtype, dim, samples))
    assert_sampled(*problem(dtype, dim, samples), sparse=True)


@pytest.mark.parametrize("dim", [9, 64])
def test_log_q_and_weights(dim: int) -> None:
    query, table, pos, neg = problem(torch.float32, dim, 70)
    options = {"log_q": torch.randn(30, device=DEVICE), "weights": torch.rand(13, device=DEVICE)}
    assert_sampled(query, table, pos, neg, **options)
    weights = options["weights"].clone().requires_grad_()
    loss = sampled_softmax_loss(query, table, pos, neg, TEMPERATURE, log_q=options["log_q"], weights=weights)
    (got,) = torch.autograd.grad(loss, weights)
    weights = options["weights"].double().requires_grad_()
    exact = oracle(query.double(), table.double(), pos, neg, options["log_q"], weights)
    assert torch.allclose(got.double(), torch.autograd.grad(exact, weights)[0], rtol=1e-5, atol=1e-6)


def test_as_on_the_cpu() -> None:
    query, table, pos, neg = problem(torch.float32, 50, 128, rows=70, items=200)
    for got, expected in zip(run(query, table, pos, neg), run(*(x.cpu() for x in (query, table, pos, neg)))):
        assert torch.allclose(got.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_views(dtype: torch.dtype) -> None:
    wide, table, pos, neg = problem(dtype, 80)
    for columns in (slice(8, 72), slice(3, 67), slice(0, 50), slice(0, 80, 2)):
        assert_sampled(wide[:, columns], table[:, columns], pos, neg)
    assert_sampled(wide[1:2].expand(13, 80), table, pos.int(), neg.t().contiguous().t().int())
    assert_sampled(wide[::2], table, pos[::2], neg[::2])


# One pair a chunk, chunks that end within an item, on its end, and over many of a heavy item; and the op's own length.
@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 128])
@pytest.mark.parametrize("dim", [3, 50, 256, 600])
@pytest.mark.parametrize("sparse", [False, True])
def test_chunks(chunk: int, dim: int, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_CHUNK_PAIRS", chunk)
    query, table, pos, neg = problem(torch.float32, dim)
    neg[:, :25] = 17  # heavy: over 16 chunks share their columns between warps
    neg[neg == 4] = 5  # and one without a pair
    pos[pos == 4] = 5
    assert_sampled(query, table, pos, neg, sparse=sparse)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_pairs_than_one_sort_takes(dtype: torch.dtype, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_SORTED_PAIRS", 4 * 41 + 5)
    assert_sampled(*problem(dtype), sparse=sparse)


def test_one_item_for_all() -> None:
    """All negatives are one item, so all of its pairs come from many warps."""
    query, table, pos, neg = problem(torch.float32, 64, 128, rows=500)
    pos[pos == 11] = 12
    assert_sampled(query, table, pos, torch.full_like(neg, 11))


def test_masks_every_equal_id() -> None:
    query, table, pos, _ = problem(torch.float32)
    loss, dquery, dtable = run(query, table, pos, pos.unsqueeze(1).expand(-1, 37))
    assert loss == 0
    assert not dquery.any()
    assert not dtable.any()


@pytest.mark.parametrize("dim", [10, 11])
def test_zero_rows_and_weights(dim: int) -> None:
    query, table, pos, neg = problem(torch.float32, dim)
    table[3] = 0
    query[0] = 0
    assert all(x.isfinite().all() for x in run(query, table, pos, neg))
    assert all(not x.any() for x in run(query, table, pos, neg, weights=torch.zeros(13, device=DEVICE)))
    for got in run(query[:0], table, pos[:0], neg[:0]):
        assert not got.any()
    empty = run(query[:0], table, pos[:0], neg[:0], sparse=True)
    assert empty[2]._nnz() == 0
    assert run(query[:0], table[:0], pos[:0], neg[:0])[2].shape == (0, dim)


@pytest.mark.parametrize("dim", [10, 11])
def test_below_eps_as_on_the_cpu(dim: int) -> None:
    """Rows shorter than eps are divided by it, and have no Jacobian of a norm."""
    query, table, pos, neg = problem(torch.float32, dim)
    inputs = (query * torch.rand(13, 1, device=DEVICE), table * torch.rand(30, 1, device=DEVICE), pos, neg)
    got = run(*inputs, eps=1.5)
    for mine, expected in zip(got, run(*(x.cpu() for x in inputs), eps=1.5)):
        assert torch.allclose(mine.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [8, 9])
def test_nan_does_not_hide_and_does_not_spread(dim: int) -> None:
    table = randn(6, dim)
    table[5] = math.nan
    table[4] = math.inf
    ids = torch.tensor([0, 1], device=DEVICE), torch.tensor([[2, 3], [3, 3]], device=DEVICE)
    assert all(x.isfinite().all() for x in run(randn(2, dim), table, *ids))
    ids[1][1, 0] = 5
    loss, dquery, _ = run(randn(2, dim), table, *ids)
    assert loss.isnan()
    assert dquery[0].isfinite().all()
    assert dquery[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dim", [3, 64])
def test_ids_outside_of_the_table(dtype: torch.dtype, dim: int) -> None:
    """They are taken for the nearest inside; beside the table there is NaN."""
    query, table, pos, neg = problem(torch.float32, dim, rows=40)
    around = torch.full((50, dim), math.nan, device=DEVICE)
    around[10:40] = table
    wild_pos, wild_neg = pos.to(dtype), neg.to(dtype)
    limits = torch.iinfo(dtype)
    wild_pos[::7], wild_pos[1::7] = 30, -1
    for i, value in enumerate((-1, 30, 39, -10, limits.max, limits.min, limits.max // 2, limits.min // 2)):
        wild_neg[:, i] = value
    log_q = torch.full((50,), math.nan, device=DEVICE)
    log_q[10:40] = torch.randn(30, device=DEVICE)
    got = run(query, around[10:40], wild_pos, wild_neg, log_q=log_q[10:40])
    expected = run(query, table, wild_pos.clamp(0, 29), wild_neg.clamp(0, 29), log_q=log_q[10:40].clone())
    for mine, theirs in zip(got, expected):
        assert mine.isfinite().all()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [50, 77])
@pytest.mark.parametrize("sparse", [False, True])
def test_runs_change_no_bit(dtype: torch.dtype, dim: int, sparse: bool) -> None:
    inputs = problem(dtype, dim, 128, rows=700, items=90)
    first, *others = (run(*inputs, sparse=sparse) for _ in range(3))
    for other in others:
        for a, b in zip(first, other):
            assert torch.equal(a.to_dense() if a.is_sparse else a, b.to_dense() if b.is_sparse else b)


@pytest.mark.plain_allocations
def test_memory_of_the_backward() -> None:
    """28 bytes a pair at most: its gradient, two buffers each to sort items and places by, and what the sort needs."""
    query, table, pos, neg = problem(torch.bfloat16, 8, 128, rows=4000)
    run(query, table, pos, neg)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(query, table, pos, neg)
    assert torch.cuda.max_memory_allocated() - before < 28 * pos.numel() * 129


def test_no_tensor_of_every_negative() -> None:
    query, table, pos, neg = problem(torch.float32, 256, 128, rows=1000)
    run(query, table, pos, neg)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(query, table, pos, neg)
    assert torch.cuda.max_memory_allocated() - before < 1000 * 128 * 256 * 4 / 8


@pytest.mark.plain_allocations
def test_cuda_graph() -> None:
    """Captured once, replayed on other numbers in the same buffers."""
    dim = 50
    inputs, others = problem(torch.float32, dim, rows=300), problem(torch.float32, dim, rows=300)
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    rows = randn(20, dim).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = sampled_softmax_loss(*leaves, *inputs[2:], TEMPERATURE)
        return loss.detach(), *torch.autograd.grad(loss, leaves), *torch.autograd.grad(l2norm(rows).sum(), rows)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for x, other in zip((*leaves, *inputs[2:]), others):
            x.copy_(other)
    for _ in range(2):
        graph.replay()
        for got, expected in zip(results, run(*others)):
            assert torch.equal(got, expected)


@pytest.mark.plain_allocations  # guarded buffers outlive the test, so that torch would have to ask CUDA for memory
def test_never_synchronizes() -> None:
    inputs, x = problem(torch.float32, 50, rows=300), randn(20, 50).requires_grad_()

    def step() -> None:
        run(*inputs)
        torch.autograd.grad(l2norm(x).sum(), x)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # set_sync_debug_mode sees torch's own calls only; a sleeping stream shows the op's.
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    started = time.perf_counter()
    step()
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    waited = time.perf_counter() - started
    assert queued < waited / 2, f"{queued * 1e3:.1f} ms to queue, {waited * 1e3:.1f} ms to run"


def test_streams() -> None:
    """The ops run on the caller's current stream: work queued before them there is seen."""
    inputs = problem(torch.float32, 50, rows=300)
    expected, expected_unit = run(*inputs), l2norm(inputs[0])
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            late = [torch.zeros_like(x) for x in inputs]
            torch.cuda._sleep(20_000_000)
            for x, source in zip(late, inputs):
                x.copy_(source)
            results.append((*run(*late), l2norm(late[0])))
    torch.cuda.synchronize()
    for result in results:
        for got, truth in zip(result, (*expected, expected_unit)):
            assert torch.equal(got, truth)


@pytest.mark.plain_allocations
def test_l2norm_past_2_31_elements() -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.empty(2**31 // 200 + 50, 200, device=DEVICE, dtype=torch.bfloat16).normal_().requires_grad_()
    out = l2norm(x)
    (dx,) = torch.autograd.grad(out, x, x.detach())
    last = x.detach()[-30:].clone().requires_grad_()
    expected = l2norm(last)
    assert torch.equal(out[-30:], expected)
    assert torch.equal(dx[-30:], torch.autograd.grad(expected, last, last.detach())[0])


@pytest.mark.plain_allocations
def test_table_past_2_31_elements() -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of GPU memory")
    items, dim = 2**31 // 256 + 1000, 256
    table = torch.empty(items, dim, device=DEVICE, dtype=torch.bfloat16).normal_()
    query, _, pos, neg = problem(torch.bfloat16, dim, items=900)
    got = run(query, table, pos + items - 900, neg + items - 900)
    expected = run(query, table[-900:].clone(), pos, neg)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2][-900:], expected[2])
    assert not got[2][:-900].any()


@pytest.mark.plain_allocations
def test_pairs_past_2_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last rows have a weight; the pairs are sorted in parts."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 64 * 2**30:
        pytest.skip("needs 64 GiB of GPU memory")
    monkeypatch.setattr(similarity, "_SORTED_PAIRS", 2**29)
    samples, items = 2000, 500
    rows = 2**31 // samples + 100
    query, table = randn(rows, 4), randn(items, 4)
    pos, neg = randint(items, rows, dtype=torch.int32), randint(items, rows, samples, dtype=torch.int32)
    weights = torch.zeros(rows, device=DEVICE)
    weights[-100:] = 1
    got = run(query, table, pos, neg, weights=weights)
    expected = run(query[-100:], table, pos[-100:], neg[-100:])
    assert torch.allclose(got[0], expected[0])
    assert torch.allclose(got[1][-100:], expected[1], rtol=1e-5, atol=1e-9)
    assert not got[1][:-100].any()
    assert torch.allclose(got[2], expected[2], rtol=1e-4, atol=1e-7)


# torch.library, torch.compile and errors


@pytest.mark.plain_allocations  # opcheck compares storage offsets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    query, table, pos, neg = problem(dtype)
    query.requires_grad_()
    table.requires_grad_()
    ops = torch.ops.hstu_ext
    torch.library.opcheck(ops.l2norm.default, (query, 1e-6))
    log_q = torch.randn(30, device=DEVICE)
    torch.library.opcheck(ops.sampled_softmax.default, (query, table, pos, neg, 0.1, 1e-6, log_q, False))


def test_compile() -> None:
    torch._dynamo.reset()
    inputs = problem(torch.float32)

    def model(query: Tensor, table: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        return sampled_softmax_loss(l2norm(2 * query + 1), table, pos, neg)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, expected = (gradients(lambda q, e, f=f: f(q, e, *inputs[2:]), *inputs[:2]) for f in (compiled, model))
    for a, b in zip(ours, expected):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


ROWS = "must be torch.float32, torch.float16 or torch.bfloat16 on a GPU, got torch.float64"
BAD: dict[str, tuple[dict[str, Callable[[Tensor], Any]], str]] = {
    "double": ({"query": Tensor.double, "table": Tensor.double}, f"query {ROWS}"),
    "table": ({"table": Tensor.cpu}, "table must be on cuda:0 like query, got cpu"),
    "pos": ({"pos_ids": Tensor.cpu}, "pos_ids must be on cuda:0, got cpu"),
    "neg": ({"neg_ids": Tensor.cpu}, "neg_ids must be on cuda:0, got cpu"),
    "log_q": ({"log_q": Tensor.cpu}, "log_q must be on cuda:0, got cpu"),
    "log_q_shape": ({"log_q": lambda x: x[:3]}, "log_q must be [30], got [3]"),
    "pos_shape": ({"pos_ids": lambda x: x[:2]}, "pos_ids must be [13], got [2]"),
    "neg_shape": ({"neg_ids": lambda x: x[:, 0]}, "neg_ids must be [13, K], got [13]"),
    "float": ({"neg_ids": Tensor.float}, "neg_ids must be torch.int32 or torch.int64, got torch.float32"),
    "no_items": (
        {"table": lambda x: x[:0], "log_q": lambda x: x[:0]}, "table must have 1 to 2^31 - 1 rows on a GPU, got 0",
    ),
    "dtype": ({"table": Tensor.half}, "table must be torch.float32 like query, got torch.float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, text = BAD[name]
    names = ("query", "table", "pos_ids", "neg_ids")
    arguments = {**dict(zip(names, problem(torch.float32))), "log_q": torch.randn(30, device=DEVICE)}
    for key, change in changes.items():
        arguments[key] = change(arguments[key])
    with pytest.raises(ValueError, match=re.escape(f"hstu_ext.sampled_softmax_loss: {text}")):
        sampled_softmax_loss(**arguments)


def test_l2norm_of_doubles() -> None:
    with pytest.raises(ValueError, match=re.escape(f"hstu_ext.l2norm: x {ROWS}")):
        l2norm(torch.ones(2, 2, dtype=torch.float64, device=DEVICE))
