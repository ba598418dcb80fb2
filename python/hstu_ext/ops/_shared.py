"""What every op does before it calls hstu_ext._C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling

PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Types of tensors that _C reads; any other goes through torch.library."""


def is_transformed() -> bool:
    """Whether torch.compile or a transform of torch.func is at work: then a call must go through torch.library."""
    return is_compiling() or _are_functorch_transforms_active()


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without what torch does for torch.func, which is a third of what it costs: see is_transformed."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def product_dtype(x: Tensor) -> torch.dtype:
    """What the factors of a matrix product have where x is one: the dtype of autocast, except for float64."""
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def execution(x: Tensor) -> tuple[int, int]:
    """The current CUDA stream and the number of CPU threads, as _C takes them."""
    device = x.get_device()  # -1 for the CPU
    if device < 0:
        return 0, torch.get_num_threads()
    return torch._C._cuda_getCurrentRawStream(device), 1
