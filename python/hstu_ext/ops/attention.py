"""HSTU attention over packed sequences of different lengths.

In eager mode a call is one autograd Function over hstu_ext._C. Under torch.compile and torch.export, and for tensors
that are not plain (fake tensors, subclasses), it is the custom op hstu_ext::attention_forward. Both run the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu_ext import _C
from hstu_ext.bias import RelativeBias
from hstu_ext.ops._shared import PLAIN, execution


class _Problem(NamedTuple):
    """What a call is told besides the differentiable tensors, in the order of _C and of the custom ops."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_contexts: Tensor | None
    num_targets: Tensor | None
    target_group_size: int
    window_left: int
    window_right: int
    alpha: float
    func: Tensor | None
    scaling_seqlen: int
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    query_times: Tensor | None
    key_times: Tensor | None


class _Scores(NamedTuple):
    """What is added to the scores: rab inside of alpha, the two tables of a RelativeBias outside."""

    rab: Tensor | None
    position_table: Tensor | None
    time_table: Tensor | None


# _Problem(...) without the Python-level constructor, which costs as much as reading all of a call's tensors.
_new_tuple = tuple.__new__

_PROBLEM_SCHEMA = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? num_contexts, "
    "Tensor? num_targets, SymInt target_group_size, SymInt window_left, SymInt window_right, float alpha, "
    "Tensor? func, SymInt scaling_seqlen, Tensor? seqused_q, Tensor? seqused_k, Tensor? query_times, Tensor? key_times"
)
_SCORES_SCHEMA = "Tensor? rab, Tensor? position_table, Tensor? time_table"
_NO_SCORES = _Scores(None, None, None)


def hstu_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_contexts: Tensor | None = None,
    num_targets: Tensor | None = None,
    target_group_size: int = 1,
    window_size: tuple[int, int] = (-1, -1),
    alpha: float = 1.0,
    rab: Tensor | None = None,
    has_drab: bool = False,
    *,
    func: Tensor | None = None,
    scaling_seqlen: int = -1,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    bias: RelativeBias | None = None,
    deterministic: bool = False,
) -> Tensor:
    """HSTU attention, differentiable in q, k, v, the tables of bias and, with has_drab, rab.

    For query row i and key row j of one sequence and head, with N = scaling_seqlen (-1: max_seqlen_q):

        S_ij = alpha * (q_i . k_j + rab_ij) + bias_ij
        P_ij = keep(i, j) * silu(S_ij) / N
        out_i = sum_j P_ij v_j

    There is no softmax. Row i sits at position p = i + (Lk - Lq) of a sequence [contexts | history | targets] of Lk
    keys, and keep() is one of three masks:

    * window_size (left, right): p - left <= j <= p + right, -1 for no limit. (-1, -1) is full, (-1, 0) causal.
    * num_contexts or num_targets, with window_size (-1, 0): contexts see all contexts and history, history is causal,
      a target sees contexts, history and the earlier members of its group of target_group_size targets.
    * func: j in [0, f0) or [f1, f2) or [f3, f4) ..., read per head and query row.

    Args:
        q: [total_q, heads, dqk]. dqk and dv are multiples of 8 from 8 to 256. float16 or bfloat16 on GPU, also float32
            and float64 on CPU. Any strides with a contiguous last dimension; GPU rows that are not 16-byte aligned are
            copied first.
        k: [total_k, heads, dqk].
        v: [total_k, heads, dv].
        cu_seqlens_q: [batch + 1], int32 or int64, the packed row where each sequence starts and the last one ends.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q: at least the longest sequence's query rows.
        max_seqlen_k: at least the longest sequence's keys.
        num_contexts: [batch], int32 or int64, contexts of each sequence; None for none.
        num_targets: [batch], int32 or int64, targets of each sequence; None for none.
        target_group_size: targets that see one another, counted from the first.
        window_size: (left, right), see above.
        alpha: the factor of the scores.
        rab: [batch, 1 or heads, M, M] with M >= max_seqlen_k, dtype of q, indexed by position p and key j.
        has_drab: compute the gradient of rab.
        func: int32 [1 or heads, n odd, >= total_q], column = the packed query row.
        scaling_seqlen: N above.
        seqused_q: [batch], int32 or int64, query rows in use of each sequence; None for all.
        seqused_k: [batch], the same for the keys.
        bias: a RelativeBias by position and by time, computed inside the kernels; not together with rab.
        deterministic: the same gradients, bit for bit, on every run. Also set by torch.use_deterministic_algorithms.

    Returns:
        [total_q, heads, dv] in the dtype of q; rows that are not in use are 0.

    Raises:
        TypeError, ValueError: an argument is not as above. What index tensors hold is checked on CPU only.
        MissingKernelError: the GPU kernel for this call is not in this build.

    Source: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations" (ICML 2024); the signature is that of NVIDIA's recsys-examples.
    """
    left, right = window_size
    problem = _new_tuple(_Problem, (
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_contexts, num_targets, target_group_size,
        left, right, alpha, func, scaling_seqlen, seqused_q, seqused_k, *_times(bias),
    ))  # fmt: skip
    _check_rab(rab, has_drab)
    plain = _is_plain(q, k, v, rab, problem)
    if torch._C._is_any_autocast_enabled():
        q, k, v, rab = _autocast(q, k, v, rab)
    scores = _scores(rab, bias)
    if not plain:
        return _by_op(q, k, v, *scores, *problem, has_drab, deterministic)
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or has_drab or _wants_tables(scores)
    ):
        return _by_function(q, k, v, *scores, problem, has_drab, deterministic)
    return _forward(q, k, v, scores, problem)


