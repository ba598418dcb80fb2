"""The similarity ops against oracles written out in float64, their gradients, masks, errors and torch.compile."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hstu_ext
from hstu_ext import _C, MissingKernelError, in_batch_softmax_loss, l2norm, l2norm_dot, sampled_softmax_loss, topk_dot
from hstu_ext.ops import similarity
from test_attention_cpu import run_python
from test_bindings import GpuTensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TEMPERATURE = 0.2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["one_tile", "small_tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one tile, or many tiles of 3 x 5 with ragged edges."""
    if request.param == "small_tiles":
        monkeypatch.setattr(similarity, "_TILE_ROWS", 3)
        monkeypatch.setattr(similarity, "_TILE_ELEMENTS", 15)
        monkeypatch.setattr(similarity, "_TILE_ITEM_ELEMENTS", 240)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=eps)


def assert_as_good_as_eager(got: Tensor, eager: Tensor, exact: Tensor, factor: float) -> None:
    """The error is at most `factor` times that of eager PyTorch in the same dtype, or a few roundings."""
    scale = exact.abs().max()
    least = (16 if got.dtype.itemsize > 2 else 4) * torch.finfo(got.dtype).eps * scale
    error, allowed = (got.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    assert error <= max(factor * allowed, least), f"off by {error:.3g}, eager by {allowed:.3g}"


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves)


# l2norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 50, 64, 200])
def test_l2norm(dtype: torch.dtype, dim: int) -> None:
    x, dout = torch.randn(3, 5, dim, dtype=dtype), torch.randn(3, 5, dim, dtype=dtype)

    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = function(x)
        return out.detach(), torch.autograd.grad(out, x, dout.to(out.dtype))[0]

    ours, eager, exact = run(l2norm, x), run(lambda x: F.normalize(x, dim=-1), x), run(unit, x.double())
    assert ours[0].dtype == dtype
    assert_as_good_as_eager(ours[0], eager[0], exact[0], 2)
    assert_as_good_as_eager(ours[1], eager[1], exact[1], 3)


