"""Copies between packed sequences of different lengths: concatenated, split, interleaved, padded to dense.

values [rows, ...] holds the sequences of a batch one after the other; sequence b has rows [offsets[b], offsets[b + 1]).
Every op here is a copy of rows, so results and gradients are exact, and each op's gradient is another one of them.

In eager mode a call is one call of hstu_ext._C, in an autograd Function where a gradient is wanted. Under torch.compile
and torch.export, and for tensors that are not plain, it is a custom op (hstu_ext::jagged_join, jagged_separate,
jagged_to_dense, dense_to_jagged). _C tells which: given PLAIN, it returns None for a tensor that is not plain and True
where autograd must record the call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
from torch import Tensor

from hstu_ext import _C
from hstu_ext.ops._shared import PLAIN, apply_of, is_transformed

_NO_LIMIT = 2**63 - 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Padding = Union[int, float, bool]


def lengths_to_offsets(lengths: Tensor, *, dtype: torch.dtype = torch.int64) -> Tensor:
    """offsets[0] = 0, offsets[b + 1] = lengths[0] + ... + lengths[b].

    Args:
        lengths: [batch], int32 or int64.
        dtype: of the result; torch.int32 is enough below 2^31 rows.

    Returns:
        [batch + 1].

    Raises:
        TypeError, ValueError: lengths is not as above.
    """
    _check_index_vector("lengths_to_offsets", "lengths", "[batch]", lengths)
    offsets = lengths.new_zeros((lengths.shape[0] + 1,), dtype=dtype)
    torch.cumsum(lengths, 0, dtype=dtype, out=offsets[1:])
    return offsets


def offsets_to_lengths(offsets: Tensor) -> Tensor:
    """lengths[b] = offsets[b + 1] - offsets[b].

    Args:
        offsets: [batch + 1], int32 or int64.

    Returns:
        [batch], dtype of offsets.

    Raises:
        TypeError, ValueError: offsets is not as above.
    """
    _check_index_vector("offsets_to_lengths", "offsets", "[batch + 1]", offsets)
    if offsets.shape[0] == 0:
        raise ValueError("hstu_ext.offsets_to_lengths: offsets must be [batch + 1], got [0]")
    return offsets[1:] - offsets[:-1]


def jagged_concat(
    values: Sequence[Tensor], offsets: Sequence[Tensor], total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Concatenates the parts of every sequence: its rows of values[0], then those of values[1], and so on.

    Args:
        values: 1 to 256 tensors [rows_p, ...], the same dtype, device and row shape: float32, float64, float16,
            bfloat16, int32, int64 or bool, any number of dimensions from 1 on. Rows are contiguous, at any stride.
        offsets: one [batch + 1] for each of values, all int32 or all int64. Sequence b of part p is
            values[p][offsets[p][b] : offsets[p][b + 1]]; its length may be 0.
        total: the rows of the result; None is the sum of rows_p. Neither reads anything back from a device.

    Returns:
        (values, offsets): [total, ...] and their offsets, the sum of the given ones. Rows that belong to no sequence
        are 0.

    Raises:
        TypeError, ValueError: an argument is not as above. What offsets hold is checked on the CPU; on a GPU rows that
            are not there become 0.
        MissingKernelError: the tensors are on a GPU, and the build has no GPU kernels.

    Differentiable in values: the gradient is jagged_split of the gradient.
    Source: `concat_2D_jagged` of Meta's generative-recommenders, for any number of parts and dimensions.
    """
    return _join("jagged_concat", values, offsets, total, False)


