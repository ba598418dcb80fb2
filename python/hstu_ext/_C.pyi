from collections.abc import Sequence
from typing import Literal, TypedDict, overload

from torch import Tensor

class MissingKernelError(RuntimeError):
    """The kernel that a call needs was not compiled into this build."""

class MisalignedError(ValueError):
    """A GPU tensor's rows are not 16-byte aligned; the ops catch this and try again with copies."""

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cuda: str  # version of nvcc; empty: CPU kernels only
    cutlass: str
    archs: list[str]  # "80", ...
    set: str  # "ci", "default" or "full"
    cpu_variants: list[str]  # instruction sets of the CPU kernels
    cpu_variant: str  # the one in use

def build_info() -> BuildInfo:
    """Versions, architectures and the kernel set of this build."""

def cells() -> list[str]:
    """Names of the GPU kernels in this build, such as attn_fwd_sm80_bf16_d64_window."""

def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rab: Tensor | None,
    position_table: Tensor | None,
    time_table: Tensor | None,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_contexts: Tensor | None,
    num_targets: Tensor | None,
    target_group_size: int,
    window_left: int,
    window_right: int,
    alpha: float,
    func: Tensor | None,
    scaling_seqlen: int,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    stream: int,
    num_threads: int,
    /,
) -> None: ...
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rab: Tensor | None,
    position_table: Tensor | None,
    time_table: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    drab: Tensor | None,
    dposition: Tensor | None,
    dtime: Tensor | None,
    dq_accum: Tensor | None,
    table_accum: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_contexts: Tensor | None,
    num_targets: Tensor | None,
    target_group_size: int,
    window_left: int,
    window_right: int,
    alpha: float,
    func: Tensor | None,
    scaling_seqlen: int,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    deterministic: bool,
    stream: int,
    num_threads: int,
    /,
) -> None: ...
def attention_backward_scratch(
    q: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_seqlen_k: int, deterministic: bool, /
) -> int:
    """Elements of dq_accum that attention_backward wants unless it is deterministic; 0 for none."""

def attention_table_scratch(dposition: Tensor | None, dtime: Tensor | None, /) -> int:
    """Zeroed int64 elements of table_accum that attention_backward wants on a GPU; 0 for none."""

# Calls of the jagged ops: the results. With plain, a set of tensor types, also what to do instead: None: a tensor is of
# another type; True: autograd must record the call.
@overload
def jagged_join(
    plain: None,
    interleave: bool,
    values: Sequence[Tensor],
    offsets: Sequence[Tensor],
    total: int | None,
    joined_offsets: Tensor | None,
    /,
) -> tuple[Tensor, Tensor]:
    """(joined, joined_offsets), as many rows as the values have unless total says otherwise."""

@overload
def jagged_join(
    plain: frozenset[type],
    interleave: bool,
    values: Sequence[Tensor],
    offsets: Sequence[Tensor],
    total: int | None,
    joined_offsets: Tensor | None,
    /,
) -> tuple[Tensor, Tensor] | Literal[True] | None: ...
@overload
def jagged_separate(
    plain: None, interleave: bool, values: Tensor, offsets: Sequence[Tensor], totals: Sequence[int], /
) -> list[Tensor]: ...
@overload
def jagged_separate(
    plain: frozenset[type], interleave: bool, values: Tensor, offsets: Sequence[Tensor], totals: Sequence[int], /
) -> list[Tensor] | Literal[True] | None: ...
@overload
def jagged_dense(plain: None, to_jagged: bool, x: Tensor, offsets: Tensor, size: int, padding: int, /) -> Tensor:
    """The dense tensor of size rows for each sequence, or with to_jagged the size jagged rows. padding: the bits of one
    element."""

@overload
def jagged_dense(
    plain: frozenset[type], to_jagged: bool, x: Tensor, offsets: Tensor, size: int, padding: int, /
) -> Tensor | Literal[True] | None: ...
def jagged_sizes(op: str, rows: int, is_list: bool, /, *offsets: Tensor) -> list[tuple[int, int]]:
    """The end of the last sequence and the length of the longest, of offsets on the CPU that must end within rows."""

