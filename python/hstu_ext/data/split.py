"""The chronological leave-one-out split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hstu_ext.data.errors import DataError
from hstu_ext.data.interaction_log import InteractionLog


@dataclass(frozen=True, eq=False)
class Split:
    """What is trained on, and one target for every user that is evaluated.

    train: every user and every item of the log, with the events that training may see
    history: the evaluated users, with their events before the target; row n belongs to targets[n]
    targets: int64 [evaluated users], item indices
    users: int64 [evaluated users], indices into train
    target_timestamps: int64 [evaluated users], or None
    short_users: the number of users that are only trained on
    unseen_items: the number of items that have no event in train
    unseen_targets: the number of targets among them
    """

    train: InteractionLog
    history: InteractionLog
    targets: Tensor
    users: Tensor
    target_timestamps: Tensor | None
    short_users: int
    unseen_items: int
    unseen_targets: int

    def summary(self) -> str:
        """One line about the counts."""
        return (
            f"{len(self.train)} training events, {self.targets.numel()} users evaluated, "
            f"{self.short_users} too short and only trained on, {self.unseen_targets} targets and "
            f"{self.unseen_items} items without a training event"
        )

    def to(self, device: torch.device | str) -> Split:
        """The same split with every tensor on this device."""
        train = self.train.to(device)
        return Split(
            train,
            train if self.history is self.train else self.history.to(device),
            self.targets.to(device),
            self.users.to(device),
            None if self.target_timestamps is None else self.target_timestamps.to(device),
            self.short_users,
            self.unseen_items,
            self.unseen_targets,
        )


def leave_one_out(
    log: InteractionLog, *, holdout: Literal["test", "validation"] = "test", min_length: int = 3
) -> Split:
    """Splits by each user's own order.

    "test": the target is the last event, the history is all before it, and training sees all but the last.
    "validation": the target is the second-last event and training sees all but the last two; the last is in no part.

    Users with fewer than min_length events are not evaluated; all their events are training data, in both splits. Ties
    in time are in the order of the file, so the last of them is the target. A target may be an item that the history
    has already, and an item that occurs nowhere in training; such items stay in the catalogue and are counted.

    Args:
        min_length: at least 2 for "test" and 3 for "validation".
    """
    if holdout not in ("test", "validation"):
        raise DataError(f"hstu_ext.data: holdout must be 'test' or 'validation', got {holdout!r}")
    held_out = 1 if holdout == "test" else 2
    if min_length <= held_out:
        raise DataError(f"hstu_ext.data: min_length must be at least {held_out + 1} for {holdout}, got {min_length}")
    users = (log.lengths >= min_length).nonzero().flatten()
    target = log.offsets[1:][users] - held_out
    train = log.without(torch.cat([target + step for step in range(held_out)]))
    targets = log.items[target]
    unseen = train.popularity() == 0
    return Split(
        train=train,
        history=train if users.numel() == log.num_users else train.select(users),
        targets=targets,
        users=users,
        target_timestamps=None if log.timestamps is None else log.timestamps[target],
        short_users=log.num_users - users.numel(),
        unseen_items=int(unseen.sum()),
        unseen_targets=int(unseen[targets].sum()),
    )
