"""What is in a log, for people."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np

from hstu_ext.data.interaction_log import InteractionLog
from hstu_ext.data.split import leave_one_out

MOST_POPULAR = 10


def describe(log: InteractionLog) -> str:
    """Counts, lengths, times, features, the most popular items, and what the default split makes of them."""
    lengths = log.lengths.cpu().numpy()
    quantiles = np.percentile(lengths, (0, 25, 50, 75, 95, 99, 100), method="lower") if len(lengths) else [0] * 7
    cells = log.num_users * log.num_items
    rows = [
        ("users", f"{log.num_users}"),
        ("items", f"{log.num_items}"),
        ("events", f"{len(log)}"),
        ("density", f"{len(log) / cells:.4%}" if cells else "-"),
        ("events a user", "least {}, 25 % {}, median {}, 75 % {}, 95 % {}, 99 % {}, most {}".format(*quantiles)),
        ("times", _times(log)),
        ("ratings", "none" if log.ratings is None else _span(log)),
        ("actions", ", ".join(log.action_names) or "none"),
        (
            "item features",
            ", ".join(f"{n} ({len(log.item_feature_names.get(n, ()))})" for n in log.item_features) or "none",
        ),
        ("user features", ", ".join(f"{n} ({size})" for n, size in log.user_feature_sizes.items()) or "none"),
        ("leave-one-out", leave_one_out(log).summary()),
    ]
    lines = [f"{name:<14} {value}" for name, value in rows]
    counts, items = log.popularity().sort(descending=True, stable=True)
    lines.append("most popular")
    for count, item in zip(counts[:MOST_POPULAR].tolist(), items[:MOST_POPULAR].tolist()):
        name = log.item_ids[item] if log.item_titles is None else log.item_titles[item]
        lines.append(f"  {count:>8}  {name}")
    return "\n".join(lines)


def _times(log: InteractionLog) -> str:
    if log.timestamps is None or not len(log):
        return "none"
    first, last = int(log.timestamps.min()), int(log.timestamps.max())
    try:
        return (
            " to ".join(f"{datetime.fromtimestamp(t, timezone.utc):%Y-%m-%d %H:%M:%S}" for t in (first, last)) + " UTC"
        )
    except (OverflowError, ValueError, OSError):  # not in seconds
        return f"{first} to {last}"


def _span(log: InteractionLog) -> str:
    assert log.ratings is not None
    return f"{float(log.ratings.min()):g} to {float(log.ratings.max()):g}, mean {float(log.ratings.mean()):.3f}"