def gated_norm(
    x: Tensor,
    gate: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    eps: float,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """x [rows, heads, width] on a GPU, gate and out [rows, heads * dim], statistics float32 [rows, 2]."""

def gated_norm_backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    statistics: Tensor,
    dx: Tensor,
    dgate: Tensor | None,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """Writes dx, and dgate where there is a gate."""

# The similarity ops. C is float64 where the tensors are float64, else float32; ids and offsets not named otherwise are
# int64. An op that has a _check is checked there alone.
def l2norm(x: Tensor, out: Tensor, eps: float, stream: int, num_threads: int, /) -> None:
    """x and out [rows, dim]."""

def l2norm_backward(dout: Tensor, x: Tensor, dx: Tensor, eps: float, stream: int, num_threads: int, /) -> None: ...
def l2norm_dot_check(q: Tensor, items: Tensor, eps: float, /) -> None: ...
def prefer_large_pages(out: Tensor, /) -> None:
    """Before a matrix on the CPU is written for the first time: fewer page faults."""

def topk_check(
    query: Tensor,
    items: Tensor,
    k: int,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    valid: Tensor | None,
    /,
) -> None: ...
def topk_capacity(k: int, /) -> int:
    """Candidates of a row on the GPU, 0 where k is too large for its kernels."""

def topk_scan(
    query: Tensor,
    items: Tensor,
    k: int,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    valid: Tensor | None,
    scratch: Tensor,
    values: Tensor,
    indices: Tensor,
    stream: int,
    num_threads: int,
    /,
) -> bool:
    """The top k on a GPU, or False and nothing done for rows that it does not serve. scratch: capacity + 2 a row."""

def topk_merge_scores(
    query: Tensor,
    items: Tensor,
    k: int,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    valid: Tensor | None,
    scores: Tensor,
    col0: int,
    last: bool,
    scratch: Tensor,
    values: Tensor,
    indices: Tensor,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """The same over fp32 scores [rows, cols] of items from col0 on, tile after tile; the last writes the result."""

def topk_merge(
    scores: Tensor,
    col0: int,
    kept: Tensor,
    counts: Tensor,
    thresholds: Tensor,
    excluded: Tensor | None,
    excluded_offsets: Tensor | None,
    valid: Tensor | None,
    k: int,
    num_threads: int,
    /,
) -> None:
    """Scores C [rows, cols] of items from col0 on into kept int64 [rows, 2 * capacity]; tiles in ascending order."""

def topk_finish(kept: Tensor, counts: Tensor, values: Tensor, indices: Tensor, num_threads: int, /) -> None: ...
def sampled_softmax_forward(
    query: Tensor,
    table: Tensor,
    pos_ids: Tensor,
    neg_ids: Tensor,
    temperature: float,
    eps: float,
    log_q: Tensor | None,
    loss: Tensor,
    of_rows: Tensor,
    of_pairs: Tensor,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """Writes loss C [T] and what the backward needs: on the CPU lse C [T] and similarity C [T, K + 1], on a GPU
    dquery C [T, D] and dsimilarity C [T, K + 1], over max(|query|, eps), with dloss = 1."""

def sampled_softmax_sort_bytes(pairs: int, items: int, /) -> int:
    """Of the scratch of sampled_softmax_sort, which is int64."""

def sampled_softmax_sort(
    query: Tensor,
    table: Tensor,
    pos_ids: Tensor,
    neg_ids: Tensor,
    temperature: float,
    eps: float,
    log_q: Tensor | None,
    pair_items: Tensor,
    other_items: Tensor,
    order: Tensor,
    other_order: Tensor,
    scratch: Tensor,
    stream: int,
    num_threads: int,
    /,
) -> int:
    """GPU: items int32 [T * (K + 1)] of all pairs, as the kernels take the ids, ascending, and their places in order,
    int32. 0: they lie in pair_items and order, 1: in the others."""

def sampled_softmax_table(
    query: Tensor,
    table: Tensor,
    pos_ids: Tensor,
    neg_ids: Tensor,
    temperature: float,
    eps: float,
    log_q: Tensor | None,
    dloss: Tensor,
    dsimilarity: Tensor,
    pair_items: Tensor,
    order: Tensor,
    pair_rows: Tensor | None,
    row_items: Tensor | None,
    chunk: int,
    partial: Tensor,
    sums: Tensor,
    dtable: Tensor,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """GPU: writes dtable, [V, D] or with row_items [rows] and pair_rows [pairs] [rows, D], from sorted pair_items and
    their order. partial is C [2 * ceil(pairs / chunk), D]; sums is C, zeroed and like dtable, or dtable itself."""

def sampled_softmax_group(
    query: Tensor,
    table: Tensor,
    pos_ids: Tensor,
    neg_ids: Tensor,
    temperature: float,
    eps: float,
    log_q: Tensor | None,
    starts: Tensor,
    order: Tensor,
    /,
) -> None:
    """Writes starts [V + 1] and order [T * (K + 1)]: the places t * (K + 1) + j of every item, by item."""

def sampled_softmax_backward_query(
    query: Tensor,
    table: Tensor,
    pos_ids: Tensor,
    neg_ids: Tensor,
    temperature: float,
    eps: float,
    log_q: Tensor | None,
    dloss: Tensor,
    lse: Tensor,
    similarity: Tensor,
    weight: Tensor,
    unit_query: Tensor,
    dquery: Tensor | None,
    num_threads: int,
    /,
) -> None:
    """Writes weight C [T, K + 1], the gradient of every similarity, unit_query C [T, D] and dquery."""

def sampled_softmax_backward_table(
    query: Tensor,
    table: Tensor,
    pos_ids: Tensor,
    neg_ids: Tensor,
    temperature: float,
    eps: float,
    log_q: Tensor | None,
    dloss: Tensor,
    lse: Tensor,
    similarity: Tensor,
    weight: Tensor,
    unit_query: Tensor,
    dquery: Tensor | None,
    starts: Tensor,
    order: Tensor,
    ids: Tensor | None,
    dtable: Tensor,
    num_threads: int,
    /,
) -> None:
    """Adds to zeroed dtable, [V, D] or, with ids [entries], [entries, D]."""

def in_batch_softmax_check(
    query: Tensor,
    items: Tensor,
    item_ids: Tensor,
    positives: Tensor,
    sequence_ids: Tensor | None,
    item_sequence_ids: Tensor | None,
    log_q: Tensor | None,
    temperature: float,
    query_records: Tensor | None,
    item_records: Tensor | None,
    eps: float,
    /,
) -> None: ...
def in_batch_softmax_forward(
    query: Tensor,
    items: Tensor,
    item_ids: Tensor,
    positives: Tensor,
    sequence_ids: Tensor | None,
    item_sequence_ids: Tensor | None,
    log_q: Tensor | None,
    temperature: float,
    query_records: Tensor | None,
    item_records: Tensor | None,
    similarity: Tensor,
    duplicate: Tensor | None,
    row0: int,
    col0: int,
    threshold: float,
    maximum: Tensor,
    sum: Tensor,
    positive_logit: Tensor,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """One tile C [rows, cols] of similarities into the running maximum and sum C [T] of its rows."""

def in_batch_softmax_backward(
    query: Tensor,
    items: Tensor,
    item_ids: Tensor,
    positives: Tensor,
    sequence_ids: Tensor | None,
    item_sequence_ids: Tensor | None,
    log_q: Tensor | None,
    temperature: float,
    query_records: Tensor | None,
    item_records: Tensor | None,
    similarity: Tensor,
    duplicate: Tensor | None,
    row0: int,
    col0: int,
    threshold: float,
    dloss: Tensor,
    lse: Tensor,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """Turns a tile of similarities into their gradient; on a GPU in the dtype of query, in the front of each row."""

def in_batch_softmax_records(
    query: Tensor,
    items: Tensor,
    item_ids: Tensor,
    positives: Tensor,
    sequence_ids: Tensor | None,
    item_sequence_ids: Tensor | None,
    log_q: Tensor | None,
    temperature: float,
    query_records: Tensor,
    item_records: Tensor,
    eps: float,
    slots: Tensor,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """GPU: writes the records int32 [T, 4] and [X, 4] of sm80/in_batch_records.h. slots: int64, zeroed."""

def in_batch_fused_splits(rows: Tensor, others: Tensor, /) -> int:
    """Splits of the other side for blocks of these rows; 0: there is no fused kernel for these tensors."""

def in_batch_fused_forward(
    query: Tensor,
    items: Tensor,
    item_ids: Tensor,
    positives: Tensor,
    sequence_ids: Tensor | None,
    item_sequence_ids: Tensor | None,
    log_q: Tensor | None,
    temperature: float,
    query_records: Tensor,
    item_records: Tensor,
    maximum: Tensor,
    sum: Tensor,
    positive_logit: Tensor,
    loss: Tensor,
    lse: Tensor,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """Loss and lse float32 [T]. Scratch: maximum and sum float32 [splits, T], positive_logit float32 [T]."""

def in_batch_fused_backward(
    query: Tensor,
    items: Tensor,
    item_ids: Tensor,
    positives: Tensor,
    sequence_ids: Tensor | None,
    item_sequence_ids: Tensor | None,
    log_q: Tensor | None,
    temperature: float,
    query_records: Tensor,
    item_records: Tensor,
    dloss: Tensor,
    lse: Tensor,
    gradient: Tensor,
    of_items: bool,
    splits: int,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """From rows of unit length: adds to the gradient float32 of the items [X, D], or of the queries [T, D]."""