def jagged_interleave(
    values: Sequence[Tensor], offsets: Sequence[Tensor], total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Interleaves the parts of every sequence: the first row of each part, then the second of each, and so on.

    A part that has no more rows is passed over, so items i and actions a give i0 a0 i1 a1 ..., and items without an
    action (those to be scored) follow at the end.

    Arguments, result and errors are those of jagged_concat; the gradient is jagged_deinterleave of the gradient.
    Source: the item and action tokens of Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential
    Transducers for Generative Recommendations" (ICML 2024).
    """
    return _join("jagged_interleave", values, offsets, total, True)


def jagged_split(values: Tensor, offsets: Sequence[Tensor], totals: Sequence[int] | None = None) -> list[Tensor]:
    """Splits every sequence into parts, the inverse of jagged_concat.

    Args:
        values: [rows, ...], as the result of jagged_concat: sequence b begins at row offsets[0][b] + offsets[1][b]
            and so on.
        offsets: 1 to 256 of [batch + 1], all int32 or all int64, one a part.
        totals: the rows of each result; None reads the ends of the offsets, which waits for a GPU and cannot be
            traced by torch.compile.

    Returns:
        One tensor [totals[p], ...] a part. Rows that belong to no sequence are 0.

    Raises:
        TypeError, ValueError: an argument is not as above. What offsets hold is checked on the CPU; on a GPU rows that
            are not there become 0.
        MissingKernelError: the tensors are on a GPU, and the build has no GPU kernels.

    Differentiable in values: the gradient is jagged_concat of the gradients.
    Source: `split_2D_jagged` of Meta's generative-recommenders, for any number of parts and dimensions.
    """
    return _separate("jagged_split", values, offsets, totals, False)


def jagged_deinterleave(values: Tensor, offsets: Sequence[Tensor], totals: Sequence[int] | None = None) -> list[Tensor]:
    """The inverse of jagged_interleave. Arguments, result and errors are those of jagged_split."""
    return _separate("jagged_deinterleave", values, offsets, totals, True)


def jagged_to_dense(values: Tensor, offsets: Tensor, max_len: int | None = None, padding_value: Padding = 0) -> Tensor:
    """dense[b, t] = values[offsets[b] + t] where sequence b is longer than t, else padding_value.

    Args:
        values: [rows, ...], dtypes and strides as in jagged_concat.
        offsets: [batch + 1], int32 or int64.
        max_len: rows of the result for each sequence; longer sequences are cut, and what is cut gets a gradient of 0.
            None reads the longest length, which waits for a GPU and cannot be traced by torch.compile.
        padding_value: a number that the dtype of values can hold.

    Returns:
        [batch, max_len, ...].

    Raises:
        TypeError, ValueError: an argument is not as above. What offsets hold is checked on the CPU; on a GPU rows that
            are not there become padding.
        MissingKernelError: the tensors are on a GPU, and the build has no GPU kernels.

    Differentiable in values: the gradient is dense_to_jagged of the gradient.
    Source: `jagged_to_padded_dense` of FBGEMM.
    """
    if max_len is None:
        max_len = _longest("jagged_to_dense", offsets, _rows("jagged_to_dense", "values", values))
    if not is_transformed():
        bits = _padding_bits(padding_value, values)
        found = _C.jagged_dense(PLAIN, False, values, offsets, max_len, bits)
        if found is True:
            return _to_dense_by_function((offsets, max_len, bits), values)
        if found is not None:
            return found
    _check_tensor("jagged_to_dense", "values", values)
    _check_tensor("jagged_to_dense", "offsets", offsets)
    return _to_dense_by_op(values, offsets, max_len, padding_value)


def dense_to_jagged(dense: Tensor, offsets: Tensor, total: int | None = None) -> Tensor:
    """values[offsets[b] + t] = dense[b, t] for t below the length of sequence b, the inverse of jagged_to_dense.

    Args:
        dense: [batch, max_len, ...], dtypes as in jagged_concat; rows are contiguous, batch and max_len at any stride.
        offsets: [batch + 1], int32 or int64.
        total: the rows of the result; None reads the end of the offsets, which waits for a GPU and cannot be traced
            by torch.compile.

    Returns:
        [total, ...]. Rows past max_len and rows that belong to no sequence are 0.

    Raises:
        TypeError, ValueError: an argument is not as above. What offsets hold is checked on the CPU; on a GPU rows that
            are not there become 0.
        MissingKernelError: the tensors are on a GPU, and the build has no GPU kernels.

    Differentiable in dense: the gradient is jagged_to_dense of the gradient, padded with 0.
    Source: `dense_to_jagged` of FBGEMM.
    """
    if total is None:
        (total,) = _ends("dense_to_jagged", [offsets], _NO_LIMIT, is_list=False)
    if not is_transformed():
        found = _C.jagged_dense(PLAIN, True, dense, offsets, total, 0)
        if found is True:
            return _to_jagged_by_function((offsets, total), dense)
        if found is not None:
            return found
    _check_tensor("dense_to_jagged", "dense", dense)
    _check_tensor("dense_to_jagged", "offsets", offsets)
    return _to_jagged_by_op(dense, offsets, total)


# _C checks what it is given. These checks are for what it does not see: offsets that sizes are read from, and what goes
# through torch.library.


def _check_tensor(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"hstu_ext.{op}: {name} must be a tensor, got {type(x).__name__}")


def _check_tensors(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"hstu_ext.{op}: {name} must be a list of tensors, got {type(tensors).__name__}")
    if not 1 <= len(tensors) <= 256:
        raise ValueError(f"hstu_ext.{op}: {name} must be a list of 1 to 256 tensors, got {len(tensors)}")
    for i, x in enumerate(tensors):
        _check_tensor(op, f"{name}[{i}]", x)


def _check_index_vector(op: str, name: str, shape: str, x: Tensor) -> None:
    _check_tensor(op, name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"hstu_ext.{op}: {name} must be torch.int32 or torch.int64, got {x.dtype}")
    if x.dim() != 1:
        raise ValueError(f"hstu_ext.{op}: {name} must be {shape}, got {list(x.shape)}")


def _check_offsets(op: str, named: Sequence[tuple[str, Tensor]]) -> None:
    first, device = named[0][0], named[0][1].device
    for name, x in named:
        _check_index_vector(op, name, "[batch + 1]", x)
        if x.shape[0] == 0:
            raise ValueError(f"hstu_ext.{op}: {name} must be [batch + 1], got [0]")
        if x.device != device:
            raise ValueError(f"hstu_ext.{op}: {name} must be on {device} like {first}, got {x.device}")


def _rows(op: str, name: str, x: Tensor) -> int:
    _check_tensor(op, name, x)
    if x.dim() == 0:
        raise ValueError(f"hstu_ext.{op}: {name} must be [rows, ...], got []")
    return x.shape[0]


def _is_plain(x: Tensor) -> bool:
    return type(x) in PLAIN and not is_transformed()


def _ends(op: str, offsets: Sequence[Tensor], rows: int, is_list: bool = True) -> list[int]:
    """The end of the last sequence of each of offsets."""
    named = [(f"offsets[{i}]" if is_list else "offsets", x) for i, x in enumerate(offsets)]
    for name, x in named:
        _check_tensor(op, name, x)
    plain = all(_is_plain(x) for x in offsets)
    if plain and not offsets[0].is_cuda:
        return [end for end, _ in _C.jagged_sizes(op, rows, is_list, *offsets)]
    _check_offsets(op, named)
    ends = [int(end) for end in torch.stack([x[-1] for x in offsets]).tolist()]
    for (name, _), end in zip(named, ends):
        if plain and not 0 <= end <= rows:
            raise ValueError(f"hstu_ext.{op}: {name} must be within the {rows} rows, got {end} at the end")
    return ends


def _longest(op: str, offsets: Tensor, rows: int) -> int:
    _check_tensor(op, "offsets", offsets)
    if _is_plain(offsets) and not offsets.is_cuda:
        return _C.jagged_sizes(op, rows, False, offsets)[0][1]
    _check_offsets(op, [("offsets", offsets)])
    lengths = offsets_to_lengths(offsets)
    return int(lengths.max().item()) if lengths.shape[0] else 0


def _padding_bits(padding_value: Padding, values: Tensor) -> int:
    if type(padding_value) is int and padding_value == 0:
        return 0
    op = "jagged_to_dense"
    _check_tensor(op, "values", values)
    dtype = values.dtype
    if not isinstance(padding_value, (int, float)):
        raise TypeError(f"hstu_ext.{op}: padding_value must be a number, got {type(padding_value).__name__}")
    if isinstance(padding_value, float) and not dtype.is_floating_point:
        raise ValueError(f"hstu_ext.{op}: padding_value must be an int for {dtype}, got {padding_value}")
    return _bits_of(padding_value, padding_value == 0 and math.copysign(1.0, padding_value) < 0, dtype)


@functools.lru_cache(maxsize=64)  # takes as long as the rest of a small call
def _bits_of(padding_value: Padding, is_negative_zero: bool, dtype: torch.dtype) -> int:
    """The cache would take -0.0 for 0.0."""
    text = f"hstu_ext.jagged_to_dense: padding_value must be a number that {dtype} can hold, got {padding_value}"
    try:
        element = torch.tensor([padding_value], dtype=dtype, device="cpu")
    except (RuntimeError, OverflowError):
        raise ValueError(text) from None
    if math.isfinite(padding_value) and not element.isfinite():
        raise ValueError(text)
    return int(element.view(_BITS[dtype.itemsize]).item())


def _contiguous(gradients: Sequence[Tensor]) -> list[Tensor]:
    """A sum's gradient is expanded from one element."""
    return [x.contiguous() for x in gradients]


# Join: concatenation or interleaving. Separate: the inverse of either.


def _join_name(interleave: bool) -> str:
    return "jagged_interleave" if interleave else "jagged_concat"


def _separate_name(interleave: bool) -> str:
    return "jagged_deinterleave" if interleave else "jagged_split"


def _join(
    op: str, values: Sequence[Tensor], offsets: Sequence[Tensor], total: int | None, interleave: bool
) -> tuple[Tensor, Tensor]:
    if not is_transformed():
        found = _C.jagged_join(PLAIN, interleave, values, offsets, total, None)
        if found is True:
            joined_offsets = torch.empty_like(offsets[0])
            return _join_by_function((interleave, tuple(offsets), total, joined_offsets), *values), joined_offsets
        if found is not None:
            return found
    _check_tensors(op, "values", values)
    _check_tensors(op, "offsets", offsets)
    if total is None:
        total = sum(_rows(op, f"values[{i}]", x) for i, x in enumerate(values))
    return _join_by_op(values, offsets, total, interleave)


def _separate(
    op: str, values: Tensor, offsets: Sequence[Tensor], totals: Sequence[int] | None, interleave: bool
) -> list[Tensor]:
    if totals is None:
        _check_tensors(op, "offsets", offsets)
        totals = _ends(op, offsets, _rows(op, "values", values))
    if not is_transformed():
        found = _C.jagged_separate(PLAIN, interleave, values, offsets, totals)
        if found is True:
            return list(_separate_by_function((interleave, tuple(offsets), totals), values))
        if found is not None:
            return found
    _check_tensor(op, "values", values)
    _check_tensors(op, "offsets", offsets)
    return _separate_by_op(values, offsets, totals, interleave)


# What a Function is given beside the tensors that it differentiates is one tuple: autograd passes what is in it by, and
# the gradient needs most of it.


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *values: Tensor) -> Tensor:
        interleave, offsets, total, joined_offsets = call
        out, _ = _C.jagged_join(None, interleave, values, offsets, total, joined_offsets)
        ctx.call = interleave, offsets, [x.shape[0] for x in values]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        interleave, offsets, totals = ctx.call
        return None, *_separate(_separate_name(interleave), dout.contiguous(), offsets, totals, interleave)


