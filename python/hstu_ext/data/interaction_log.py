"""Who interacted with what, in order, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InteractionLog:
    """The events of all users, one user after the other, oldest first.

    items: int64 [events], item ids in [0, num_items)
    cu_seqlens: int32 [users + 1]; user u owns items[cu_seqlens[u]:cu_seqlens[u + 1]]
    """

    items: Tensor
    cu_seqlens: Tensor
    num_items: int

    @staticmethod
    def from_sequences(sequences: Sequence[Sequence[int]], num_items: int) -> InteractionLog:
        lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
        items = torch.tensor([item for sequence in sequences for item in sequence], dtype=torch.int64)
        return InteractionLog(items, lengths.cumsum(0).to(torch.int32), num_items)

    @property
    def num_users(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """int64 [users]"""
        return self.cu_seqlens.long().diff()

    @property
    def max_seqlen(self) -> int:
        return int(self.lengths.max()) if self.num_users else 0

    def users(self) -> Tensor:
        """int64 [events]: the user of every event."""
        return torch.repeat_interleave(torch.arange(self.num_users, device=self.items.device), self.lengths)

    def select(self, users: Tensor) -> InteractionLog:
        """The log of these users (int64 [n]) alone, in the order given."""
        lengths = self.lengths[users]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shift = torch.repeat_interleave(self.cu_seqlens.long()[users] - offsets[:-1], lengths)
        index = torch.arange(shift.numel(), device=shift.device) + shift
        return InteractionLog(self.items[index], offsets.to(torch.int32), self.num_items)

    def leave_last_out(self) -> tuple[InteractionLog, Tensor]:
        """Every user's events but the last, and the last ones (int64 [users]). Every user needs two events."""
        if self.num_users and int(self.lengths.min()) < 2:
            raise ValueError("hstu_ext.data: leave_last_out needs two events of every user")
        ends = self.cu_seqlens.long()[1:]
        kept = torch.ones_like(self.items, dtype=torch.bool)
        kept[ends - 1] = False
        offsets = self.cu_seqlens - torch.arange(self.num_users + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return InteractionLog(self.items[kept], offsets, self.num_items), self.items[ends - 1]

    def to(self, device: torch.device | str) -> InteractionLog:
        return InteractionLog(self.items.to(device), self.cu_seqlens.to(device), self.num_items)