def hstu_attn_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_contexts: Tensor | None = None,
    num_targets: Tensor | None = None,
    target_group_size: int = 1,
    window_size: tuple[int, int] = (-1, -1),
    alpha: float = 1.0,
    rab: Tensor | None = None,
    has_drab: bool = False,
    *,
    func: Tensor | None = None,
    scaling_seqlen: int = -1,
    seqused: Tensor | None = None,
    bias: RelativeBias | None = None,
    deterministic: bool = False,
) -> Tensor:
    """hstu_attn_varlen_func of q, k and v in one tensor [total, 3, heads, dim], whose gradient is one tensor as well.

    cu_seqlens, max_seqlen and seqused stand for those of q and of k; the rest is as in hstu_attn_varlen_func.
    """
    left, right = window_size
    problem = _new_tuple(_Problem, (
        cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, num_contexts, num_targets, target_group_size,
        left, right, alpha, func, scaling_seqlen, seqused, seqused, *_times(bias),
    ))  # fmt: skip
    _check_rab(rab, has_drab)
    if not isinstance(qkv, Tensor):
        raise TypeError(f"hstu_ext.attention: qkv must be a tensor, got {type(qkv).__name__}")
    plain = _is_plain(qkv, qkv, qkv, rab, problem)
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"hstu_ext.attention: qkv must be [total, 3, heads, dim], got {list(qkv.shape)}")
    if torch._C._is_any_autocast_enabled():
        qkv, _, _, rab = _autocast(qkv, qkv, qkv, rab)
    scores = _scores(rab, bias)
    if plain and torch.is_grad_enabled() and (qkv.requires_grad or has_drab or _wants_tables(scores)):
        return _by_packed_function(qkv, *scores, problem, has_drab, deterministic)
    q, k, v = qkv.unbind(1)
    if not plain:
        return _by_op(q, k, v, *scores, *problem, has_drab, deterministic)
    return _forward(q, k, v, scores, problem)


def _times(bias: RelativeBias | None) -> tuple[Tensor | None, Tensor | None]:
    if bias is None:
        return None, None
    if not isinstance(bias, RelativeBias):
        raise TypeError(f"hstu_ext.attention: bias must be a hstu_ext.RelativeBias, got {type(bias).__name__}")
    return bias.query_times, bias.key_times


def _scores(rab: Tensor | None, bias: RelativeBias | None) -> _Scores:
    if bias is None:
        return _NO_SCORES if rab is None else _Scores(rab, None, None)
    if rab is not None:
        raise ValueError("hstu_ext.attention: rab must be None where bias is given, got both")
    if bias.position_table is None and bias.time_table is None:
        raise ValueError("hstu_ext.attention: bias must have a position_table or a time_table, got neither")
    for name, table in (("position_table", bias.position_table), ("time_table", bias.time_table)):
        if table is not None and not isinstance(table, Tensor):
            raise TypeError(f"hstu_ext.attention: {name} must be a tensor, got {type(table).__name__}")
    return _Scores(None, bias.position_table, bias.time_table)


