"""Batches of users, cut on the device where the log lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_ext.data.errors import DataError
from hstu_ext.data.interaction_log import InteractionLog


@dataclass(frozen=True, eq=False)
class Batch:
    """Events of some users, packed.

    items: int64 [total]
    cu_seqlens: int32 [batch + 1]; row b owns items[cu_seqlens[b]:cu_seqlens[b + 1]]
    max_seqlen: the longest of the batch
    users: int64 [batch], indices into the log
    timestamps: int64 [total], ratings: float32 [total], actions: int64 [total], each None where the log has none
    """

    items: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    users: Tensor
    timestamps: Tensor | None = None
    ratings: Tensor | None = None
    actions: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Chosen:
    """The users of a batch that is yet to be cut, and what the host knows of it.

    users: int64 [at most batch_size], indices into the log, on its device
    total: events of the batch
    longest: of its sequences
    """

    users: Tensor
    total: int
    longest: int


class SequenceBatches:
    """Iterates over a log, batch_size users at a time, each with at most max_len events.

    A pass over the batches is an epoch. Its order is a function of (seed, epoch) alone. The log and the order of an
    epoch lie on the device; a batch is gathered there, and nothing is read back: lengths are known on the host.

    `state_dict()` between two batches says where the pass stands, the batch at hand counting as done; after
    `load_state_dict()`, the next `for` loop continues there, with the very batches that an uninterrupted run would have
    had. A loop that was left early otherwise begins its epoch again.

    Args:
        log: or a part of a split.
        batch_size: users.
        max_len: events of a user, the latest.
        shuffle: a new order every epoch; otherwise the log's own.
        seed: of the order.
        device: where to put the log; None leaves it where it is.
        drop_last: leave out the last batch where it is smaller.
        min_len: leave out users with fewer events. For training it is 2: one event has no next one to predict.
        random_windows: of a user with more than max_len events, others than the latest: every epoch max_len in a row
            from a place of its own.
    """

    def __init__(
        self,
        log: InteractionLog,
        batch_size: int,
        max_len: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        drop_last: bool = False,
        min_len: int = 1,
        random_windows: bool = False,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("max_len", max_len, 1), ("seed", seed, 0)):
            if value < least:
                raise DataError(f"hstu_ext.data: {name} must be at least {least}, got {value}")
        if batch_size * max_len >= 2**31:
            raise DataError(f"hstu_ext.data: batch_size * max_len must be below 2^31, got {batch_size} * {max_len}")
        self.log = log if device is None else log.to(device)
        self.batch_size, self.max_len, self.shuffle, self.seed = batch_size, max_len, shuffle, seed
        self.random_windows = random_windows
        self.epoch = 0
        self._done = 0  # batches of the epoch that were handed out
        self._resume = 0  # where the next loop begins
        lengths = np.diff(log.offsets.cpu().numpy())
        self._rows: NDArray[np.int64] = np.flatnonzero(lengths >= min_len)
        self._host_lengths: NDArray[np.int64] = np.minimum(lengths, max_len)
        self._lengths = torch.from_numpy(self._host_lengths).to(self.log.items.device)
        self._left_out: NDArray[np.int64] = lengths - self._host_lengths
        self._skipped = torch.zeros_like(self._lengths)  # events of each user after those of the epoch's batches
        self._num_batches = len(self._rows) // batch_size if drop_last else -(-len(self._rows) // batch_size)

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return self._num_batches

    @property
    def num_users(self) -> int:
        """Users with at least min_len events."""
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Begins this epoch, unless it is the current one: a loaded place in it is kept."""
        if epoch != self.epoch:
            self.epoch, self._done, self._resume = epoch, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        for chosen in self.chosen():
            yield self._cut(chosen)

    def chosen(self) -> Iterator[Chosen]:
        """As iteration over the batches, but leaving their cutting, by padded(), to the caller."""
        epoch, first = self.epoch, self._resume
        self._resume, self._done = 0, first
        order = self._rows
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        if self.random_windows:
            skipped = np.random.default_rng([self.seed, epoch, 1]).integers(0, self._left_out, endpoint=True)
            self._skipped.copy_(torch.from_numpy(skipped))
        order = order[: len(self) * self.batch_size]
        users = torch.from_numpy(order).to(self.log.items.device)
        starts = np.arange(0, len(order), self.batch_size)
        lengths = self._host_lengths[order]
        totals = np.add.reduceat(lengths, starts).tolist() if len(order) else []
        longest = np.maximum.reduceat(lengths, starts).tolist() if len(order) else []
        for number in range(first, len(self)):
            self._done = number + 1
            of_batch = users[number * self.batch_size : (number + 1) * self.batch_size]
            yield Chosen(of_batch, totals[number], longest[number])
        self.epoch, self._done = epoch + 1, 0

    def _cut(self, chosen: Chosen) -> Batch:
        users, total = chosen.users, chosen.total
        lengths = self._lengths[users]
        cu_seqlens = _offsets(lengths)
        index = torch.arange(total, device=users.device)
        index += torch.repeat_interleave(self._shift(users, lengths, cu_seqlens), lengths, output_size=total)
        return self._gather(users, cu_seqlens, chosen.longest, index)

    def padded(self, users: Tensor, rows: int) -> Batch:
        """The batch of these users in a given number of rows, whatever their lengths.

        All shapes follow from those of the arguments and nothing is read back from the device, so that one CUDA graph
        serves many batches.

        Args:
            users: int64 [batch], indices into the log; -1 for nobody, an empty sequence.
            rows: at least the users' events. Rows past cu_seqlens[-1] belong to no sequence and hold some event.
        """
        present = users >= 0
        users = users.clamp(min=0)
        lengths = torch.where(present, self._lengths[users], 0)
        cu_seqlens = _offsets(lengths)
        index = torch.arange(rows, device=users.device)
        row = torch.searchsorted(cu_seqlens[1:].long(), index, right=True).clamp(max=users.numel() - 1)
        index += self._shift(users, lengths, cu_seqlens)[row]
        index = index.clamp(0, self.log.items.numel() - 1)
        return self._gather(users, cu_seqlens, self.max_len, index)

    def _shift(self, users: Tensor, lengths: Tensor, cu_seqlens: Tensor) -> Tensor:
        """How far a user's events lie in the log from where they go in the batch."""
        return self.log.offsets[1:][users] - self._skipped[users] - lengths - cu_seqlens[:-1]

    def _gather(self, users: Tensor, cu_seqlens: Tensor, longest: int, index: Tensor) -> Batch:
        log = self.log
        return Batch(
            log.items[index],
            cu_seqlens,
            longest,
            users,
            None if log.timestamps is None else log.timestamps[index],
            None if log.ratings is None else log.ratings[index],
            None if log.actions is None else log.actions[index],
        )

    def _settings(self) -> dict[str, Any]:
        """What the batches depend on besides the log's events."""
        return {
            "users": self.num_users,
            "batch_size": self.batch_size,
            "max_len": self.max_len,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "random_windows": self.random_windows,
            "batches": len(self),
        }

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the number of its batches that are done, with the settings that they hold for."""
        return {"epoch": self.epoch, "done": self._done, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict()` was called. The settings must be the same."""
        for name, value in self._settings().items():
            if state["settings"][name] != value:
                raise DataError(
                    f"hstu_ext.data: the state is one of batches with {name} {state['settings'][name]}, got {value}"
                )
        self.epoch = int(state["epoch"])
        self._done = self._resume = int(state["done"])


def _offsets(lengths: Tensor) -> Tensor:
    """int32 [batch + 1]"""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
    return offsets
