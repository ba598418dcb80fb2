"""l2norm, topk_dot, l2norm_dot and in_batch_softmax_loss on a GPU, against the oracles of test_similarity.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_ext import in_batch_softmax_loss, l2norm, l2norm_dot, sampled_softmax_loss, topk_dot
from hstu_ext.ops import similarity
from test_similarity import (
    TEMPERATURE,
    InBatch,
    assert_as_good_as_eager,
    assert_topk,
    gradients,
    oracle_in_batch,
    oracle_topk,
    unit,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILE = 128  # items of a tile of the scan


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["one_tile", "small_tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small_tiles":
        monkeypatch.setattr(similarity, "_GPU_TILE_COLS", 5)
        monkeypatch.setattr(similarity, "_GPU_TILE_ELEMENTS", 15)
        monkeypatch.setattr(similarity, "_GPU_TILE_ITEM_ELEMENTS", 240)


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Products of these are exact in every dtype, and many are equal."""
    return torch.randint(-2, 3, shape, device="cuda").to(dtype)


# l2norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 50, 64, 200, 1000, 4096])
def test_l2norm(dtype: torch.dtype, dim: int) -> None:
    x, dout = (torch.randn(3, 5, dim, device="cuda").to(dtype) for _ in range(2))

    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = function(x)
        return out.detach(), torch.autograd.grad(out, x, dout.to(out.dtype))[0]

    ours, eager, exact = run(l2norm, x), run(lambda x: F.normalize(x, dim=-1), x), run(unit, x.double())
    assert ours[0].dtype == dtype
    assert_as_good_as_eager(ours[0], eager[0], exact[0], 2)
    if dim > 1:  # the exact gradient of one element is 0
        assert_as_good_as_eager(ours[1], eager[1], exact[1], 3)
    else:
        assert ours[1].abs().max() < 8 * torch.finfo(dtype).eps * (dout / x).abs().max()


def test_l2norm_below_eps_strides_and_no_rows() -> None:
    x = torch.tensor([[0.0, 0.0], [3e-4, 4e-4], [3.0, 4.0]], device="cuda", requires_grad=True)
    out = l2norm(x, 1e-2)
    assert torch.allclose(out.cpu(), torch.tensor([[0, 0], [0.03, 0.04], [0.6, 0.8]]))
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.allclose(dx[:2].cpu(), torch.full((2, 2), 100.0))
    x = torch.randn(6, 4, 12, device="cuda")
    assert torch.equal(l2norm(x[:, 1:3]), l2norm(x)[:, 1:3])
    assert torch.allclose(l2norm(x[..., 1:9]), unit(x[..., 1:9]))
    assert torch.allclose(l2norm(x.transpose(1, 2)), unit(x.transpose(1, 2)))
    assert l2norm(torch.empty(0, 4, device="cuda")).shape == (0, 4)


# topk_dot


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [6, 8, 64, 72, 200, 256, 320])
@pytest.mark.parametrize(("batch", "count", "k"), [(1, 20_000, 10), (33, 5000, 200), (130, 9001, 57), (5, 130, 130)])
def test_topk(dtype: torch.dtype, dim: int, batch: int, count: int, k: int) -> None:
    query, items = integers(batch, dim, dtype=dtype), integers(count, dim, dtype=dtype)
    assert_topk(topk_dot(query, items, k), oracle_topk(query, items, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 512, 513, 2048, 2049, 7000])