class _Separate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], values: Tensor) -> tuple[Tensor, ...]:
        interleave, offsets, totals = call
        parts = _C.jagged_separate(None, interleave, values, offsets, totals)
        ctx.call = interleave, offsets, values.shape[0]
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        interleave, offsets, total = ctx.call
        dvalues, _ = _join(_join_name(interleave), _contiguous(gradients), offsets, total, interleave)
        return None, dvalues


_join_by_function: Callable[..., Tensor] = apply_of(_Join)
_separate_by_function: Callable[..., tuple[Tensor, ...]] = apply_of(_Separate)


@torch.library.custom_op(
    "hstu_ext::jagged_join",
    mutates_args=(),
    schema="(Tensor[] values, Tensor[] offsets, SymInt total, bool interleave) -> (Tensor, Tensor)",
)
def _join_op(
    values: Sequence[Tensor], offsets: Sequence[Tensor], total: int, interleave: bool
) -> tuple[Tensor, Tensor]:
    return _C.jagged_join(None, interleave, values, offsets, total, None)


@_join_op.register_fake
def _(values: Sequence[Tensor], offsets: Sequence[Tensor], total: int, interleave: bool) -> tuple[Tensor, Tensor]:
    return values[0].new_empty((total, *values[0].shape[1:])), offsets[0].new_empty(offsets[0].shape)