def test_l2norm_below_eps() -> None:
    x = torch.tensor([[0.0, 0.0], [3e-4, 4e-4], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    out = l2norm(x, 1e-2)
    assert torch.allclose(out, torch.tensor([[0, 0], [0.03, 0.04], [0.6, 0.8]], dtype=torch.float64))
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.allclose(dx[:2], torch.full((2, 2), 100.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: l2norm(x, 1e-2), (x,))


def test_l2norm_strides_and_no_rows() -> None:
    x = torch.randn(6, 4, 10)
    assert torch.equal(l2norm(x[:, 1:3]), l2norm(x)[:, 1:3])
    assert torch.allclose(l2norm(x.transpose(1, 2)), unit(x.transpose(1, 2)))
    empty = torch.empty(0, 4, requires_grad=True)
    assert torch.autograd.grad(l2norm(empty).sum(), empty)[0].shape == (0, 4)
    assert torch.allclose(l2norm(torch.randn(4)).norm(), torch.tensor(1.0))


# topk_dot


def oracle_topk(query: Tensor, items: Tensor, k: int, gone: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A stable sort of every score; items of `gone` [B, N] are left out."""
    scores = query.double() @ items.double().t()
    if gone is not None:
        scores = scores.masked_fill(gone, -math.inf)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k].masked_fill(values[:, :k] == -math.inf, -1)


def small_integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Products of these are exact, and many are equal."""
    return torch.randint(-2, 3, shape).to(dtype)


def assert_topk(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0].double(), expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 40, 57])
def test_topk_with_ties(dtype: torch.dtype, k: int) -> None:
    query, items = small_integers(8, 6, dtype=dtype), small_integers(57, 6, dtype=dtype)
    assert_topk(topk_dot(query, items, k), oracle_topk(query, items, k))


@pytest.mark.parametrize(("batch", "count", "k"), [(1, 300_000, 10), (600, 3000, 30), (3, 2000, 2000), (0, 10, 2)])
def test_topk_sizes(batch: int, count: int, k: int) -> None:
    query, items = small_integers(batch, 9), small_integers(count, 9)
    assert_topk(topk_dot(query, items, k), oracle_topk(query, items, k))


def test_topk_of_ascending_scores() -> None:
    """Every item is better than all before it, so every selection on the way is thrown away again."""
    items = torch.arange(5000.0).view(-1, 1)
    values, indices = topk_dot(torch.ones(2, 1), items, 7)
    assert indices.tolist() == [list(range(4999, 4992, -1))] * 2
    assert torch.equal(values, indices.float())


@pytest.mark.usefixtures("_tiles")
def test_topk_excludes_and_validity_compose() -> None:
    query, items = small_integers(9, 5), small_integers(40, 5)
    valid = torch.rand(40) < 0.7
    exclude = torch.randint(-1, 40, (9, 12))
    exclude[2] = -1
    gone = (torch.arange(40) == exclude.unsqueeze(2)).any(1)
    both = gone | ~valid
    assert_topk(topk_dot(query, items, 6, exclude), oracle_topk(query, items, 6, gone))
    assert_topk(topk_dot(query, items, 6, valid=valid), oracle_topk(query, items, 6, (~valid).expand(9, 40)))
    assert_topk(topk_dot(query, items, 6, exclude, valid), oracle_topk(query, items, 6, both))
    lengths = torch.tensor([12, 0, 12, 3, 7, 0, 1, 12, 5])
    packed = torch.cat([row[:length] for row, length in zip(exclude, lengths)])
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    padded = exclude.masked_fill(torch.arange(12) >= lengths.unsqueeze(1), -1)
    values, indices = topk_dot(query, items, 6, (packed, offsets))
    assert_topk((values, indices), topk_dot(query.double(), items.double(), 6, padded))


def test_topk_with_fewer_items_than_k() -> None:
    values, indices = topk_dot(
        torch.ones(2, 1), torch.tensor([[1.0], [3.0], [2.0]]), 3, torch.tensor([[1, -1], [0, 2]])
    )
    assert indices.tolist() == [[2, 0, -1], [1, -1, -1]]
    assert values.tolist() == [[2.0, 1.0, -math.inf], [3.0, -math.inf, -math.inf]]
    values, indices = topk_dot(torch.ones(1, 1), torch.tensor([[math.nan], [1.0], [-math.inf]]), 2)
    assert indices.tolist() == [[1, -1]]


def test_topk_in_half_precision_ranks_unrounded_scores() -> None:
    """256 + 1 and 256 are one number in bfloat16; the products are not rounded to it."""
    query = torch.tensor([[16.0, 1.0]], dtype=torch.bfloat16)
    items = torch.tensor([[16.0, 0.0], [16.0, 1.0]], dtype=torch.bfloat16)
    values, indices = topk_dot(query, items, 2)
    assert indices.tolist() == [[1, 0]]
    assert values.tolist() == [[257.0, 256.0]]


def test_topk_of_permuted_queries() -> None:
    query, items, order = torch.randn(30, 16), torch.randn(500, 16), torch.randperm(30)
    values, indices = topk_dot(query, items, 9)
    permuted = topk_dot(query[order], items, 9)
    assert torch.equal(permuted[1], indices[order])
    assert torch.allclose(permuted[0], values[order])


def test_topk_is_not_differentiable() -> None:
    values, _ = topk_dot(torch.randn(2, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True), 2)
    assert not values.requires_grad


# sampled_softmax_loss


def oracle_sampled(
    query: Tensor, table: Tensor, pos: Tensor, neg: Tensor, log_q: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Row by row, over the kept items only: a masked negative has a weight of exp(-5e4)."""
    losses = []
    for t in range(len(pos)):
        kept = [int(pos[t]), *(int(i) for i in neg[t] if i != pos[t])]
        logits = unit(table[kept]) @ unit(query[t]) / TEMPERATURE
        if log_q is not None:
            logits = logits - log_q[kept]
        losses.append(logits.logsumexp(0) - logits[0])
    stacked = torch.stack(losses)
    return stacked.mean() if weights is None else (stacked * weights).sum() / weights.sum()


def sampled_problem(dtype: torch.dtype, dim: int = 10, samples: int = 40) -> tuple[Tensor, ...]:
    return (
        torch.randn(13, dim, dtype=dtype),
        torch.randn(30, dim, dtype=dtype),
        torch.randint(30, (13,)),
        torch.randint(30, (13, samples)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "samples"), [(10, 40), (50, 128), (64, 1), (3, 0)])
@pytest.mark.parametrize("sparse", [False, True])
def test_sampled_softmax(dtype: torch.dtype, dim: int, samples: int, sparse: bool) -> None:
    query, table, pos, neg = sampled_problem(dtype, dim, samples)

    def ours(q: Tensor, e: Tensor) -> Tensor:
        return sampled_softmax_loss(q, e, pos, neg, TEMPERATURE, sparse=sparse)

    got = gradients(ours, query, table)
    exact = gradients(lambda q, e: oracle_sampled(q, e, pos, neg), query.double(), table.double())
    eager = gradients(lambda q, e: oracle_sampled(q, e, pos, neg), query, table)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[2].is_sparse == sparse
    if sparse:
        assert got[2].is_coalesced()
        assert got[2].indices()[0].tolist() == sorted({*pos.tolist(), *neg.flatten().tolist()})
        got = (got[0], got[1], got[2].to_dense())
    for mine, theirs, truth, factor in zip(got, eager, exact, (2, 3, 3)):
        if samples == 0:
            assert mine.abs().max() <= 1e-6
        else:
            assert_as_good_as_eager(mine, theirs, truth, factor)


def test_sampled_softmax_gradcheck() -> None:
    query, table, pos, neg = sampled_problem(torch.float64, 4, 5)
    log_q, weights = torch.randn(30, dtype=torch.float64), torch.rand(13, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (query, table, weights))

    def loss(q: Tensor, e: Tensor, w: Tensor) -> Tensor:
        return sampled_softmax_loss(q, e, pos, neg, TEMPERATURE, log_q=log_q, weights=w)

    assert torch.autograd.gradcheck(loss, inputs)
    expected = oracle_sampled(query, table, pos, neg, log_q, weights)
    assert torch.allclose(loss(*inputs), expected, rtol=1e-12)


def test_log_q_makes_common_negatives_count_less() -> None:
    """One negative, drawn with probability q. Added with the wrong sign, a common one would raise the loss."""
    query, table = torch.ones(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    ids = torch.tensor([0]), torch.tensor([[1]])

    def loss(q: float) -> float:
        log_q = torch.tensor([0.5, q], dtype=torch.float64).log()
        return sampled_softmax_loss(query, table, *ids, 1.0, log_q=log_q).item()

    # Equal similarities: the positive weighs 1 / 0.5 and the negative 1 / q.
    assert loss(0.9) == pytest.approx(math.log(1 + 0.5 / 0.9))
    assert loss(0.1) == pytest.approx(math.log(1 + 0.5 / 0.1))


def test_sampled_softmax_masks_every_equal_id() -> None:
    query, table, pos, _ = sampled_problem(torch.float64)
    only_positives = pos.unsqueeze(1).expand(-1, 6)
    loss, dquery, dtable = gradients(
        lambda q, e: sampled_softmax_loss(q, e, pos, only_positives, TEMPERATURE), query, table
    )
    assert loss == 0
    assert dquery.abs().max() < 1e-15
    assert dtable.abs().max() < 1e-15


def test_sampled_softmax_of_zero_rows_and_weights() -> None:
    query, table, pos, neg = sampled_problem(torch.float32)
    table[3] = 0
    query[0] = 0
    got = gradients(lambda q, e: sampled_softmax_loss(q, e, pos, neg, weights=torch.zeros(13)), query, table)
    assert all(not x.any() for x in got)
    assert all(x.isfinite().all() for x in gradients(lambda q, e: sampled_softmax_loss(q, e, pos, neg), query, table))
    empty = sampled_softmax_loss(query[:0], table, pos[:0], neg[:0])
    assert empty == 0


def test_sampled_softmax_of_permuted_rows() -> None:
    query, table, pos, neg = sampled_problem(torch.float64)
    rows, columns = torch.randperm(13), torch.randperm(40)
    expected = gradients(lambda q, e: sampled_softmax_loss(q, e, pos, neg), query, table)
    got = gradients(
        lambda q, e: sampled_softmax_loss(q, e, pos[rows].int(), neg[rows][:, columns].int()), query[rows], table
    )
    assert torch.allclose(got[0], expected[0])
    assert torch.allclose(got[1], expected[1][rows])
    assert torch.allclose(got[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    query, table = torch.randn(300, 50, dtype=dtype), torch.randn(400, 50, dtype=dtype)
    pos, neg = torch.randint(400, (300,)), torch.randint(400, (300, 64))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(gradients(lambda q, e: sampled_softmax_loss(q, e, pos, neg), query, table))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# l2norm_dot


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2norm_dot(dtype: torch.dtype) -> None:
    q, items, dout = (torch.randn(*shape, dtype=dtype) for shape in ((8, 20), (23, 20), (8, 23)))

    def run(function: Callable[..., Tensor], q: Tensor, items: Tensor) -> tuple[Tensor, ...]:
        return gradients(lambda q, items: (function(q, items) * dout.to(q.dtype)).sum(), q, items)

    assert_as_good_as_eager(
        l2norm_dot(q, items), unit(q) @ unit(items).t(), unit(q.double()) @ unit(items.double()).t(), 2
    )
    ours, exact = run(l2norm_dot, q, items), run(lambda q, i: unit(q) @ unit(i).t(), q.double(), items.double())
    eager = run(lambda q, i: unit(q) @ unit(i).t(), q, items)
    for mine, theirs, truth in zip(ours[1:], eager[1:], exact[1:]):
        assert_as_good_as_eager(mine, theirs, truth, 3)


@pytest.mark.usefixtures("_tiles")
def test_l2norm_dot_gradcheck() -> None:
    q, items = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (4, 7))
    assert torch.autograd.gradcheck(l2norm_dot, (q, items))


def test_l2norm_dot_of_nothing() -> None:
    """No row adds to a gradient: it is 0 and not what memory holds."""
    for rows, count in ((0, 5), (3, 0), (0, 0)):
        q, items = torch.randn(rows, 4), torch.randn(count, 4)
        out, dq, ditems = gradients(lambda q, items: l2norm_dot(q, items).sum(), q, items)
        assert out == 0
        assert not dq.any()
        assert not ditems.any()


# in_batch_softmax_loss


def oracle_in_batch(
    query: Tensor,
    items: Tensor,
    keep: Tensor,
    positives: Tensor,
    log_q: Tensor | None = None,
) -> Tensor:
    """The mean over rows of a softmax over keep [T, X]."""
    logits = unit(query) @ unit(items).t() / TEMPERATURE
    if log_q is not None:
        logits = logits - log_q
    return F.cross_entropy(logits.masked_fill(~keep, -math.inf), positives)


class InBatch:
    """7 queries of 3 sequences and 11 items, some with the same id, one a copy of another."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.query, self.items = torch.randn(7, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
        self.items[9] = 2 * self.items[1]
        self.item_ids = torch.tensor([0, 1, 2, 3, 4, 5, 3, 7, 1, 9, 10])
        self.positives = torch.tensor([1, 3, 5, 0, 10, 8, 1])
        self.sequences, self.item_sequences = torch.arange(7) % 3, torch.arange(11) % 4
        self.log_q = torch.randn(11, dtype=torch.float64)

    def keep(self, ids: bool = True, sequences: bool = False, threshold: float | None = None) -> Tensor:
        masked = torch.zeros(7, 11, dtype=torch.bool)
        if ids:
            masked |= self.item_ids == self.item_ids[self.positives].unsqueeze(1)
        if sequences:
            masked |= self.sequences.unsqueeze(1) == self.item_sequences
        if threshold is not None:
            masked |= unit(self.items)[self.positives] @ unit(self.items).t() > threshold
        return ~masked | (torch.arange(11) == self.positives.unsqueeze(1))

    def loss(self, query: Tensor, items: Tensor, sequences: bool = False, **options: Any) -> Tensor:
        if sequences:
            options |= {"sequence_ids": self.sequences, "item_sequence_ids": self.item_sequences}
        return in_batch_softmax_loss(
            query, items, self.item_ids, positives=self.positives, temperature=TEMPERATURE, **options
        )


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.99, 0.2])
@pytest.mark.parametrize("corrected", [False, True])
def test_in_batch_masks_compose(sequences: bool, threshold: float | None, corrected: bool) -> None:
    problem = InBatch()
    keep, log_q = problem.keep(True, sequences, threshold), problem.log_q if corrected else None
    options = {"similarity_threshold": threshold, "log_q": log_q}
    got = gradients(lambda q, i: problem.loss(q, i, sequences, **options), problem.query, problem.items)
    expected = gradients(
        lambda q, i: oracle_in_batch(q, i, keep, problem.positives, log_q), problem.query, problem.items
    )
    for mine, truth in zip(got, expected):
        assert torch.allclose(mine, truth, rtol=1e-10, atol=1e-12)


def test_near_duplicates_are_masked() -> None:
    """Item 9 is item 1 twice as long under an id of its own; it counts unless the threshold takes it away."""
    problem = InBatch()
    assert not problem.keep(threshold=0.99)[0, 9]
    plain, filtered = (problem.loss(problem.query, problem.items, similarity_threshold=t) for t in (None, 0.99))
    assert filtered < plain


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_batch_dtypes(dtype: torch.dtype) -> None:
    problem = InBatch(dtype)
    keep = problem.keep()
    got = gradients(problem.loss, problem.query, problem.items)
    exact, eager = (
        gradients(lambda q, i: oracle_in_batch(q, i, keep, problem.positives), problem.query.to(d), problem.items.to(d))
        for d in (torch.float64, dtype)
    )
    for mine, theirs, truth, factor in zip(got, eager, exact, (2, 3, 3)):
        assert_as_good_as_eager(mine, theirs, truth, factor)


@pytest.mark.usefixtures("_tiles")
def test_in_batch_gradcheck() -> None:
    problem = InBatch()
    weights = torch.rand(7, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (problem.query, problem.items, weights))
    assert torch.autograd.gradcheck(
        lambda q, i, w: problem.loss(q, i, True, log_q=problem.log_q, similarity_threshold=0.7, weights=w), inputs
    )


def test_all_items_as_negatives_is_full_softmax() -> None:
    query, table, targets = torch.randn(40, 16), torch.randn(300, 16), torch.randint(300, (40,))
    expected = F.cross_entropy(unit(query) @ unit(table).t() / 0.05, targets)
    got = in_batch_softmax_loss(query, table, torch.arange(300), positives=targets)
    assert torch.allclose(got, expected, rtol=1e-5)
    everything = torch.arange(300).expand(40, -1)
    assert torch.allclose(sampled_softmax_loss(query, table, targets, everything), expected, rtol=1e-5)


def test_in_batch_log_q_sign() -> None:
    query, items = torch.ones(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)

    def loss(q: float) -> float:
        log_q = torch.tensor([0.5, q], dtype=torch.float64).log()
        options: dict[str, Any] = {"log_q": log_q, "positives": torch.tensor([0]), "temperature": 1.0}
        return in_batch_softmax_loss(query, items, torch.tensor([0, 1]), **options).item()

    assert loss(0.9) == pytest.approx(math.log(1 + 0.5 / 0.9))
    assert loss(0.1) == pytest.approx(math.log(1 + 0.5 / 0.1))


def test_in_batch_of_permuted_items() -> None:
    query, items, ids = torch.randn(20, 8), torch.randn(20, 8), torch.arange(20) % 17
    sequences, log_q = torch.arange(20) // 3, torch.rand(20)
    order = torch.randperm(20)
    whole = in_batch_softmax_loss(query, items, ids, sequences, log_q)
    permuted = in_batch_softmax_loss(query[order], items[order], ids[order].int(), sequences[order], log_q[order])
    assert torch.allclose(whole, permuted)


def test_in_batch_of_nothing_and_of_one() -> None:
    nothing = in_batch_softmax_loss(torch.randn(0, 4), torch.randn(0, 4), torch.zeros(0, dtype=torch.long))
    assert nothing == 0
    one = in_batch_softmax_loss(torch.randn(1, 4), torch.randn(1, 4), torch.tensor([5]), torch.tensor([1]))
    assert one.abs() < 1e-6


def test_nan_does_not_hide() -> None:
    items = torch.randn(6, 4)
    items[5] = math.nan
    assert in_batch_softmax_loss(torch.randn(6, 4), items, torch.arange(6)).isnan()
    ids = torch.tensor([0, 1]), torch.tensor([[2, 5], [5, 3]])
    assert sampled_softmax_loss(torch.randn(2, 4), items, *ids).isnan()


# Errors

X, Y = torch.randn(3, 4), torch.randn(5, 4)
IDS, NEGATIVES = torch.tensor([0, 1, 4]), torch.zeros(3, 2, dtype=torch.long)
ITEM_IDS = torch.arange(5)

BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "l2norm_none": (lambda: l2norm(None), TypeError, "l2norm: x must be a tensor, got NoneType"),
    "l2norm_scalar": (lambda: l2norm(torch.tensor(1.0)), ValueError, "l2norm: x must be [..., dim], got []"),
    "l2norm_int": (lambda: l2norm(IDS), ValueError, "l2norm: x must be a floating point tensor, got torch.int64"),
    "l2norm_eps": (lambda: l2norm(X, 0.0), ValueError, "l2norm: eps must be positive, got 0"),
    "topk_list": (lambda: topk_dot([1], Y, 1), TypeError, "topk_dot: query must be a tensor, got list"),
    "topk_rank": (lambda: topk_dot(X[0], Y, 1), ValueError, "topk_dot: query must be [B, D], got [4]"),
    "topk_dim": (
        lambda: topk_dot(X, Y[:, :3], 1), ValueError, "topk_dot: items must have rows of 4 like query, got [5, 3]",
    ),
    "topk_dtype": (
        lambda: topk_dot(X, Y.double(), 1), ValueError,
        "topk_dot: items must be torch.float32 like query, got torch.float64",
    ),
    "topk_k": (lambda: topk_dot(X, Y, 6), ValueError, "topk_dot: k must be 1 to the 5 items, got 6"),
    "topk_k_zero": (lambda: topk_dot(X, Y, 0), ValueError, "topk_dot: k must be 1 to the 5 items, got 0"),
    "topk_valid": (lambda: topk_dot(X, Y, 1, valid=ITEM_IDS), ValueError, "valid must be torch.bool, got torch.int64"),
    "topk_valid_shape": (
        lambda: topk_dot(X, Y, 1, valid=torch.ones(4, dtype=torch.bool)), ValueError, "valid must be [5], got [4]",
    ),
    "topk_exclude_dtype": (
        lambda: topk_dot(X, Y, 1, NEGATIVES.int()), ValueError, "exclude must be torch.int64, got torch.int32",
    ),
    "topk_exclude_shape": (
        lambda: topk_dot(X, Y, 1, NEGATIVES[:2]), ValueError, "exclude must be [3, E], or [total] with offsets, got",
    ),
    "topk_exclude_value": (
        lambda: topk_dot(X, Y, 1, NEGATIVES + 5), ValueError, "exclude must hold values from -1 to 4, got 5",
    ),
    "topk_exclude_list": (
        lambda: topk_dot(X, Y, 1, [[1]]), TypeError, "topk_dot: exclude must be a tensor, got list",
    ),
    "topk_offsets": (
        lambda: topk_dot(X, Y, 1, (IDS, torch.tensor([0, 2, 1, 3]))), ValueError,
        "exclude's offsets must never decrease, got 2 and 1 for row 1",
    ),
    "topk_offsets_end": (
        lambda: topk_dot(X, Y, 1, (IDS, torch.tensor([0, 1, 1, 2]))), ValueError,
        "exclude's offsets must go from 0 to 3, got 0 to 2",
    ),
    "dot_dim": (lambda: l2norm_dot(X, Y[:, :2]), ValueError, "items must have rows of 4 like q, got [5, 2]"),
    "dot_eps": (lambda: l2norm_dot(X, Y, -1.0), ValueError, "l2norm_dot: eps must be positive, got -1"),
    "sampled_table": (
        lambda: sampled_softmax_loss(X, Y.half(), IDS, NEGATIVES), ValueError,
        "sampled_softmax_loss: table must be torch.float32 like query, got torch.float16",
    ),
    "sampled_pos": (
        lambda: sampled_softmax_loss(X, Y, IDS[:2], NEGATIVES), ValueError, "pos_ids must be [3], got [2]",
    ),
    "sampled_neg": (lambda: sampled_softmax_loss(X, Y, IDS, IDS), ValueError, "neg_ids must be [3, K], got [3]"),
    "sampled_range": (
        lambda: sampled_softmax_loss(X, Y, IDS + 1, NEGATIVES), ValueError,
        "pos_ids must hold values from 0 to 4, got 5",
    ),
    "sampled_negative": (
        lambda: sampled_softmax_loss(X, Y, IDS, NEGATIVES - 1), ValueError,
        "neg_ids must hold values from 0 to 4, got -1",
    ),
    "sampled_float": (
        lambda: sampled_softmax_loss(X, Y, IDS.float(), NEGATIVES), ValueError,
        "pos_ids must be torch.int32 or torch.int64, got torch.float32",
    ),
    "sampled_temperature": (
        lambda: sampled_softmax_loss(X, Y, IDS, NEGATIVES, 0.0), ValueError, "temperature must be positive, got 0",
    ),
    "sampled_log_q": (
        lambda: sampled_softmax_loss(X, Y, IDS, NEGATIVES, log_q=torch.zeros(3)), ValueError,
        "log_q must be [5], got [3]",
    ),
    "sampled_log_q_number": (
        lambda: sampled_softmax_loss(X, Y, IDS, NEGATIVES, log_q=0.5), TypeError,
        "sampled_softmax_loss: log_q must be a tensor, got float",
    ),
    "sampled_weights": (
        lambda: sampled_softmax_loss(X, Y, IDS, NEGATIVES, weights=torch.ones(2)), ValueError,
        "sampled_softmax_loss: weights must be [3], got [2]",
    ),
    "batch_positives": (
        lambda: in_batch_softmax_loss(X, Y, ITEM_IDS), ValueError,
        "in_batch_softmax_loss: positives must be given where query and items differ in rows, got None",
    ),
    "batch_weights": (
        lambda: in_batch_softmax_loss(X, Y, ITEM_IDS, positives=IDS, weights=[1.0]), TypeError,
        "in_batch_softmax_loss: weights must be a tensor, got list",
    ),
    "batch_ids": (
        lambda: in_batch_softmax_loss(X, Y, IDS, positives=IDS), ValueError, "item_ids must be [5], got [3]",
    ),
    "batch_ids_float": (
        lambda: in_batch_softmax_loss(X, Y, ITEM_IDS.float(), positives=IDS), ValueError,
        "item_ids must be integers, got torch.float32",
    ),
    "batch_range": (
        lambda: in_batch_softmax_loss(X, Y, ITEM_IDS, positives=IDS + 1), ValueError,
        "positives must hold values from 0 to 4, got 5",
    ),
    "batch_sequences": (
        lambda: in_batch_softmax_loss(X, Y, ITEM_IDS, IDS, positives=IDS), ValueError,
        "item_sequence_ids must be given where sequence_ids is, got None",
    ),
    "batch_item_sequences": (
        lambda: in_batch_softmax_loss(X, Y, ITEM_IDS, IDS, positives=IDS, item_sequence_ids=IDS), ValueError,
        "item_sequence_ids must be [5], got [3]",
    ),
    "batch_temperature": (
        lambda: in_batch_softmax_loss(X, Y, ITEM_IDS, positives=IDS, temperature=-1.0), ValueError,
        "temperature must be positive, got -1",
    ),
    "batch_eps": (
        lambda: in_batch_softmax_loss(X, Y, ITEM_IDS, positives=IDS, eps=0.0), ValueError,
        "eps must be positive, got 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, text = BAD[name]
    with pytest.raises(error, match=re.escape(text)) as caught:
        call()
    assert str(caught.value).startswith("hstu_ext.")


@pytest.mark.skipif(bool(hstu_ext.build_info()["cuda"]), reason="this build has GPU kernels")
def test_gpu_tensors() -> None:
    rows = GpuTensor((4, 8), (8, 1), dtype=torch.float32)
    text = "is on a GPU and this build has CPU kernels only. Install with nvcc"
    with pytest.raises(MissingKernelError, match=rf"hstu_ext\.l2norm: x {text}"):
        _C.l2norm(rows, rows, 1e-6, 0, 1)
    with pytest.raises(MissingKernelError, match=rf"hstu_ext\.topk_dot: query {text}"):
        _C.topk_check(rows, rows, 1, None, None, None)
    with pytest.raises(MissingKernelError, match=rf"hstu_ext\.l2norm_dot: q {text}"):
        _C.l2norm_dot_check(rows, rows, 1e-6)
    sampled: tuple[Any, ...] = (rows, rows, IDS, NEGATIVES, 1.0, 1e-6, None)
    for function, others in (
        (_C.sampled_softmax_forward, (X, X, X)),
        (_C.sampled_softmax_sort, (IDS, IDS, IDS, IDS, IDS)),
        (_C.sampled_softmax_table, (X, X, IDS, IDS, None, None, 1, X, X, X)),
    ):
        with pytest.raises(MissingKernelError, match=rf"hstu_ext\.sampled_softmax_loss: query {text}"):
            function(*sampled, *others, 0, 1)
    with pytest.raises(MissingKernelError, match=rf"hstu_ext\.in_batch_softmax_loss: query {text}"):
        _C.in_batch_softmax_check(rows, rows, ITEM_IDS, IDS, None, None, None, 1.0, None, None, 1e-6)


# torch.library and torch.compile


def op_calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    q, items = torch.randn(7, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    problem, (pos, neg) = InBatch(), (torch.randint(11, (7,)), torch.randint(11, (7, 3)))
    ops = torch.ops.hstu_ext
    sequences = (problem.sequences, problem.item_sequences)
    in_batch = (q, items, problem.item_ids, problem.positives, *sequences, problem.log_q.float(), 0.1, 0.9, 1e-6)
    return {
        "l2norm": (ops.l2norm, (q, 1e-6)),
        "topk_dot": (ops.topk_dot, (q.detach(), items.detach(), 3, neg, None, torch.ones(11, dtype=torch.bool))),
        "l2norm_dot": (ops.l2norm_dot, (q, items, 1e-6)),
        "sampled_softmax": (ops.sampled_softmax, (q, items, pos, neg, 0.1, 1e-6, torch.randn(11), False)),
        "in_batch_softmax": (ops.in_batch_softmax, in_batch),
    }


@pytest.mark.plain_allocations  # opcheck compares storage offsets
@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name: str) -> None:
    op, arguments = op_calls()[name]
    torch.library.opcheck(op.default, arguments)


def model(query: Tensor, items: Tensor, pos: Tensor, neg: Tensor, problem: InBatch) -> tuple[Tensor, Tensor, Tensor]:
    query = l2norm(2 * query + 1)
    loss = sampled_softmax_loss(query, items, pos, neg, log_q=problem.log_q)
    loss = loss + 2 * problem.loss(query, items, True, similarity_threshold=0.9)
    return loss + l2norm_dot(query, items).square().mean(), *topk_dot(query, items, 4, exclude=neg)


def test_compile() -> None:
    torch._dynamo.reset()
    problem, (pos, neg) = InBatch(torch.float32), (torch.randint(11, (7,)), torch.randint(11, (7, 3)))

    def run(function: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in (problem.query, problem.items)]
        loss, *found = function(*leaves, pos, neg, problem)
        return loss.detach(), *torch.autograd.grad(loss, leaves), *found

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled), run(model)):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_sparse_gradients_are_for_eager_mode() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(sampled_softmax_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="sparse must be False under torch"):
        compiled(X, Y, IDS, NEGATIVES, sparse=True)


