"""L2-normalised similarity: normalisation, exact top-k, sampled and in-batch softmax.

Matrix products run in torch, tile by tile into a buffer that stays in cache; what torch has no good primitive for is
in hstu_ext._C. In eager mode an op is one autograd Function; under torch.compile and torch.export, and for tensors that
are not plain, it is a custom op hstu_ext::<name>. Both run the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu_ext import _C
from hstu_ext.ops._shared import PLAIN, execution

_TILE_ROWS = 256  # queries of a tile of scores
_TILE_ELEMENTS = 1 << 18  # of a tile of scores: 1 MiB of float32 stays in a core's cache
_TILE_ITEM_ELEMENTS = 1 << 19  # of a tile of items that were normalised or converted
# On a GPU: few launches, tiles that stay in its L2 cache.
_GPU_TILE_COLS = 1 << 12
_GPU_TILE_ELEMENTS = 1 << 23
_GPU_TILE_ITEM_ELEMENTS = 1 << 24
_GPU_TOPK_ROWS = 2048  # queries that are served at once: each has its list of candidates
_SORTED_PAIRS = (1 << 31) - 1  # at once
_CHUNK_PAIRS = 128  # sorted pairs that a warp adds up


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Rows of unit length: x / max(|x|, eps) over the last dimension, differentiable in x.

    Args:
        x: [..., dim], float32, float64 (on the CPU), float16 or bfloat16; norms are summed in float32 (float64 for
            float64).
        eps: the least divisor, positive.

    Returns:
        [..., dim] in the dtype of x.

    Raises:
        TypeError, ValueError: an argument is not as above.
        MissingKernelError: x is on a GPU and this build has CPU kernels only.
    """
    _check_tensors("l2norm", x=x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"hstu_ext.l2norm: x must be [..., dim], got {list(x.shape)}")
    rows: Tensor = _l2norm(x.reshape(-1, x.shape[-1]), eps)
    return rows.view(x.shape)


