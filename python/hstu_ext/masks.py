"""Which (query, key) pairs of a sequence attend, as dense boolean tensors: the definition of every mask.

A sequence of Lk keys is laid out [contexts | history | targets]. It may have fewer query rows than keys: query row i
sits at position p = i + (Lk - Lq), so the last query row is the last key. A row before the first key (p < 0, where
Lq > Lk) keeps what its mask's formula gives: nothing under a causal one.

The kernels never build these tensors. They are for reading, checking and drawing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

__all__ = ["IntervalMask", "Mask", "TargetMask", "WindowMask"]


@dataclass(frozen=True)
class WindowMask:
    """Row p keeps p - left <= j <= p + right; -1 is no limit on that side.

    (-1, -1) is full, (-1, 0) causal, (0, 0) the diagonal.
    """

    left: int = -1
    right: int = -1

    def materialize(self, len_q: int, len_k: int, device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor [len_q, len_k], True where the pair attends."""
        p, j = _positions(len_q, len_k, device)
        keep = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
        if self.left != -1:
            keep &= j >= p - self.left
        if self.right != -1:
            keep &= j <= p + self.right
        return keep


@dataclass(frozen=True)
class TargetMask:
    """Causal, with c contexts that see the whole history and t targets that do not see one another.

    With H = Lk - t, the end of contexts and history:

    * a context, 0 <= p < c, keeps j < H;
    * history, c <= p < H, keeps j <= p;
    * a target, p >= H, keeps j < H, and of the targets those of its own group that do not come after it. The first
      target_group_size targets are a group, so are the next, and so on.
    """

    num_contexts: int = 0
    num_targets: int = 0
    target_group_size: int = 1

    def materialize(self, len_q: int, len_k: int, device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor [len_q, len_k], True where the pair attends."""
        p, j = _positions(len_q, len_k, device)
        history_end = len_k - self.num_targets
        is_context = (p >= 0) & (p < self.num_contexts)
        is_target = p >= history_end
        group_of_p = torch.div(p - history_end, self.target_group_size, rounding_mode="floor")
        group_of_j = torch.div(j - history_end, self.target_group_size, rounding_mode="floor")
        before_targets = j < history_end
        causal = j <= p
        for_target = before_targets | (causal & (group_of_p == group_of_j))
        return torch.where(is_context, before_targets, torch.where(is_target, for_target, causal))


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Row i keeps j in [0, f0) or [f1, f2) or [f3, f4) and so on, with f = bounds[:, i].

    bounds is [n odd, >= Lq], any integer dtype. An interval whose end is not after its begin is empty.
    """

    bounds: Tensor

    def materialize(self, len_q: int, len_k: int, device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor [len_q, len_k], True where the pair attends."""
        _, j = _positions(len_q, len_k, device)
        bounds = self.bounds[:, :len_q].to(device)[:, :, None]
        keep = j < bounds[0]
        for begin, end in zip(bounds[1::2], bounds[2::2]):
            keep = keep | ((j >= begin) & (j < end))
        return keep


Mask = Union[WindowMask, TargetMask, IntervalMask]


def _positions(len_q: int, len_k: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Position of every query row as a column, every key as a row."""
    p = torch.arange(len_k - len_q, len_k, device=device)[:, None]
    j = torch.arange(len_k, device=device)[None, :]
    return p, j
