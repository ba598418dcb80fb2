"""Ranking metrics over the full catalogue."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_ext.data import InteractionLog


def ranks_of(scores: Tensor, targets: Tensor, seen: InteractionLog | None = None) -> Tensor:
    """The place (int64 [users], 0 is first) of each user's target among all items by descending score.

    scores [users, num_items], targets int64 [users]. Items in `seen` are left out of the ranking, a target never is.
    Ties go to the lower item id.
    """
    target_scores = scores.gather(1, targets[:, None])
    ids = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > target_scores) | ((scores == target_scores) & (ids < targets[:, None]))
    if seen is not None:
        ahead[seen.users(), seen.items] = False
    return ahead.sum(1)


def hit_rate(ranks: Tensor, k: int) -> float:
    """The share of targets among the first k."""
    return float((ranks < k).double().mean())


def ndcg(ranks: Tensor, k: int) -> float:
    """Mean of 1 / log2(rank + 2) over the targets among the first k, 0 for the others (one relevant item a user)."""
    gain = 1.0 / torch.log2(ranks.double() + 2.0)
    return float(torch.where(ranks < k, gain, 0.0).mean())
