"""Who interacted with what, in order, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hstu_ext.data.errors import DataError


@dataclass(frozen=True, eq=False)
class InteractionLog:
    """The events of all users, one user after the other, oldest first.

    items: int64 [events], indices in [0, num_items)
    offsets: int64 [users + 1]; user u owns items[offsets[u]:offsets[u + 1]]
    item_ids, user_ids: the ids as the data has them, by index
    timestamps: int64 [events], Unix seconds, never falling within a user; None where the data has no times
    ratings: float32 [events], or None
    actions: int64 [events], indices into action_names, or None
    item_titles: by index, or None
    item_features: by name, categories int64 [num_items] or numbers float32 [num_items, width]
    item_feature_names: by feature, the names of its categories or columns
    user_features: by name, categories int64 [users]
    user_feature_sizes: by name, the number of categories; 0 is unknown
    """

    items: Tensor
    offsets: Tensor
    item_ids: Sequence[str]
    user_ids: Sequence[str]
    timestamps: Tensor | None = None
    ratings: Tensor | None = None
    actions: Tensor | None = None
    action_names: Sequence[str] = ()
    item_titles: Sequence[str] | None = None
    item_features: Mapping[str, Tensor] = field(default_factory=dict)
    item_feature_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    user_features: Mapping[str, Tensor] = field(default_factory=dict)
    user_feature_sizes: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def from_sequences(sequences: Iterable[Sequence[int]], num_items: int) -> InteractionLog:
        """A log of item indices, one sequence a user, oldest first. Ids are the indices as text."""
        lengths: list[int] = [0]
        items: list[int] = []
        for sequence in sequences:
            lengths.append(len(sequence))
            items.extend(sequence)
        return InteractionLog(
            torch.tensor(items, dtype=torch.int64),
            torch.tensor(lengths).cumsum(0),
            [str(item) for item in range(num_items)],
            [str(user) for user in range(len(lengths) - 1)],
        )

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_actions(self) -> int:
        return len(self.action_names)

    def __len__(self) -> int:
        """The number of events."""
        return self.items.numel()

    @property
    def lengths(self) -> Tensor:
        """int64 [users]"""
        return self.offsets.diff()

    @property
    def cu_seqlens(self) -> Tensor:
        """The offsets as the ops take them: int32 [users + 1], or int64 from 2^31 events on."""
        return self.offsets.to(torch.int32) if len(self) < 2**31 else self.offsets

    @property
    def max_seqlen(self) -> int:
        return int(self.lengths.max()) if self.num_users else 0

    def users(self) -> Tensor:
        """int64 [events]: the user of every event."""
        users = torch.arange(self.num_users, device=self.items.device)
        return torch.repeat_interleave(users, self.lengths, output_size=len(self))

    def popularity(self) -> Tensor:
        """int64 [num_items]: the events of every item. Of a split, ask the training part."""
        return torch.bincount(self.items, minlength=self.num_items)

    def user(self, user: int | str) -> InteractionLog:
        """The log of one user alone, by index or, given a str, by id."""
        if isinstance(user, str):
            if user not in self._user_index:
                raise DataError(f"hstu_ext.data: user must be one of the {self.num_users} ids of the log, got {user!r}")
            user = self._user_index[user]
        elif not 0 <= user < self.num_users:
            raise DataError(f"hstu_ext.data: user must be in [0, {self.num_users}), got {user}")
        return self.select(torch.tensor([user], device=self.items.device))

    def item_index(self, item_id: str) -> int:
        """The index of an item, by its id."""
        if item_id not in self._item_index:
            raise DataError(f"hstu_ext.data: item must be one of the {self.num_items} ids of the log, got {item_id!r}")
        return self._item_index[item_id]

    @cached_property
    def _user_index(self) -> dict[str, int]:
        return {user_id: index for index, user_id in enumerate(self.user_ids)}

    @cached_property
    def _item_index(self) -> dict[str, int]:
        return {item_id: index for index, item_id in enumerate(self.item_ids)}

    def select(self, users: Tensor) -> InteractionLog:
        """The log of these users (int64 [n]) alone, in the order given. Items keep their indices."""
        lengths = self.lengths[users]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shift = torch.repeat_interleave(self.offsets[users] - offsets[:-1], lengths)
        index = torch.arange(shift.numel(), device=shift.device) + shift
        return replace(
            self._events(index, offsets),
            user_ids=[self.user_ids[user] for user in users.tolist()],
            user_features={name: values[users] for name, values in self.user_features.items()},
        )

    def without(self, events: Tensor) -> InteractionLog:
        """The log without these events (int64 [n], positions in `items`). Users and items keep their indices."""
        kept = torch.ones_like(self.items, dtype=torch.bool)
        kept[events] = False
        before = torch.cat([self.offsets.new_zeros(1), kept.cumsum(0)])
        return self._events(kept, before[self.offsets])

    def _events(self, chosen: Tensor, offsets: Tensor) -> InteractionLog:
        """The chosen events (indices or a mask), where they belong to users by these offsets."""

        def take(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[chosen]

        return replace(
            self,
            items=self.items[chosen],
            offsets=offsets,
            timestamps=take(self.timestamps),
            ratings=take(self.ratings),
            actions=take(self.actions),
        )

    def leave_last_out(self) -> tuple[InteractionLog, Tensor]:
        """Every user's events but the last, and the last ones (int64 [users]). Every user needs two events."""
        if self.num_users and int(self.lengths.min()) < 2:
            raise DataError("hstu_ext.data: leave_last_out needs two events of every user")
        last = self.offsets[1:] - 1
        return self.without(last), self.items[last]

    def to(self, device: torch.device | str) -> InteractionLog:
        """The same log with every tensor on this device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, Mapping):
                return {name: moved(part) for name, part in value.items()}
            return value

        return replace(self, **{part.name: moved(getattr(self, part.name)) for part in fields(self)})