def test_autocast_changes_nothing() -> None:
    problem, (pos, neg) = InBatch(torch.float32), (torch.randint(11, (7,)), torch.randint(11, (7, 3)))
    plain = gradients(lambda q, i: model(q, i, pos, neg, problem)[0], problem.query, problem.items)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(lambda q, i: model(q, i, pos, neg, problem)[0], problem.query, problem.items)
    for got, expected in zip(cast, plain):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("variant", hstu_ext.build_info()["cpu_variants"])
def test_every_variant(variant: str) -> None:
    """Again with each set of kernels that this machine can run and the other tests do not."""
    if variant == hstu_ext.build_info()["cpu_variant"]:
        pytest.skip("every other test runs it")
    chosen = run_python("-c", "import hstu_ext; hstu_ext.build_info()", variant=variant)
    if chosen.returncode != 0 and "HSTU_EXT_CPU must be one of" in chosen.stderr:
        pytest.skip(f"this machine has no {variant}")
    wanted = "test_l2norm or test_topk_with_ties or test_sampled_softmax or test_in_batch_dtypes"
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", f"({wanted}) and not test_every_variant")
    suite = run_python("-m", "pytest", *options, "test_similarity.py", variant=variant)
    assert suite.returncode == 0, suite.stdout[-4000:]


def test_exported() -> None:
    for name in ("in_batch_softmax_loss", "l2norm", "l2norm_dot", "sampled_softmax_loss", "topk_dot"):
        assert name in hstu_ext.__all__
