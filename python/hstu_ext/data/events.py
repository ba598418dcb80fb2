"""From events in the order of a file to a log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_ext.data.errors import DataError, broken_file
from hstu_ext.data.interaction_log import InteractionLog

Duplicates = Literal["keep", "drop"]
MOST_RATING_ACTIONS = 256  # distinct ratings that are taken for actions


class Vocabulary(dict[str, int]):
    """Ids by the order in which they are first looked up. Raises ValueError for what is no id."""

    def __missing__(self, name: str) -> int:
        check_id(name)
        self[name] = index = len(self)
        return index


def check_id(name: str) -> None:
    """Raises ValueError for an id that is empty, has blanks around it or was not UTF-8."""
    name.encode("utf-8")
    if not name or name != name.strip():
        raise ValueError


@dataclass
class Events:
    """Events in the order of the file. users, items and actions are int64 indices into the ids."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    times: NDArray[np.int64] | None = None
    ratings: NDArray[np.float32] | None = None
    actions: NDArray[np.int64] | None = None
    action_names: Sequence[str] = ()


def order_of_ids(ids: Sequence[str]) -> list[int]:
    """The places of the ids in ascending order: as numbers where all are plain integers, otherwise as text."""
    if all(name.isascii() and name.isdigit() and (name == "0" or name[0] != "0") for name in ids):
        return sorted(range(len(ids)), key=lambda place: int(ids[place]))
    return sorted(range(len(ids)), key=lambda place: ids[place])


def integer_vocabulary(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str]]:
    """Ids that are non-negative integers as indices, and the ids by index, ascending."""
    if len(ids) and int(ids.max()) < 4 * len(ids) + 1024:
        present = np.zeros(int(ids.max()) + 1, np.bool_)
        present[ids] = True
        known = np.flatnonzero(present)
        indices = (np.cumsum(present) - 1)[ids]
    else:
        known, indices = np.unique(ids, return_inverse=True)
    return indices.astype(np.int64, copy=False), [str(name) for name in known.tolist()]


def parse_integers(texts: Sequence[str]) -> NDArray[np.int64]:
    """Raises ValueError unless each is a decimal int64."""
    _check_characters(texts, b"0123456789-,")
    try:
        return np.fromiter(map(int, texts), np.int64, len(texts))
    except OverflowError:
        raise ValueError from None


def parse_decimals(texts: Sequence[str]) -> NDArray[np.float32]:
    """Raises ValueError unless each is a finite number."""
    _check_characters(texts, b"0123456789-+.eE,")
    values = np.fromiter(map(float, texts), np.float64, len(texts))
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise ValueError
    return values.astype(np.float32)


def _check_characters(texts: Sequence[str], characters: bytes) -> None:
    """Raises ValueError for characters that int() and float() would let pass, such as blanks and underscores."""
    if ",".join(texts).encode("ascii").translate(None, characters):
        raise ValueError


def plain_decimal(value: Any) -> str:
    """The shortest text that reads back as this float32: 4, 3.5."""
    return np.format_float_positional(np.float32(value), trim="-")


def pack(events: Events, file: str, duplicates: Duplicates = "keep") -> InteractionLog:
    """Sorts ids and events: all ids ascending, the events of a user by time, ties in the order of the file.

    duplicates "drop" keeps the first of several events of the same user, item and time.
    Where there are ratings, no actions and at most 256 distinct ratings, the actions are the ratings in rising order.
    """
    if duplicates not in ("keep", "drop"):
        raise DataError(f"hstu_ext.data: duplicates must be 'keep' or 'drop', got {duplicates!r}")
    if duplicates == "drop" and events.times is None:
        raise broken_file(file, "times, to tell duplicates from repeats", "none")
    users, user_ids = _sorted_ids(events.users, events.user_ids)
    items, item_ids = _sorted_ids(events.items, events.item_ids)
    if events.times is None:
        order = np.argsort(users, kind="stable")
    else:
        order = np.lexsort((events.times, users))
        if duplicates == "drop":
            order = _without_duplicates(order, users, items, events.times)
    times = None if events.times is None else events.times[order]
    ratings = None if events.ratings is None else events.ratings[order]
    actions: NDArray[np.int64] | None = None
    action_names: Sequence[str] = ()
    if events.actions is not None:
        actions, action_names = _sorted_ids(events.actions[order], events.action_names)
    elif ratings is not None:
        distinct, codes = np.unique(ratings, return_inverse=True)
        if len(distinct) <= MOST_RATING_ACTIONS:
            actions, action_names = codes, [plain_decimal(value) for value in distinct]

    def tensor(values: NDArray[Any] | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(values)

    return InteractionLog(
        items=torch.from_numpy(items[order]),
        offsets=torch.from_numpy(np.concatenate([[0], np.bincount(users[order], minlength=len(user_ids)).cumsum()])),
        item_ids=item_ids,
        user_ids=user_ids,
        timestamps=tensor(times),
        ratings=tensor(ratings),
        actions=tensor(actions),
        action_names=action_names,
    )


def _sorted_ids(indices: NDArray[np.int64], ids: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    order = order_of_ids(ids)
    if order == list(range(len(ids))):
        return indices, list(ids)
    place = np.empty(len(ids), np.int64)
    place[order] = np.arange(len(ids))
    return place[indices], [ids[old] for old in order]


def _without_duplicates(
    order: NDArray[np.int64], users: NDArray[np.int64], items: NDArray[np.int64], times: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The order without the events that repeat an earlier one's user, item and time."""
    together = np.lexsort((items, times, users))
    repeats = np.ones(len(together), np.bool_)
    repeats[:1] = False
    for values in (users, items, times):
        repeats[1:] &= np.diff(values[together]) == 0
    dropped = np.zeros(len(together), np.bool_)
    dropped[together[repeats]] = True
    return order[~dropped[order]]
