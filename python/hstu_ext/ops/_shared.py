"""What every op does before it calls hstu_ext._C."""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Types of tensors that _C reads; any other goes through torch.library."""


def execution(x: Tensor) -> tuple[int, int]:
    """The current CUDA stream and the number of CPU threads, as _C takes them."""
    if x.is_cuda:
        return torch._C._cuda_getCurrentRawStream(x.get_device()), 1
    return 0, torch.get_num_threads()