def _wants_tables(scores: _Scores) -> bool:
    _, position, time = scores
    return (position is not None and position.requires_grad) or (time is not None and time.requires_grad)


def _check_rab(rab: Tensor | None, has_drab: bool) -> None:
    if has_drab and rab is None:
        raise ValueError("hstu_ext.attention: rab must be given where has_drab is set, got None")


def _is_plain(q: Tensor, k: Tensor, v: Tensor, rab: Tensor | None, problem: _Problem) -> bool:
    """Whether _C can read the tensors and autograd needs no help from torch.library."""
    if torch.compiler.is_compiling():
        return False
    # A tracer that replaces one of the tensors replaces q; _C refuses what it cannot read among the rest.
    if type(q) in PLAIN and type(k) in PLAIN and type(v) in PLAIN and type(problem.cu_seqlens_q) in PLAIN:
        return True
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise TypeError(f"hstu_ext.attention: {name} must be a tensor, got {type(value).__name__}")
    for name, other in (("rab", rab), *problem._asdict().items()):
        if not isinstance(other, (Tensor, Number, torch.SymInt, type(None))):
            raise TypeError(f"hstu_ext.attention: {name} must be a tensor or a number, got {type(other).__name__}")
    return False


def _autocast(q: Tensor, k: Tensor, v: Tensor, rab: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As torch's scaled_dot_product_attention: under autocast everything is in its dtype, except float64."""
    device_type = "cuda" if q.is_cuda else "cpu"
    if not torch.is_autocast_enabled(device_type):
        return q, k, v, rab
    dtype = torch.get_autocast_dtype(device_type)
    return _cast(q, dtype), _cast(k, dtype), _cast(v, dtype), None if rab is None else _cast(rab, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _aligned(x: Tensor) -> Tensor:
    """A copy whose rows are 16-byte aligned, which contiguous() does not promise."""
    return x.clone(memory_format=torch.contiguous_format)


def _forward(q: Tensor, k: Tensor, v: Tensor, scores: _Scores, problem: _Problem) -> Tensor:
    # empty_like costs half of new_empty.
    out = _empty_like(v) if q.shape == v.shape else q.new_empty(q.shape[:-1] + v.shape[-1:])
    rab, position, time = scores
    stream_and_threads = execution(q)
    try:
        _C.attention_forward(q, k, v, rab, position, time, out, *problem, *stream_and_threads)
    except _C.MisalignedError:
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
        _C.attention_forward(q, k, v, rab, position, time, out, *problem, *stream_and_threads)
    return out


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: _Scores,
    grads: tuple[Tensor, Tensor, Tensor],
    problem: _Problem,
    want_drab: bool,
    want_tables: bool,
    deterministic: bool,
) -> _Scores:
    """Writes dq, dk and dv into grads and returns the gradients of rab and the tables, None for those not wanted."""
    if dout.stride(-1) != 1:  # a sum's gradient is expanded from one element
        dout = dout.contiguous()
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    rab, position, time = scores
    drab = dposition = dtime = None
    if want_drab and rab is not None:
        drab = rab.new_zeros((rab.shape[0], q.shape[1], *rab.shape[2:]))
    if want_tables:
        dposition = None if position is None else position.new_zeros(position.shape)
        dtime = None if time is None else time.new_zeros(time.shape)
    dscores = _Scores(drab, dposition, dtime)
    try:
        _run_backward(dout, q, k, v, scores, grads, dscores, problem, deterministic)
    except _C.MisalignedError:
        dout, q, k, v = _aligned(dout), _aligned(q), _aligned(k), _aligned(v)
        _run_backward(dout, q, k, v, scores, grads, dscores, problem, deterministic)
    if drab is not None and rab is not None and rab.shape[1] < drab.shape[1]:
        accumulate = torch.float64 if drab.dtype == torch.float64 else torch.float32
        drab = drab.sum(1, keepdim=True, dtype=accumulate).to(drab.dtype)
    return _Scores(drab, dposition, dtime)


def _run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: _Scores,
    grads: tuple[Tensor, Tensor, Tensor],
    dscores: _Scores,
    problem: _Problem,
    deterministic: bool,
) -> None:
    dq_accum = table_accum = None
    if q.is_cuda:
        size = _C.attention_table_scratch(dscores.position_table, dscores.time_table)
        table_accum = q.new_zeros(size, dtype=torch.int64) if size else None
        size = _C.attention_backward_scratch(q, v, problem.cu_seqlens_q, problem.max_seqlen_k, deterministic)
        dq_accum = q.new_empty(size, dtype=torch.float32) if size else None
    rab, position, time = scores
    dq, dk, dv = grads
    drab, dposition, dtime = dscores
    _C.attention_backward(
        dout, q, k, v, rab, position, time, dq, dk, dv, drab, dposition, dtime, dq_accum, table_accum, *problem,
        deterministic, *execution(q),
    )  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rab: Tensor | None,
        position_table: Tensor | None,
        time_table: Tensor | None,
        problem: _Problem,
        has_drab: bool,
        deterministic: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, rab, position_table, time_table)
        ctx.problem, ctx.has_drab, ctx.deterministic = problem, has_drab, deterministic
        return _forward(q, k, v, _Scores(rab, position_table, time_table), problem)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *scores = ctx.saved_tensors
        grads = _empty_like(q), _empty_like(k), _empty_like(v)
        needs = ctx.needs_input_grad
        dscores = _backward(
            dout, q, k, v, _Scores(*scores), grads, ctx.problem, ctx.has_drab and needs[3], needs[4] or needs[5],
            ctx.deterministic,
        )  # fmt: skip
        return *grads, *dscores, None, None, None


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        rab: Tensor | None,
        position_table: Tensor | None,
        time_table: Tensor | None,
        problem: _Problem,
        has_drab: bool,
        deterministic: bool,
    ) -> Tensor:
        ctx.save_for_backward(qkv, rab, position_table, time_table)
        ctx.problem, ctx.has_drab, ctx.deterministic = problem, has_drab, deterministic
        q, k, v = qkv.unbind(1)
        return _forward(q, k, v, _Scores(rab, position_table, time_table), problem)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *scores = ctx.saved_tensors
        q, k, v = qkv.unbind(1)
        dqkv = _empty_like(qkv)
        dq, dk, dv = dqkv.unbind(1)
        needs = ctx.needs_input_grad
        dscores = _backward(
            dout, q, k, v, _Scores(*scores), (dq, dk, dv), ctx.problem, ctx.has_drab and needs[1], needs[2] or needs[3],
            ctx.deterministic,
        )  # fmt: skip
        return dqkv, *dscores, None, None, None