def test_topk_of_every_k(dtype: torch.dtype, k: int) -> None:
    """Beyond 2048 torch.topk does it."""
    query, items = integers(20, 16, dtype=dtype), integers(30_000, 16, dtype=dtype)
    assert_topk(topk_dot(query, items, k), oracle_topk(query, items, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("count", [2047, 2048, 2049, 2176, 4097, 300_000])
def test_topk_around_the_first_round(dtype: torch.dtype, batch: int, count: int) -> None:
    """In the first round every item has a slot, also one that can be no candidate."""
    query, items = integers(batch, 16, dtype=dtype), integers(count, 16, dtype=dtype)
    valid = torch.rand(count, device="cuda") < 0.9
    items[:256], items[torch.randperm(count)[: count // 3]] = math.nan, math.nan
    gone = items.isnan().any(1) | ~valid
    for k in (1, 200, 512, 600):
        got = topk_dot(query, items, k, valid=valid)
        assert_topk(got, oracle_topk(query, items.nan_to_num(0), k, gone.expand(batch, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_topk_rows_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_GPU_TOPK_ROWS", 64)
    monkeypatch.setattr(similarity, "_GPU_TILE_ELEMENTS", 64 * 3000)
    query, items = integers(300, 24, dtype=dtype), integers(12_345, 24, dtype=dtype)
    exclude = torch.randint(-1, 12_345, (300, 40), device="cuda")
    lengths = torch.randint(0, 41, (300,), device="cuda")
    packed = exclude[torch.arange(40, device="cuda") < lengths.unsqueeze(1)]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    gone = torch.zeros(300, 12_346, dtype=torch.bool, device="cuda")
    row = torch.repeat_interleave(torch.arange(300, device="cuda"), lengths)
    gone[row, packed] = True  # -1 is the last column
    assert_topk(topk_dot(query, items, 30, (packed, offsets)), oracle_topk(query, items, 30, gone[:, :-1]))


def scan_order(tiles: int) -> list[int]:
    """The order in which topk_scan takes the tiles."""
    stride = max(1, int(0.618 * tiles))
    while math.gcd(stride, tiles) != 1:
        stride += 1
    return [position * stride % tiles for position in range(tiles)]


def test_topk_when_every_tile_is_better_than_all_before() -> None:
    """The candidates of a round do not fit their room, and the round is scanned again."""
    tiles = 300
    rank = torch.empty(tiles * TILE, dtype=torch.long)
    for position, tile in enumerate(scan_order(tiles)):
        rank[tile * TILE : (tile + 1) * TILE] = torch.arange(TILE) + position * TILE
    items = torch.zeros(tiles * TILE, 8, dtype=torch.float16, device="cuda")
    items[:, 0], items[:, 1] = rank // 64, rank % 64
    query = torch.zeros(3, 8, dtype=torch.float16, device="cuda")
    query[:, 0], query[:, 1] = 64, 1
    for k in (7, 600):
        assert_topk(topk_dot(query, items, k), oracle_topk(query, items, k))
    ascending = torch.arange(70_000.0, device="cuda").view(-1, 1)
    ones = torch.ones(2, 1, device="cuda")
    assert_topk(topk_dot(ones, ascending, 9), oracle_topk(ones, ascending, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [6, 2500])
def test_topk_excludes_and_validity_compose(dtype: torch.dtype, k: int) -> None:
    count = 6000
    query, items = integers(9, 8, dtype=dtype), integers(count, 8, dtype=dtype)
    best = oracle_topk(query, items, 400)[1]  # what is taken away matters
    valid = torch.rand(count, device="cuda") < 0.7
    exclude = torch.cat([best[:, ::2], torch.randint(-1, count, (9, 100), device="cuda")], 1)
    exclude[2] = -1
    gone = torch.zeros(9, count + 1, dtype=torch.bool, device="cuda").scatter_(1, exclude % (count + 1), True)[:, :-1]
    assert_topk(topk_dot(query, items, k, exclude), oracle_topk(query, items, k, gone))
    assert_topk(topk_dot(query, items, k, valid=valid), oracle_topk(query, items, k, (~valid).expand(9, -1)))
    assert_topk(topk_dot(query, items, k, exclude, valid), oracle_topk(query, items, k, gone | ~valid))


def test_topk_with_fewer_items_than_k() -> None:
    for dtype in DTYPES:
        query = torch.tensor([[1.0] + [0.0] * 7] * 2, dtype=dtype, device="cuda")
        items = torch.zeros(3, 8, dtype=dtype, device="cuda")
        items[:, 0] = torch.tensor([1.0, 3.0, 2.0])
        values, indices = topk_dot(query, items, 3, torch.tensor([[1, -1], [0, 2]], device="cuda"))
        assert indices.tolist() == [[2, 0, -1], [1, -1, -1]]
        assert values.tolist() == [[2.0, 1.0, -math.inf], [3.0, -math.inf, -math.inf]]
        items[:, 0] = torch.tensor([math.nan, 1.0, -math.inf])
        assert topk_dot(query, items, 2)[1].tolist() == [[1, -1]] * 2
    assert topk_dot(torch.empty(0, 8, device="cuda"), torch.ones(4, 8, device="cuda"), 2)[0].shape == (0, 2)


def test_topk_in_half_precision_ranks_unrounded_scores() -> None:
    query = torch.tensor([[16.0, 1.0, 0, 0, 0, 0, 0, 0]], dtype=torch.bfloat16, device="cuda")
    items = torch.zeros(2, 8, dtype=torch.bfloat16, device="cuda")
    items[:, 0], items[1, 1] = 16, 1
    values, indices = topk_dot(query, items, 2)
    assert indices.tolist() == [[1, 0]]
    assert values.tolist() == [[257.0, 256.0]]


def test_topk_of_strided_and_misaligned_rows() -> None:
    wide = integers(4000, 96, dtype=torch.float16)
    query = integers(40, 96, dtype=torch.float16)
    for cols in (slice(8, 72), slice(3, 67)):
        assert_topk(topk_dot(query[:, cols], wide[:, cols], 20), oracle_topk(query[:, cols], wide[:, cols], 20))
    flipped = integers(32, 4000, dtype=torch.float16).t()
    assert_topk(topk_dot(query[:, :32], flipped, 20), oracle_topk(query[:, :32], flipped, 20))


def test_topk_of_random_values() -> None:
    """Against the sorted scores of float64, equal up to rounding."""
    for dtype in DTYPES:
        query, items = (torch.randn(n, 256, device="cuda").to(dtype) for n in (200, 50_000))
        values, indices = topk_dot(query, items, 100)
        expected, _ = oracle_topk(query, items, 100)
        assert torch.allclose(values.double(), expected, rtol=1e-3 if dtype == torch.float32 else 1e-4)
        exact = (query.double().unsqueeze(1) * items.double()[indices]).sum(2)
        assert torch.allclose(exact, values.double(), rtol=1e-3, atol=1e-3)
        assert (values.diff() <= 0).all()


def test_topk_of_garbage_offsets() -> None:
    """They cannot be checked without waiting for the GPU; nothing is read out of bounds."""
    query, items = integers(4, 16, dtype=torch.float16), integers(900, 16, dtype=torch.float16)
    packed = torch.tensor([5, -(2**62), 2**62, 7, 9000], device="cuda")
    for offsets in ([0, -5, 2**62, 3, 1], [9, 9, 9, 9, 9], [-(2**62)] * 5):
        for k in (5, 899):
            values, _ = topk_dot(query, items, k, (packed, torch.tensor(offsets, device="cuda")))
            assert values.shape == (4, k)
            torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_neither_waits_nor_is_uncapturable(dtype: torch.dtype) -> None:
    query, items = (torch.randn(n, 64, device="cuda").to(dtype) for n in (50, 30_000))
    exclude, valid = torch.randint(30_000, (50, 9), device="cuda"), torch.rand(30_000, device="cuda") < 0.9
    expected = topk_dot(query, items, 20, exclude, valid)
    torch.cuda.set_sync_debug_mode("error")
    try:
        topk_dot(query, items, 20, exclude, valid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        topk_dot(query, items, 20, exclude, valid)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = topk_dot(query, items, 20, exclude, valid)
    for _ in range(2):
        for x in captured:
            x.fill_(3)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured[1], expected[1])


def test_topk_bad_input() -> None:
    query, items = torch.randn(2, 8, device="cuda"), torch.randn(9, 8, device="cuda")
    with pytest.raises(ValueError, match=r"query must be torch.float32, torch.float16 or .* on a GPU"):
        topk_dot(query.double(), items.double(), 2)
    with pytest.raises(ValueError, match="items must be on cuda:"):
        topk_dot(query, items.cpu(), 2)
    with pytest.raises(ValueError, match="valid must be on cuda:"):
        topk_dot(query, items, 2, valid=torch.ones(9, dtype=torch.bool))
    with pytest.raises(ValueError, match="exclude must be on cuda:"):
        topk_dot(query, items, 2, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="k must be 1 to the 9 items, got 10"):
        topk_dot(query, items, 10)


# l2norm_dot


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [20, 64])
def test_l2norm_dot(dtype: torch.dtype, dim: int) -> None:
    q, items, dout = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((8, dim), (23, dim), (8, 23)))

    def run(function: Callable[..., Tensor], q: Tensor, items: Tensor) -> tuple[Tensor, ...]:
        return gradients(lambda q, items: (function(q, items) * dout.to(q.dtype)).sum(), q, items)

    def product(q: Tensor, items: Tensor) -> Tensor:
        return unit(q) @ unit(items).t()

    assert_as_good_as_eager(l2norm_dot(q, items), product(q, items), product(q.double(), items.double()), 2)
    ours, exact, eager = run(l2norm_dot, q, items), run(product, q.double(), items.double()), run(product, q, items)
    for mine, theirs, truth in zip(ours[1:], eager[1:], exact[1:]):
        assert_as_good_as_eager(mine, theirs, truth, 3)


# in_batch_softmax_loss


class OnGpu(InBatch):
    """InBatch with everything on the GPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        for name, value in vars(self).items():
            setattr(self, name, value.cuda())

    def keep(self, *args: Any, **options: Any) -> Tensor:
        host = InBatch.__new__(InBatch)
        host.__dict__ = {name: value.cpu() for name, value in vars(self).items()}
        return host.keep(*args, **options).cuda()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.99])
@pytest.mark.parametrize("corrected", [False, True])
def test_in_batch(dtype: torch.dtype, sequences: bool, threshold: float | None, corrected: bool) -> None:
    problem = OnGpu(dtype)
    keep, log_q = problem.keep(True, sequences, threshold), problem.log_q if corrected else None
    options = {"similarity_threshold": threshold, "log_q": log_q}
    got = gradients(lambda q, i: problem.loss(q, i, sequences, **options), problem.query, problem.items)
    exact, eager = (
        gradients(
            lambda q, i: oracle_in_batch(q, i, keep, problem.positives, log_q),
            problem.query.to(d),
            problem.items.to(d),
        )
        for d in (torch.float64, dtype)
    )
    for mine, theirs, truth, factor in zip(got, eager, exact, (2, 3, 3)):
        assert_as_good_as_eager(mine, theirs, truth, factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(700, 900, 64), (1025, 2049, 40)])
def test_in_batch_of_many(dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, count, dim = shape
    query, items = (torch.randn(n, dim, device="cuda").to(dtype) for n in (rows, count))
    positives = torch.randint(count, (rows,), device="cuda")
    ids, log_q = torch.randint(count // 2, (count,), device="cuda"), torch.randn(count, device="cuda")
    keep = (ids != ids[positives].unsqueeze(1)) | (torch.arange(count, device="cuda") == positives.unsqueeze(1))

    def ours(q: Tensor, i: Tensor) -> Tensor:
        return in_batch_softmax_loss(q, i, ids, positives=positives, log_q=log_q, temperature=TEMPERATURE)

    got = gradients(ours, query, items)
    exact, eager = (
        gradients(lambda q, i: oracle_in_batch(q, i, keep, positives, log_q), query.to(d), items.to(d))
        for d in (torch.float64, dtype)
    )
    for mine, theirs, truth, factor in zip(got, eager, exact, (2, 3, 3)):
        assert_as_good_as_eager(mine, theirs, truth, factor)
    monkeypatch.setattr(similarity, "_GPU_TILE_COLS", 300)
    monkeypatch.setattr(similarity, "_GPU_TILE_ELEMENTS", 300 * 77)
    for mine, tiled in zip(got, gradients(ours, query, items)):
        assert_as_good_as_eager(tiled, tiled, mine.double(), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_batch_ids_of_every_value(dtype: torch.dtype) -> None:
    """Ids are compared as 64 bits, and never with sequences."""
    values = torch.tensor([0, -1, 1, 2**32, 2**32 + 1, -(2**63), 2**63 - 1, 7], device="cuda")
    query, items = (torch.randn(n, 64, device="cuda").to(dtype) for n in (200, 300))
    positives = torch.randint(300, (200,), device="cuda")
    ids, sequences, item_sequences = (values[torch.randint(8, (n,), device="cuda")] for n in (300, 200, 300))
    masked = (ids == ids[positives].unsqueeze(1)) | (item_sequences == sequences.unsqueeze(1))
    keep = ~masked | (torch.arange(300, device="cuda") == positives.unsqueeze(1))

    def ours(q: Tensor, i: Tensor) -> Tensor:
        options = {"positives": positives, "item_sequence_ids": item_sequences, "temperature": TEMPERATURE}
        return in_batch_softmax_loss(q, i, ids, sequences, **options)

    got = gradients(ours, query, items)
    exact, eager = (
        gradients(lambda q, i: oracle_in_batch(q, i, keep, positives), query.to(d), items.to(d))
        for d in (torch.float64, dtype)
    )
    for mine, theirs, truth, factor in zip(got, eager, exact, (2, 3, 3)):
        assert_as_good_as_eager(mine, theirs, truth, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_items_as_negatives_is_full_softmax(dtype: torch.dtype) -> None:
    query, table = (torch.randn(n, 16, device="cuda").to(dtype) for n in (40, 300))
    targets, everything = torch.randint(300, (40,), device="cuda"), torch.arange(300, device="cuda")
    expected = F.cross_entropy(unit(query.double()) @ unit(table.double()).t() / 0.05, targets).float()
    in_batch = in_batch_softmax_loss(query, table, everything, positives=targets)
    sampled = sampled_softmax_loss(query, table, targets, everything.expand(40, -1))
    for got in (in_batch, sampled):
        assert torch.allclose(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [None, 0.99])
def test_log_q_sign(dtype: torch.dtype, threshold: float | None) -> None:
    """One negative, drawn with probability q. Added with the wrong sign, a common one would raise the loss."""
    query, table = torch.ones(1, 8, dtype=dtype, device="cuda"), torch.eye(8, dtype=dtype, device="cuda")[:2]
    positive, ids = torch.tensor([0], device="cuda"), torch.arange(2, device="cuda")
    for q in (0.9, 0.1):
        log_q = torch.tensor([0.5, q], device="cuda").log()
        options: dict[str, Any] = {"log_q": log_q, "temperature": 1.0}
        in_batch = in_batch_softmax_loss(
            query, table, ids, positives=positive, similarity_threshold=threshold, **options
        )
        sampled = sampled_softmax_loss(query, table, positive, ids[1:].view(1, 1), **options)
        for loss in (in_batch, sampled):
            assert loss.item() == pytest.approx(math.log(1 + 0.5 / q), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_batch_of_permuted_items_and_in_order(dtype: torch.dtype) -> None:
    query, items = (torch.randn(700, 64, device="cuda").to(dtype) for _ in range(2))
    ids, sequences = torch.arange(700, device="cuda") % 650, torch.arange(700, device="cuda") // 3
    order = torch.randperm(700, device="cuda")
    whole = gradients(lambda q, i: in_batch_softmax_loss(q, i, ids, sequences), query, items)
    permuted = gradients(
        lambda q, i: in_batch_softmax_loss(q, i, ids[order], sequences[order]), query[order], items[order]
    )
    for a, b in zip(whole[1:], permuted[1:]):
        assert (a[order].float() - b.float()).norm() < 1e-2 * a.float().norm()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(lambda q, i: in_batch_softmax_loss(q, i, ids, sequences), query, items) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        for a, b in zip(runs[0], run):
            assert torch.equal(a, b)


def test_in_batch_of_nothing_of_one_and_of_nan() -> None:
    ids = torch.zeros(0, dtype=torch.long, device="cuda")
    assert in_batch_softmax_loss(torch.randn(0, 4, device="cuda"), torch.randn(0, 4, device="cuda"), ids) == 0
    one = in_batch_softmax_loss(*(torch.randn(1, 4, device="cuda") for _ in range(2)), torch.tensor([5], device="cuda"))
    assert one.abs() < 1e-6
    with pytest.raises(ValueError, match=r"items must have 1 to 2\^28 rows on a GPU, .* got 0"):
        in_batch_softmax_loss(
            torch.randn(2, 4, device="cuda"), torch.randn(0, 4, device="cuda"), ids, positives=ids[:0].new_zeros(2)
        )
    items = torch.randn(6, 4, device="cuda")
    items[5] = math.nan
    assert in_batch_softmax_loss(torch.randn(6, 4, device="cuda"), items, torch.arange(6, device="cuda")).isnan()


def test_in_batch_of_positives_out_of_range() -> None:
    """They cannot be checked without waiting for the GPU; nothing is read out of bounds."""
    query, items, ids = (torch.randn(4, 8, device="cuda"), torch.randn(5, 8, device="cuda"), torch.arange(5).cuda())
    positives = torch.tensor([0, -(2**62), 2**62, 5], device="cuda")
    in_batch_softmax_loss(query.requires_grad_(), items, ids, positives=positives).backward()
    torch.cuda.synchronize()


def test_in_batch_neither_waits_nor_is_uncapturable() -> None:
    query, items = (torch.randn(300, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    ids = torch.arange(300, device="cuda") % 250
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(in_batch_softmax_loss(query, items, ids), (query, items))

    with torch.cuda.stream(stream):
        expected = step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for x in captured:
        x.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    for mine, before in zip(captured, expected):
        assert torch.equal(mine, before)