@torch.library.custom_op(
    "hstu_ext::jagged_separate",
    mutates_args=(),
    schema="(Tensor values, Tensor[] offsets, SymInt[] totals, bool interleave) -> Tensor[]",
)
def _separate_op(values: Tensor, offsets: Sequence[Tensor], totals: Sequence[int], interleave: bool) -> list[Tensor]:
    return _C.jagged_separate(None, interleave, values, offsets, totals)


@_separate_op.register_fake
def _(values: Tensor, offsets: Sequence[Tensor], totals: Sequence[int], interleave: bool) -> list[Tensor]:
    return [values.new_empty((total, *values.shape[1:])) for total in totals]


def _setup_join(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, offsets, _, ctx.interleave = inputs
    ctx.save_for_backward(*offsets)
    ctx.totals = [x.shape[0] for x in values]


def _backward_of_join(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    offsets = list(ctx.saved_tensors)
    return _separate_op(dout.contiguous(), offsets, ctx.totals, ctx.interleave), [None] * len(offsets), None, None


def _setup_separate(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    values, offsets, _, ctx.interleave = inputs
    ctx.save_for_backward(*offsets)
    ctx.rows = values.shape[0]


def _backward_of_separate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    offsets = list(ctx.saved_tensors)
    dvalues, _ = _join_op(_contiguous(gradients), offsets, ctx.rows, ctx.interleave)
    return dvalues, [None] * len(offsets), None, None


_join_by_op: Callable[..., tuple[Tensor, Tensor]] = _join_op
_separate_by_op: Callable[..., list[Tensor]] = _separate_op
_join_op.register_autograd(_backward_of_join, setup_context=_setup_join)
_separate_op.register_autograd(_backward_of_separate, setup_context=_setup_separate)


# Dense and jagged: each is the other's gradient.


class _ToDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], values: Tensor) -> Tensor:
        offsets, max_len, bits = call
        dense = _C.jagged_dense(None, False, values, offsets, max_len, bits)
        ctx.call = offsets, values.shape[0]
        return dense

    @staticmethod
    def backward(ctx: Any, ddense: Tensor) -> tuple[Tensor | None, ...]:
        return None, dense_to_jagged(ddense.contiguous(), *ctx.call)


class _ToJagged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], dense: Tensor) -> Tensor:
        offsets, total = call
        values = _C.jagged_dense(None, True, dense, offsets, total, 0)
        ctx.call = offsets, dense.shape[1]
        return values

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
        return None, jagged_to_dense(dvalues.contiguous(), *ctx.call)


