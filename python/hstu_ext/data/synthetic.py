"""A seeded interaction log with a sequential structure that a model can find and popularity cannot."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate

from hstu_ext.data.interaction_log import InteractionLog

SUCCESSORS = 3  # items that tend to follow an item
FOLLOWS_LAST = 2 / 3  # of the structured events; the others follow the event before the last


def synthetic(
    num_users: int = 2000,
    num_items: int = 1000,
    *,
    min_len: int = 8,
    max_len: int = 128,
    structure: float = 0.75,
    seed: int = 0,
) -> InteractionLog:
    """Draws a log in which no user meets an item twice.

    Every item has three successors, fixed by the seed. An event is, with probability `structure`, a successor of the
    user's last event or of the one before it, and otherwise an item drawn by popularity (weights 1 / (10 + rank)).
    Lengths are heavy-tailed: min_len + floor((max_len - min_len + 1) x^3), x uniform.
    """
    if not 2 <= min_len <= max_len <= num_items // 2:
        raise ValueError(
            "hstu_ext.data: lengths must satisfy 2 <= min_len <= max_len <= num_items / 2, "
            f"got {min_len}, {max_len} and {num_items} items"
        )
    source = random.Random(seed)
    by_rank = source.sample(range(num_items), num_items)
    popularity = list(accumulate(1.0 / (10 + rank) for rank in range(num_items)))
    successors = [source.sample(range(num_items), SUCCESSORS) for _ in range(num_items)]

    def next_item(history: list[int]) -> int:
        if history and source.random() < structure:
            back = 1 if len(history) == 1 or source.random() < FOLLOWS_LAST else 2
            return source.choice(successors[history[-back]])
        return source.choices(by_rank, cum_weights=popularity)[0]

    sequences = []
    for _ in range(num_users):
        length = min_len + int((max_len - min_len + 1) * source.random() ** 3)
        history: list[int] = []
        seen: set[int] = set()
        while len(history) < length:
            item = next_item(history)
            if item not in seen:
                seen.add(item)
                history.append(item)
        sequences.append(history)
    log = InteractionLog.from_sequences(sequences, num_items)
    return replace(log, item_titles=[f"item {item}" for item in range(num_items)])


synthetic_log = synthetic