def topk_dot(
    query: Tensor,
    items: Tensor,
    k: int,
    exclude: Tensor | tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items with the highest dot product for every query, exact, without the [B, N] scores.

    Scores are products in float32 (float64 for float64). Rows are sorted, the highest first, ties to the lower index. A
    row with fewer than k items left ends in value -inf and index -1; a score of -inf or NaN is never returned.

    Args:
        query: [B, D], float32, float64, float16 or bfloat16.
        items: [N, D], dtype of query.
        k: 1 to N.
        exclude: items not to return, by row: int64 [B, E], padded with -1, or the pair (int64 [total], int64 offsets
            [B + 1]) where row b's are values[offsets[b] : offsets[b + 1]].
        valid: bool [N]; False for items that are never returned.

    Returns:
        values [B, k], float32 (float64 for float64), and indices [B, k], int64. Not differentiable.

    Raises:
        TypeError, ValueError: an argument is not as above.
        MissingKernelError: a tensor is on a GPU and this build has CPU kernels only.
    """
    values, offsets = exclude if isinstance(exclude, tuple) else (exclude, None)
    _check_tensors("topk_dot", query=query, items=items)
    _check_optional("topk_dot", exclude=values, valid=valid)
    run = _topk if _is_plain(query, items, values, offsets, valid) else _topk_op
    query, items = (x.detach() if x.requires_grad else x for x in (query, items))
    return run(query, items, k, values, offsets, valid)


def l2norm_dot(q: Tensor, items: Tensor, eps: float = 1e-6) -> Tensor:
    """Cosine similarities q_i . items_j / (max(|q_i|, eps) max(|items_j|, eps)), differentiable in both.

    Items are normalised a tile at a time on their way into the product: there is no normalised copy of them.

    Args:
        q: [M, D], float32, float64, float16 or bfloat16.
        items: [N, D], dtype of q.
        eps: the least divisor, positive.

    Returns:
        [M, N] in the dtype of q, summed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is not as above.
        MissingKernelError: a tensor is on a GPU and this build has CPU kernels only.
    """
    _check_tensors("l2norm_dot", q=q, items=items)
    scores: Tensor = _dot(q, items, eps)
    return scores


def sampled_softmax_loss(
    query: Tensor,
    table: Tensor,
    pos_ids: Tensor,
    neg_ids: Tensor,
    temperature: float = 0.05,
    eps: float = 1e-6,
    log_q: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    sparse: bool = False,
) -> Tensor:
    """Softmax cross entropy of each query's positive against its own sampled negatives, on cosine similarity.

    With e_j the table's row of pos_ids[t] (j = 0) and of neg_ids[t, j - 1]:

        s_j = q . e_j / (max(|q|, eps) max(|e_j|, eps))
        l_j = s_j / temperature - log_q[id_j];  -5e4 for a negative whose id is pos_ids[t]
        loss_t = log sum_j exp(l_j) - l_0
        loss = sum_t weights_t loss_t / sum_t weights_t

    Rows of the table are read in place, forward and backward: there is no [T, K, D] tensor. Differentiable in query,
    table and weights; the gradients are the same bit for bit on every run and for any number of threads.

    Args:
        query: [T, D], float32, float64 (on the CPU), float16 or bfloat16.
        table: [V, D], dtype of query: the item embeddings.
        pos_ids: [T], int32 or int64, from 0 to V - 1. On a GPU, where they cannot be checked, one outside of the table
            stands for the nearest inside.
        neg_ids: [T, K], as pos_ids.
        temperature: positive.
        eps: the least divisor of the norms, positive.
        log_q: [V], the log of each item's probability of being sampled.
        weights: [T]; None for ones. The loss is 0 where they sum to 0.
        sparse: a sparse gradient of the table, as from torch.nn.Embedding(sparse=True), coalesced. Not under
            torch.compile. On a GPU the backward waits for the device then, to know how many items there are.

    Returns:
        The loss, a scalar in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is not as above.
        MissingKernelError: a tensor is on a GPU and this build has CPU kernels only.

    Source: the sampled softmax of Zhai et al., "Actions Speak Louder than Words" (ICML 2024); log q after Yi et al.,
    "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations" (RecSys 2019).
    """
    _check_tensors("sampled_softmax_loss", query=query, table=table, pos_ids=pos_ids, neg_ids=neg_ids)
    _check_optional("sampled_softmax_loss", log_q=log_q, weights=weights)
    if sparse and torch.compiler.is_compiling():
        raise ValueError("hstu_ext.sampled_softmax_loss: sparse must be False under torch.compile, got True")
    log_q = _compute(log_q, query)
    losses = _sampled(query, table, pos_ids, neg_ids, temperature, eps, log_q, sparse)[0]
    return _weighted_mean("sampled_softmax_loss", losses, weights)


def in_batch_softmax_loss(
    query: Tensor,
    items: Tensor,
    item_ids: Tensor,
    sequence_ids: Tensor | None = None,
    log_q: Tensor | None = None,
    similarity_threshold: float | None = None,
    *,
    positives: Tensor | None = None,
    item_sequence_ids: Tensor | None = None,
    temperature: float = 0.05,
    eps: float = 1e-6,
    weights: Tensor | None = None,
) -> Tensor:
    """Softmax cross entropy of each query's positive against all items of the batch, on cosine similarity.

    With p the place of query t's positive among the items, and cos the dot product over max(norm, eps) of both sides:

        l_j = cos(query_t, items_j) / temperature - log_q[j]
        loss_t = log sum_j exp(l_j) - l_p          over p itself and every j that no mask takes away
        loss = sum_t weights_t loss_t / sum_t weights_t

    A negative j is masked where item_ids[j] == item_ids[p], where item_sequence_ids[j] == sequence_ids[t], or where
    cos(items_p, items_j) > similarity_threshold. The masks carry no gradient. The logits exist only one tile at a time,
    forward and backward. Differentiable in query, items and weights.

    Args:
        query: [T, D], float32, float64, float16 or bfloat16.
        items: [X, D], dtype of query.
        item_ids: [X], integer.
        sequence_ids: [T], integer, the sequence that each query belongs to.
        log_q: [X], the log of each item's probability of being in a batch.
        similarity_threshold: cosine above which an item counts as the positive's duplicate.
        positives: [T], integer places of the positives among the items; None where query t's positive is item t.
        item_sequence_ids: [X], integer; None, where positives is None, for sequence_ids.
        temperature: positive.
        eps: the least divisor of the norms, positive.
        weights: [T]; None for ones. The loss is 0 where they sum to 0.

    Returns:
        The loss, a scalar in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is not as above.
        MissingKernelError: a tensor is on a GPU and this build has CPU kernels only.

    Source: Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations" (RecSys 2019).
    """
    op = "in_batch_softmax_loss"
    _check_tensors(op, query=query, items=items, item_ids=item_ids)
    _check_optional(op, log_q=log_q, weights=weights)
    if positives is None:
        if query.shape[:1] != items.shape[:1]:
            raise ValueError(
                f"hstu_ext.{op}: positives must be given where query and items differ in rows, got None with "
                f"{list(query.shape)} and {list(items.shape)}"
            )
        positives = torch.arange(query.shape[0], device=query.device)
        item_sequence_ids = sequence_ids if item_sequence_ids is None else item_sequence_ids
    if (sequence_ids is None) != (item_sequence_ids is None):
        missing, given = ("sequence_ids", "item_sequence_ids")
        if sequence_ids is not None:
            missing, given = given, missing
        raise ValueError(f"hstu_ext.{op}: {missing} must be given where {given} is, got None")
    ids = (_int64(op, "item_ids", item_ids), _int64(op, "positives", positives))
    sequences = (
        None if sequence_ids is None else _int64(op, "sequence_ids", sequence_ids),
        None if item_sequence_ids is None else _int64(op, "item_sequence_ids", item_sequence_ids),
    )
    log_q = _compute(log_q, query)
    losses = _in_batch(query, items, *ids, *sequences, log_q, temperature, similarity_threshold, eps)[0]
    return _weighted_mean(op, losses, weights)


def _check_tensors(op: str, **tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"hstu_ext.{op}: {name} must be a tensor, got {type(value).__name__}")


def _check_optional(op: str, **tensors: object) -> None:
    _check_tensors(op, **{name: value for name, value in tensors.items() if value is not None})


def _int64(op: str, name: str, x: Tensor) -> Tensor:
    _check_tensors(op, **{name: x})
    if x.is_floating_point() or x.dtype == torch.bool:
        raise ValueError(f"hstu_ext.{op}: {name} must be integers, got {x.dtype}")
    return x.to(torch.int64).contiguous()


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _compute(x: Tensor | None, model: Tensor) -> Tensor | None:
    return None if x is None else x.detach().to(_compute_dtype(model)).contiguous()


def _weighted_mean(op: str, losses: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return losses.mean() if losses.shape[0] > 0 else losses.sum()
    if weights.shape != losses.shape:
        raise ValueError(f"hstu_ext.{op}: weights must be {list(losses.shape)}, got {list(weights.shape)}")
    weights = weights.to(losses.dtype)
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total == 0, 1, total)


def _is_plain(*values: object) -> bool:
    """Whether _C can read the tensors and autograd needs no help from torch.library."""
    if torch.compiler.is_compiling():
        return False
    return all(type(value) in PLAIN for value in values if isinstance(value, Tensor))


def _by_library(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """A custom op that plain tensors go past: it would cost them several times what they pay."""
    op = torch.library.custom_op(f"hstu_ext::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return lambda *args: (run if _is_plain(*args) else op)(*args)


def _differentiable(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """One op in its two forms, an autograd Function and a custom op, and the choice between them."""
    op = torch.library.custom_op(f"hstu_ext::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    body = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    function: Any = type(name, (torch.autograd.Function,), body)

    def call(*args: Any) -> Any:
        if not _is_plain(*args):
            return op(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return function.apply(*args)
        return run(*args)

    return call


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps every input, and the outputs given. Only an op's first output has a gradient."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *outputs)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    tensors, count = ctx.saved_tensors, len(ctx.others)
    return [other if x is None else x for x, other in zip(tensors, ctx.others)], tensors[count:]


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    """Contiguous in the last dimension, as kernels want rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _factor_dtype(x: Tensor) -> torch.dtype:
    """Of the factors of a product: a GPU multiplies half precision at full speed and still sums in float32."""
    return x.dtype if x.is_cuda else _compute_dtype(x)


def _unit(x: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Normalised rows, factors of a product."""
    x = _rows(x.to(_factor_dtype(x)))
    out = _empty_like(x) if out is None else out
    _C.l2norm(x, out, eps, *execution(x))
    return out


def _unit_backward(dout: Tensor, x: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """The gradient of x, in its dtype, from that of its normalised rows, which may be wider."""
    out = _empty_like(x) if out is None else out
    if x.is_cuda:
        _C.l2norm_backward(dout, _rows(x), out, eps, *execution(x))
        return out
    wide = _rows(x.to(dout.dtype))
    dx = out if out.dtype == dout.dtype else _empty_like(wide)
    _C.l2norm_backward(dout, wide, dx, eps, *execution(x))
    return dx if dx is out else out.copy_(dx)


def _spans(total: int, step: int) -> Iterator[slice]:
    for begin in range(0, total, step):
        yield slice(begin, min(total, begin + step))


def _tile_shape(rows: int, cols: int, is_cuda: bool) -> tuple[int, int]:
    if is_cuda:
        tile_cols = max(1, min(cols, _GPU_TILE_COLS))
        return max(1, min(rows, _GPU_TILE_ELEMENTS // tile_cols)), tile_cols
    tile_rows = max(1, min(rows, _TILE_ROWS))
    return tile_rows, max(1, min(cols, _TILE_ELEMENTS // tile_rows))


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b, summed in float32 (float64 for float64) and given in out's dtype, which may be wider."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):  # since torch 2.8
        wide: Tensor = torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        return wide
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool = False) -> None:
    """total += a b, or = where it is the first; total may be wider."""
    if is_first:
        _product(a, b, total)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


# l2norm


def _l2norm_run(x: Tensor, eps: float) -> Tensor:
    out = _empty_like(x)
    _C.l2norm(_rows(x), out, eps, *execution(x))
    return out


def _l2norm_backward_run(dout: Tensor, x: Tensor, eps: float) -> Tensor:
    dx = _empty_like(x)
    _C.l2norm_backward(_rows(dout), _rows(x), dx, eps, *execution(x))
    return dx


_l2norm_backward = _by_library(
    "l2norm_backward",
    "(Tensor dout, Tensor x, float eps) -> Tensor",
    _l2norm_backward_run,
    lambda dout, x, eps: _empty_like(x),
)


def _l2norm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.eps = inputs[1]


def _l2norm_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return _l2norm_backward(dout, *ctx.saved_tensors, ctx.eps), None


_l2norm = _differentiable(
    "l2norm",
    "(Tensor x, float eps) -> Tensor",
    _l2norm_run,
    lambda x, eps: _empty_like(x),
    _l2norm_save,
    _l2norm_gradient,
)


# topk_dot


def _sorted_exclusions(
    exclude: Tensor | None, offsets: Tensor | None, batch: int
) -> tuple[Tensor | None, Tensor | None]:
    """Every row's excluded items in ascending order, and where the rows begin."""
    if exclude is None:
        return None, None
    if offsets is None:
        offsets = torch.arange(batch + 1, device=exclude.device) * exclude.shape[1]
        return exclude.sort(dim=1).values.view(-1), offsets
    # The row of every value; on a GPU, where offsets are not checked, whatever they hold.
    row = torch.searchsorted(offsets[1:], torch.arange(exclude.shape[0], device=exclude.device), right=True)
    values, by_value = exclude.sort()
    return values[row[by_value].sort(stable=True).indices], offsets


def _topk(
    query: Tensor, items: Tensor, k: int, exclude: Tensor | None, offsets: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    exclude = None if exclude is None else exclude.contiguous()
    _C.topk_check(query, items, k, exclude, offsets, valid)
    batch, count, threads = query.shape[0], items.shape[0], torch.get_num_threads()
    excluded, offsets = _sorted_exclusions(exclude, offsets, batch)
    if query.is_cuda:
        return _topk_on_gpu(query, items, k, excluded, offsets, valid)
    query = query.to(_compute_dtype(query))
    tile_rows, tile_cols = _tile_shape(batch, count, False)
    wide = None
    if items.dtype != query.dtype:
        tile_cols = max(1, min(tile_cols, _TILE_ITEM_ELEMENTS // items.shape[1]))
        wide = query.new_empty((tile_cols, items.shape[1]))
    scores = query.new_empty((tile_rows, tile_cols))
    # Twice the k that are kept, so that a selection is paid for by k new candidates.
    capacity = min(count, max(2 * k, k + 64))
    kept = query.new_empty((batch, 2 * capacity), dtype=torch.int64)
    counts = query.new_zeros(batch, dtype=torch.int64)
    thresholds = query.new_empty(batch).fill_(-math.inf)
    for cols in _spans(count, tile_cols):
        part = items[cols]
        if wide is not None:
            part = wide[: part.shape[0]].copy_(part)
        for rows in _spans(batch, tile_rows):
            tile = scores[: rows.stop - rows.start, : part.shape[0]]
            torch.mm(query[rows], part.t(), out=tile)
            starts = None if offsets is None else offsets[rows.start : rows.stop + 1]
            _C.topk_merge(
                tile, cols.start, kept[rows], counts[rows], thresholds[rows], excluded, starts, valid, k, threads
            )
    values, indices = query.new_empty((batch, k)), query.new_empty((batch, k), dtype=torch.int64)
    _C.topk_finish(kept, counts, values, indices, threads)
    return values, indices


def _topk_on_gpu(
    query: Tensor, items: Tensor, k: int, excluded: Tensor | None, offsets: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """excluded is sorted within rows."""
    batch = query.shape[0]
    values = query.new_empty((batch, k), dtype=torch.float32)
    indices = query.new_empty((batch, k), dtype=torch.int64)
    if 0 < batch <= _GPU_TOPK_ROWS:  # small calls are as fast as the host
        _topk_of_part(query, items, k, excluded, offsets, valid, values, indices)
        return values, indices
    for rows in _spans(batch, _GPU_TOPK_ROWS):
        starts = None if offsets is None else offsets[rows.start : rows.stop + 1]
        _topk_of_part(query[rows], items, k, excluded, starts, valid, values[rows], indices[rows])
    return values, indices


def _topk_of_part(
    query: Tensor,
    items: Tensor,
    k: int,
    excluded: Tensor | None,
    offsets: Tensor | None,
    valid: Tensor | None,
    values: Tensor,
    indices: Tensor,
) -> None:
    """In half precision the scores stay inside of one kernel (topk_scan)."""
    (batch, dim), count, capacity = query.shape, items.shape[0], _C.topk_capacity(k)
    if capacity == 0:
        best, places = _topk_by_sorting(query, items, k, excluded, offsets, valid)
        values.copy_(best)
        indices.copy_(places)
        return
    scratch = query.new_empty(batch * (capacity + 2), dtype=torch.int64)
    state = (scratch, values, indices, *execution(query))
    arguments: tuple[Any, ...] = (query, items, k, excluded, offsets, valid, *state)
    if query.dtype != torch.float32 and _C.topk_scan(*arguments):
        return
    query, step = query.float(), max(1, _GPU_TILE_ELEMENTS // batch)
    if items.dtype != query.dtype:
        step = max(1, min(step, _GPU_TILE_ITEM_ELEMENTS // dim))
    buffer = None if count <= step else query.new_empty((batch, step))
    for cols in _spans(count, step):
        part = items if buffer is None else items[cols]
        out = None if buffer is None else buffer[:, : part.shape[0]]
        scores = torch.mm(query, part.float().t(), out=out)
        arguments = (query, items, k, excluded, offsets, valid, scores, cols.start, cols.stop == count, *state)
        _C.topk_merge_scores(*arguments)


def _topk_by_sorting(
    query: Tensor, items: Tensor, k: int, excluded: Tensor | None, offsets: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For a k beyond the kernels: torch.topk of 64-bit keys, the score in order above the complement of the index."""
    query, count, none = query.float(), items.shape[0], torch.iinfo(torch.int64).min
    row = None
    if excluded is not None and offsets is not None:
        row = torch.searchsorted(offsets[1:], torch.arange(excluded.shape[0], device=query.device), right=True)
        row_is_here = (row < query.shape[0]) & (torch.arange(excluded.shape[0], device=query.device) >= offsets[0])
        row = row.clamp(max=query.shape[0] - 1)
    best = query.new_empty((query.shape[0], 0), dtype=torch.int64)
    for cols in _spans(count, max(k, _GPU_TILE_ELEMENTS // max(1, query.shape[0]))):
        scores = torch.mm(query, items[cols].float().t()) + 0.0  # -0 becomes 0
        bits = scores.view(torch.int32)
        ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long()
        index = torch.arange(cols.start, cols.stop, device=query.device)
        keys = ordered << 32 | (0xFFFFFFFF - index)
        keys.masked_fill_(~(scores > -math.inf), none)
        if valid is not None:
            keys.masked_fill_(~valid[cols], none)
        if excluded is not None and row is not None:
            here = row_is_here & (excluded >= cols.start) & (excluded < cols.stop)
            keys = torch.cat([keys, keys.new_empty((keys.shape[0], 1))], 1)  # the last column takes what is elsewhere
            keys[row, torch.where(here, excluded - cols.start, keys.shape[1] - 1)] = none
            keys = keys[:, :-1]
        keys = torch.cat([best, keys], 1)
        best = keys.topk(min(k, keys.shape[1]), 1).values
    found = best > none
    ordered = (best >> 32).int()
    scores = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).view(torch.float32)
    return torch.where(found, scores, -math.inf), torch.where(found, 0xFFFFFFFF - (best & 0xFFFFFFFF), -1)


def _topk_fake(query: Tensor, items: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=_compute_dtype(query)), query.new_empty(shape, dtype=torch.int64)


_topk_op: Callable[..., tuple[Tensor, Tensor]] = torch.library.custom_op(
    "hstu_ext::topk_dot",
    _topk,
    mutates_args=(),
    schema="(Tensor query, Tensor items, SymInt k, Tensor? exclude, Tensor? exclude_offsets, Tensor? valid) "
    "-> (Tensor, Tensor)",
)
torch.library.register_fake("hstu_ext::topk_dot", _topk_fake)


# sampled_softmax_loss


def _sampled_run(
    query: Tensor,
    table: Tensor,
    pos_ids: Tensor,
    neg_ids: Tensor,
    temperature: float,
    eps: float,
    log_q: Tensor | None,
    sparse: bool,
) -> tuple[Tensor, ...]:
    """Loss [T] and what the backward needs of every row and of every pair.

    On the CPU that is the log-sum-exp [T] and the similarities [T, K + 1]. On a GPU it is the gradients of loss_t: with
    respect to query_t [T, D], and to the similarities, over max(|query_t|, eps), [T, K + 1].
    """
    outputs = _sampled_fake(query, table, pos_ids, neg_ids)
    inputs = (_rows(query), _rows(table), pos_ids.contiguous(), neg_ids.contiguous(), temperature, eps, log_q)
    _C.sampled_softmax_forward(*inputs, *outputs, *execution(query))
    return outputs


def _sampled_fake(
    query: Tensor, table: Tensor, pos_ids: Tensor, neg_ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = query.new_empty(query.shape[:1], dtype=_compute_dtype(query))
    of_rows = loss.new_empty(query.shape) if query.is_cuda else _empty_like(loss)
    return loss, of_rows, loss.new_empty((query.shape[0], neg_ids.shape[-1] + 1))


def _sampled_backward_run(
    args: tuple[Any, ...], sparse: bool, want_query: bool, want_table: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of query and table; args are those of the custom op below."""
    dloss, of_rows, of_pairs, query, table, pos_ids, neg_ids, temperature, eps, log_q = args
    dloss = dloss.contiguous()
    inputs = (_rows(query), _rows(table), pos_ids.contiguous(), neg_ids.contiguous(), temperature, eps, log_q)
    if query.is_cuda:
        dquery = torch.mul(of_rows, dloss.unsqueeze(1), out=_empty_like(query)) if want_query else None
        return dquery, _sampled_table_gradient(inputs, dloss, of_pairs, sparse) if want_table else None
    threads = torch.get_num_threads()
    dquery = _empty_like(query) if want_query else None
    weight = _empty_like(of_pairs)
    unit_query = query.new_empty(query.shape, dtype=of_pairs.dtype)
    gradients = (dloss, of_rows, of_pairs, weight, unit_query, dquery)
    _C.sampled_softmax_backward_query(*inputs, *gradients, threads)
    if not want_table:
        return dquery, None
    starts = query.new_empty(table.shape[0] + 1, dtype=torch.int64)
    order = query.new_empty(of_pairs.numel(), dtype=torch.int64)
    _C.sampled_softmax_group(*inputs, starts, order)
    ids = starts.diff().nonzero().view(-1) if sparse else None
    dtable = table.new_zeros(table.shape if ids is None else (ids.numel(), table.shape[1]))
    _C.sampled_softmax_backward_table(*inputs, *gradients, starts, order, ids, dtable, threads)
    return dquery, dtable if ids is None else _sparse_rows(ids, dtable, table)


def _sparse_rows(ids: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(ids.unsqueeze(0), rows, table.shape, check_invariants=False, is_coalesced=True)


def _sampled_table_gradient(inputs: tuple[Any, ...], dloss: Tensor, dsimilarity: Tensor, sparse: bool) -> Tensor:
    """On a GPU: a sort of the pairs by item, and a sum over each item's. More pairs than can be sorted go in parts."""
    query, table, pos_ids, neg_ids, *rest = inputs
    total = None
    for rows in _spans(max(1, query.shape[0]), max(1, _SORTED_PAIRS // dsimilarity.shape[1])):
        part = (query[rows], table, pos_ids[rows], neg_ids[rows], *rest)
        dtable = _sampled_table_part(part, dloss[rows], dsimilarity[rows], sparse)
        total = dtable if total is None else total + dtable
        total = total.coalesce() if sparse else total
    assert total is not None
    return total


def _sampled_table_part(inputs: tuple[Any, ...], dloss: Tensor, dsimilarity: Tensor, sparse: bool) -> Tensor:
    query, table = inputs[:2]
    pairs, dtype = dsimilarity.numel(), torch.int32
    buffers = [query.new_empty(pairs, dtype=dtype) for _ in range(4)]
    scratch = query.new_empty(-(-_C.sampled_softmax_sort_bytes(pairs, table.shape[0]) // 8), dtype=torch.int64)
    arguments: tuple[Any, ...] = (*inputs, *buffers, scratch, *execution(query))
    half = _C.sampled_softmax_sort(*arguments)
    items, order = buffers[half], buffers[2 + half]
    del buffers, scratch, arguments
    ids = pair_rows = None
    if sparse:
        ids, pair_rows = items.unique_consecutive(return_inverse=True)
        ids = ids.to(torch.int64)
    shape = table.shape if ids is None else (ids.numel(), table.shape[1])
    partial = dsimilarity.new_empty((2 * -(-items.numel() // _CHUNK_PAIRS), table.shape[1]))
    sums = dsimilarity.new_zeros(shape)
    dtable = sums if table.dtype == sums.dtype else table.new_empty(shape)
    gradient = (dloss, dsimilarity, items, order, pair_rows, ids, _CHUNK_PAIRS, partial, sums, dtable)
    arguments = (*inputs, *gradient, *execution(query))
    _C.sampled_softmax_table(*arguments)
    return dtable if ids is None else _sparse_rows(ids, dtable, table)


_sampled_backward = torch.library.custom_op(
    "hstu_ext::sampled_softmax_backward",
    lambda *args: _sampled_backward_run(args, sparse=False, want_query=True, want_table=True),
    mutates_args=(),
    schema="(Tensor dloss, Tensor of_rows, Tensor of_pairs, Tensor query, Tensor table, Tensor pos_ids, "
    "Tensor neg_ids, float temperature, float eps, Tensor? log_q) -> (Tensor, Tensor)",
)


@_sampled_backward.register_fake
def _(dloss: Tensor, of_rows: Tensor, of_pairs: Tensor, query: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _empty_like(query), _empty_like(table)


def _sampled_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output[1:])


def _sampled_gradient(ctx: Any, dloss: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    (*inputs, sparse), outputs = _saved(ctx)
    want_query, want_table = ctx.needs_input_grad[:2]
    gradients: tuple[Tensor | None, Tensor | None] = (None, None)
    if dloss is not None:
        if _is_plain(dloss):
            gradients = _sampled_backward_run((dloss, *outputs, *inputs), sparse, want_query, want_table)
        else:
            gradients = _sampled_backward(dloss, *outputs, *inputs)
    return *gradients, *(None,) * 6


_sampled = _differentiable(
    "sampled_softmax",
    "(Tensor query, Tensor table, Tensor pos_ids, Tensor neg_ids, float temperature, float eps, Tensor? log_q, "
    "bool sparse) -> (Tensor, Tensor, Tensor)",
    _sampled_run,
    _sampled_fake,
    _sampled_save,
    _sampled_gradient,
)


# l2norm_dot


def _dot_tile_shape(q: Tensor, items: Tensor, is_direct: bool = False) -> tuple[int, int]:
    """Tiles as wide as the items of one may be: the scores are written once, so only the items need the cache.

    is_direct: the product writes the result itself.
    """
    if q.is_cuda:
        return max(1, q.shape[0]), max(1, min(items.shape[0], _GPU_TILE_ITEM_ELEMENTS // items.shape[1]))
    cols = max(1, min(items.shape[0], (4 if is_direct else 1) * _TILE_ITEM_ELEMENTS // items.shape[1]))
    return max(1, min(q.shape[0], 4 * _TILE_ELEMENTS // cols)), cols


def _tiles_of_units(items: Tensor, step: int, eps: float) -> Iterator[tuple[slice, Tensor]]:
    """The normalised rows of one tile after the other, in one buffer."""
    buffer = items.new_empty((step, items.shape[1]), dtype=_factor_dtype(items))
    for cols in _spans(items.shape[0], step):
        yield cols, _unit(items[cols], eps, out=buffer[: cols.stop - cols.start])


def _dot_run(q: Tensor, items: Tensor, eps: float) -> Tensor:
    _C.l2norm_dot_check(q, items, eps)
    is_direct = q.dtype == _factor_dtype(q)
    rows_step, cols_step = _dot_tile_shape(q, items, is_direct)
    unit_q, out = _unit(q, eps), q.new_empty((q.shape[0], items.shape[0]))
    if not out.is_cuda:
        _C.prefer_large_pages(out)
    wide = None if is_direct else unit_q.new_empty((rows_step, cols_step))
    for cols, unit_items in _tiles_of_units(items, cols_step, eps):
        if wide is None:
            torch.mm(unit_q, unit_items.t(), out=out[:, cols])
            continue
        for rows in _spans(q.shape[0], rows_step):
            tile = wide[: rows.stop - rows.start, : cols.stop - cols.start]
            out[rows, cols] = torch.mm(unit_q[rows], unit_items.t(), out=tile)
    return out


def _dot_fake(q: Tensor, items: Tensor, eps: float) -> Tensor:
    return q.new_empty((q.shape[0], items.shape[0]))


def _dot_backward_run(dout: Tensor, q: Tensor, items: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows_step, cols_step = _dot_tile_shape(q, items)
    unit_q, ditems = _unit(q, eps), _empty_like(items)
    dunit_q = torch.zeros_like(unit_q, dtype=_compute_dtype(q))
    for cols, unit_items in _tiles_of_units(items, cols_step, eps):
        dunit_items = unit_items.new_empty(unit_items.shape, dtype=dunit_q.dtype)
        for rows in _spans(q.shape[0], rows_step):
            tile = dout[rows, cols].to(unit_q.dtype)
            _add_product(dunit_q[rows], tile, unit_items)
            _add_product(dunit_items, tile.t(), unit_q[rows], is_first=rows.start == 0)
        _unit_backward(dunit_items, items[cols], eps, out=ditems[cols])
    return _unit_backward(dunit_q, q, eps), ditems if q.shape[0] > 0 else ditems.zero_()


_dot_backward = _by_library(
    "l2norm_dot_backward",
    "(Tensor dout, Tensor q, Tensor items, float eps) -> (Tensor, Tensor)",
    _dot_backward_run,
    lambda dout, q, items, eps: (_empty_like(q), _empty_like(items)),
)


def _dot_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


def _dot_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
    dq, ditems = _dot_backward(dout, *ctx.saved_tensors, ctx.eps)
    return dq, ditems, None


_dot = _differentiable(
    "l2norm_dot", "(Tensor q, Tensor items, float eps) -> Tensor", _dot_run, _dot_fake, _dot_save, _dot_gradient
)


# in_batch_softmax_loss


def _in_batch_tiles(
    query: Tensor, items: Tensor, positives: Tensor, threshold: float | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Products of queries with items and, for the threshold, of their positives with items; in two buffers."""
    rows_step, cols_step = _tile_shape(query.shape[0], items.shape[0], query.is_cuda)
    dtype = _compute_dtype(query)
    buffers = [query.new_empty((rows_step, cols_step), dtype=dtype) for _ in range(1 if threshold is None else 2)]
    for rows in _spans(query.shape[0], rows_step):
        sides = [query[rows]]
        if threshold is not None:
            sides.append(items[positives[rows].clamp(0, max(0, items.shape[0] - 1))])
        for cols in _spans(items.shape[0], cols_step):
            tiles = []
            for side, buffer in zip(sides, buffers):
                tile = buffer[: rows.stop - rows.start, : cols.stop - cols.start]
                tiles.append(_product(side, items[cols].t(), tile))
            yield rows, cols, tiles[0], tiles[1] if len(tiles) > 1 else None


def _in_batch_is_fused(query: Tensor, items: Tensor, threshold: float | None) -> bool:
    """Whether the logits stay inside of kernels: half precision on a GPU, without near-duplicates."""
    return threshold is None and query.is_cuda and query.numel() > 0 and _C.in_batch_fused_splits(query, items) > 0


def _in_batch_records(inputs: tuple[Any, ...], eps: float) -> tuple[Tensor, Tensor]:
    """What a GPU's kernels ask of queries and items besides their rows (sm80/in_batch_records.h); else empty."""
    query, items, item_ids, _, sequence_ids = inputs[:5]
    if not query.is_cuda:
        return item_ids.new_empty((0, 4), dtype=torch.int32), item_ids.new_empty((0, 4), dtype=torch.int32)
    records = tuple(x.new_empty((x.shape[0], 4), dtype=torch.int32) for x in (query, items))
    ids = items.shape[0] if sequence_ids is None else 2 * items.shape[0] + query.shape[0]
    slots = item_ids.new_zeros(1 << (2 * ids).bit_length())
    arguments: tuple[Any, ...] = (*inputs, *records, eps, slots, *execution(query))
    _C.in_batch_softmax_records(*arguments)
    return records[0], records[1]


def _in_batch_fused_run(inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """inputs with the records."""
    query, items = inputs[:2]
    maximum, total = query.new_empty((2, _C.in_batch_fused_splits(query, items), query.shape[0]), dtype=torch.float32)
    positive_logit, loss, lse = query.new_empty((3, query.shape[0]), dtype=torch.float32)
    arguments: tuple[Any, ...] = (*inputs, maximum, total, positive_logit, loss, lse, *execution(query))
    _C.in_batch_fused_forward(*arguments)
    return loss, lse


def _in_batch_fused_backward(dloss: Tensor, lse: Tensor, inputs: tuple[Any, ...], eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of the unit rows; inputs with the records."""
    units = [_unit(x, eps) for x in inputs[:2]]
    gradients = []
    for of_items, (unit, other) in enumerate((units, units[::-1])):
        gradient = torch.zeros_like(unit, dtype=torch.float32)
        # Several blocks add to one row's gradient in any order, unless that must not be.
        is_ordered = torch.are_deterministic_algorithms_enabled()
        splits = 1 if is_ordered else _C.in_batch_fused_splits(unit, other)
        arguments: tuple[Any, ...] = (*units, *inputs[2:], dloss, lse, gradient, of_items, splits)
        arguments += execution(unit)
        _C.in_batch_fused_backward(*arguments)
        gradients.append(gradient)
    return gradients[0], gradients[1]


def _in_batch_run(
    query: Tensor,
    items: Tensor,
    item_ids: Tensor,
    positives: Tensor,
    sequence_ids: Tensor | None,
    item_sequence_ids: Tensor | None,
    log_q: Tensor | None,
    temperature: float,
    threshold: float | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Loss [T], and for the backward the log-sum-exp [T] and on a GPU the records."""
    inputs = (query, items, item_ids, positives, sequence_ids, item_sequence_ids, log_q, temperature)
    _C.in_batch_softmax_check(*inputs, None, None, eps)
    inputs = (_rows(query), _rows(items), *inputs[2:])
    records = _in_batch_records(inputs, eps)
    if _in_batch_is_fused(*inputs[:2], threshold):
        return *_in_batch_fused_run((*inputs, *records)), *records
    left, right = inputs[:2] if query.is_cuda else (_unit(query, eps), _unit(items, eps))
    positive_logit, maximum, total = query.new_empty((3, query.shape[0]), dtype=_compute_dtype(query))
    maximum.fill_(-math.inf)
    total.zero_()
    of_tiles = (*inputs, *(records if query.is_cuda else (None, None)))
    for rows, cols, tile, duplicate in _in_batch_tiles(left, right, positives, threshold):
        where = (tile, duplicate, rows.start, cols.start, threshold or 0.0)
        arguments: tuple[Any, ...] = (*of_tiles, *where, maximum, total, positive_logit, *execution(query))
        _C.in_batch_softmax_forward(*arguments)
    lse = maximum + total.log()
    return lse - positive_logit, lse, *records


def _in_batch_fake(query: Tensor, items: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    loss = query.new_empty(query.shape[:1], dtype=_compute_dtype(query))
    counts = (query.shape[0], items.shape[0]) if query.is_cuda else (0, 0)
    return loss, _empty_like(loss), *(query.new_empty((count, 4), dtype=torch.int32) for count in counts)


_IN_BATCH_INPUTS = (
    "Tensor query, Tensor items, Tensor item_ids, Tensor positives, Tensor? sequence_ids, Tensor? item_sequence_ids, "
    "Tensor? log_q, float temperature, float? threshold, float eps"
)


def _in_batch_backward_run(
    dloss: Tensor, lse: Tensor, query_records: Tensor, item_records: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    query, items, *others, threshold, eps = args
    query, items, positives = _rows(query), _rows(items), others[1]
    inputs = (query, items, *others, *((query_records, item_records) if query.is_cuda else (None, None)))
    # Gradients of a mean over many rows would underflow in float16.
    is_narrow = query.is_cuda and query.dtype == torch.float16 and dloss.numel() > 0
    scale = 1024 / dloss.abs().amax().clamp(min=1e-30) if is_narrow else None
    dloss = dloss.contiguous() if scale is None else dloss * scale
    if _in_batch_is_fused(query, items, threshold):
        dunit_query, dunit_items = _in_batch_fused_backward(dloss, lse, inputs, eps)
    else:
        unit_query, unit_items = _unit(query, eps), _unit(items, eps)
        left, right = (query, items) if query.is_cuda else (unit_query, unit_items)
        dunit_query, dunit_items = (torch.zeros_like(x, dtype=lse.dtype) for x in (unit_query, unit_items))
        for rows, cols, tile, duplicate in _in_batch_tiles(left, right, positives, threshold):
            where = (tile, duplicate, rows.start, cols.start, threshold or 0.0)
            arguments: tuple[Any, ...] = (*inputs, *where, dloss, lse, *execution(query))
            _C.in_batch_softmax_backward(*arguments)
            if tile.dtype != unit_query.dtype:  # narrower gradients, each row in the front of its own memory
                tile = tile.view(unit_query.dtype)[:, : cols.stop - cols.start]
            _add_product(dunit_query[rows], tile, unit_items[cols])
            _add_product(dunit_items[cols], tile.t(), unit_query[rows])
    if scale is not None:
        dunit_query, dunit_items = dunit_query.div_(scale), dunit_items.div_(scale)
    return _unit_backward(dunit_query, query, eps), _unit_backward(dunit_items, items, eps)


_in_batch_backward = _by_library(
    "in_batch_softmax_backward",
    f"(Tensor dloss, Tensor lse, Tensor query_records, Tensor item_records, {_IN_BATCH_INPUTS}) -> (Tensor, Tensor)",
    _in_batch_backward_run,
    lambda dloss, lse, of_queries, of_items, query, items, *rest: (_empty_like(query), _empty_like(items)),
)


def _in_batch_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output[1:])


def _in_batch_gradient(ctx: Any, dloss: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, outputs = _saved(ctx)
    gradients: tuple[Tensor | None, ...] = (None, None)
    if dloss is not None:
        gradients = _in_batch_backward(dloss, *outputs, *inputs)
    return *gradients, *(None,) * 8


_in_batch = _differentiable(
    "in_batch_softmax",
    f"({_IN_BATCH_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _in_batch_run,
    _in_batch_fake,
    _in_batch_save,
    _in_batch_gradient,
)