_by_function: Callable[..., Tensor] = _Attention.apply
_by_packed_function: Callable[..., Tensor] = _PackedAttention.apply


@torch.library.custom_op(
    "hstu_ext::attention_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_SCORES_SCHEMA}, {_PROBLEM_SCHEMA}, bool has_drab, bool deterministic) "
    "-> Tensor",
)
def _forward_op(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return _forward(q, k, v, _Scores(*rest[:3]), _Problem(*rest[3:-2]))


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[:-1] + v.shape[-1:])


@torch.library.custom_op(
    "hstu_ext::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, {_SCORES_SCHEMA}, {_PROBLEM_SCHEMA}, bool want_drab, "
    "bool want_tables, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The last results are the gradients of rab and the tables; those not wanted have no elements."""
    scores, problem, flags = _Scores(*rest[:3]), _Problem(*rest[3:-3]), rest[-3:]
    grads = _empty_like(q), _empty_like(k), _empty_like(v)
    dscores = _backward(dout, q, k, v, scores, grads, problem, *flags)
    return *grads, *(q.new_empty(0) if x is None else x for x in dscores)


@_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    want_drab, want_tables, _ = rest[-3:]
    dscores = [
        _empty_like(x) if wanted and x is not None else q.new_empty(0)
        for x, wanted in zip(rest[:3], (want_drab, want_tables, want_tables))
    ]
    return _empty_like(q), _empty_like(k), _empty_like(v), *dscores


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _backward_of_op(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    inputs = [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others)]
    *inputs, has_drab, deterministic = inputs
    needs = ctx.needs_input_grad
    want_drab, want_tables = has_drab and needs[3], needs[4] or needs[5]
    *grads, drab, dposition, dtime = _backward_op(dout, *inputs, want_drab, want_tables, deterministic)
    dscores = drab if want_drab else None, dposition if needs[4] else None, dtime if needs[5] else None
    return *grads, *dscores, *(None,) * (len(_Problem._fields) + 2)


_by_op: Callable[..., Tensor] = _forward_op
_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)