_to_dense_by_function: Callable[..., Tensor] = apply_of(_ToDense)
_to_jagged_by_function: Callable[..., Tensor] = apply_of(_ToJagged)


@torch.library.custom_op(
    "hstu_ext::jagged_to_dense",
    mutates_args=(),
    schema="(Tensor values, Tensor offsets, SymInt max_len, Scalar padding_value) -> Tensor",
)
def _to_dense_op(values: Tensor, offsets: Tensor, max_len: int, padding_value: Padding) -> Tensor:
    bits = _padding_bits(padding_value, values)
    return _C.jagged_dense(None, False, values, offsets, max_len, bits)


@_to_dense_op.register_fake
def _(values: Tensor, offsets: Tensor, max_len: int, padding_value: Padding) -> Tensor:
    return values.new_empty((offsets.shape[0] - 1, max_len, *values.shape[1:]))


@torch.library.custom_op(
    "hstu_ext::dense_to_jagged",
    mutates_args=(),
    schema="(Tensor dense, Tensor offsets, SymInt total) -> Tensor",
)
def _to_jagged_op(dense: Tensor, offsets: Tensor, total: int) -> Tensor:
    return _C.jagged_dense(None, True, dense, offsets, total, 0)


@_to_jagged_op.register_fake
def _(dense: Tensor, offsets: Tensor, total: int) -> Tensor:
    return dense.new_empty((total, *dense.shape[2:]))


def _setup_to_dense(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets, _, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.rows = values.shape[0]


def _backward_of_to_dense(ctx: Any, ddense: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return _to_jagged_op(ddense.contiguous(), offsets, ctx.rows), None, None, None


def _setup_to_jagged(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, offsets, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.max_len = dense.shape[1]


def _backward_of_to_jagged(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return _to_dense_op(dvalues.contiguous(), offsets, ctx.max_len, 0), None, None


_to_dense_by_op: Callable[..., Tensor] = _to_dense_op
_to_jagged_by_op: Callable[..., Tensor] = _to_jagged_op
_to_dense_op.register_autograd(_backward_of_to_dense, setup_context=_setup_to_dense)
_to_jagged_op.register_autograd(_backward_of_to_jagged, setup_context=_setup_to_jagged)
