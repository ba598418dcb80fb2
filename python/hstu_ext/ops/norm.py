"""The norms of an HSTU layer: layer norm without parameters, times a gate.

On a GPU in eager mode one kernel a direction; elsewhere, and under torch.compile, which fuses them, torch's own ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu_ext import _C
from hstu_ext.ops._shared import PLAIN, execution


def gated_norm(x: Tensor, gate: Tensor | None = None, *, eps: float = 1e-6, dtype: torch.dtype | None = None) -> Tensor:
    """Rows with mean 0 and variance 1, times the gate's, differentiable in both.

        out = gate * (x - mean(x)) / sqrt(var(x) + eps)          over the columns that count

    Args:
        x: [rows, width], or [rows, heads, width] where the first dim columns of every head count, with dim the gate's
            columns over heads. Any floating point dtype; sums are in float32 (float64 for float64).
        gate: [rows, heads * dim]; None for ones, and all columns count.
        eps: positive.
        dtype: of the result; None for the gate's, or without a gate that of x.

    Returns:
        [rows, heads * dim].

    Raises:
        TypeError, ValueError: an argument is not as above.
        MissingKernelError: x is on a GPU and this build has CPU kernels only.

    Source: the layer of Zhai et al., "Actions Speak Louder than Words" (ICML 2024).
    """
    for name, value in (("x", x), ("gate", x if gate is None else gate)):
        if not isinstance(value, Tensor):
            raise TypeError(f"hstu_ext.gated_norm: {name} must be a tensor, got {type(value).__name__}")
    if x.dim() == 2:
        x = x.unsqueeze(1)
    if x.dim() != 3 or x.shape[1] * x.shape[2] == 0 or not x.is_floating_point():
        raise ValueError(
            f"hstu_ext.gated_norm: x must be floating point [rows, heads, width], got {x.dtype} {list(x.shape)}"
        )
    rows, heads, width = x.shape
    dim = width
    if gate is not None:
        if gate.dim() != 2 or gate.shape[0] != rows or gate.shape[1] % heads or not 0 < gate.shape[1] <= heads * width:
            raise ValueError(
                f"hstu_ext.gated_norm: gate must be [{rows}, a multiple of {heads} up to {heads * width}], "
                f"got {list(gate.shape)}"
            )
        dim = gate.shape[1] // heads
    if not eps > 0:
        raise ValueError(f"hstu_ext.gated_norm: eps must be positive, got {eps}")
    dtype = dtype or (x.dtype if gate is None else gate.dtype)
    plain = not torch.compiler.is_compiling() and type(x) in PLAIN and (gate is None or type(gate) in PLAIN)
    if not plain or not x.is_cuda or torch.float64 in (x.dtype, dtype):
        return _composed(x, gate, dim, eps, dtype)
    return _by_function(x, gate if gate is None else gate.to(dtype), dim, eps, dtype)


def _composed(x: Tensor, gate: Tensor | None, dim: int, eps: float, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(x.dtype, dtype)
    columns = x[..., :dim].flatten(1).to(wide)
    normalised = F.layer_norm(columns, columns.shape[1:], eps=eps)
    return (normalised if gate is None else normalised * gate).to(dtype)


def _rows(x: Tensor) -> Tensor:
    """Contiguous in the last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, dim: int, eps: float, dtype: torch.dtype) -> Tensor:
        x = _rows(x)
        gate = None if gate is None else _rows(gate)
        out = x.new_empty((x.shape[0], x.shape[1] * dim), dtype=dtype)
        statistics = x.new_empty((x.shape[0], 2), dtype=torch.float32)
        _C.gated_norm(x, gate, out, statistics, eps, *execution(x))
        ctx.save_for_backward(x, gate, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, statistics = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        dgate = None if gate is None else gate.new_empty(gate.shape)
        _C.gated_norm_backward(_rows(dout), x, gate, statistics, dx, dgate, *execution(x))
        return dx, dgate, None, None, None


_by_function: Callable[..., Tensor] = _GatedNorm.apply
