"""Ranking metrics of one target a user. A rank is 1 for the best item; 0 stands for a target that was not retrieved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks_of(indices: Tensor, targets: Tensor) -> Tensor:
    """Where each user's target lies among the items retrieved for them.

    Args:
        indices: int64 [users, k], the retrieved items, best first; -1 for none.
        targets: int64 [users].

    Returns:
        int64 [users], from 1 to k, or 0 where the target is not there.
    """
    found = indices == targets[:, None]
    place = found.to(torch.int64).argmax(dim=1) + 1 if indices.shape[1] else torch.zeros_like(targets)
    return torch.where(found.any(dim=1), place, 0)


def hit_rate(ranks: Tensor, k: int) -> float:
    """HR@k: the share of targets among the first k."""
    return _mean(_among_first(ranks, k).double())


def recall(ranks: Tensor, k: int) -> float:
    """Recall@k: the share of a user's targets among the first k, averaged. With one target a user it is HR@k."""
    return hit_rate(ranks, k)


def ndcg(ranks: Tensor, k: int) -> float:
    """NDCG@k: 1 / log2(rank + 1) of targets among the first k, 0 for the others, averaged (the ideal DCG is 1)."""
    gain = 1.0 / torch.log2(ranks.double() + 1.0)
    return _mean(torch.where(_among_first(ranks, k), gain, 0.0))


def mrr(ranks: Tensor) -> float:
    """MRR: the mean of 1 / rank, 0 for targets that were not retrieved."""
    return _mean(torch.where(ranks > 0, 1.0 / ranks.double(), 0.0))


def summary(ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """HR@k, NDCG@k and Recall@k for every k, and MRR, by name."""
    values: dict[str, float] = {}
    for k in ks:
        values[f"HR@{k}"], values[f"NDCG@{k}"], values[f"Recall@{k}"] = (
            hit_rate(ranks, k),
            ndcg(ranks, k),
            recall(ranks, k),
        )
    values["MRR"] = mrr(ranks)
    return values


def chance(candidates: Tensor, ks: Sequence[int], depth: int) -> dict[str, float]:
    """What summary() is on average for a random order of each user's candidates.

    Args:
        candidates: int64 [users], items that a user's target is ranked among, itself included.
        ks: as in summary.
        depth: items retrieved for a user; MRR counts nothing past it.
    """
    count = candidates.double()
    reciprocal = torch.arange(1, depth + 1, dtype=torch.float64).reciprocal().cumsum(0)
    gain = torch.log2(torch.arange(2, depth + 2, dtype=torch.float64)).reciprocal().cumsum(0)

    def expected(cumulative: Tensor, k: int) -> float:
        """The mean over users of cumulative[min(k, candidates, depth)] / candidates."""
        last = candidates.clamp(max=min(k, depth))
        return _mean(cumulative[last - 1] / count)

    values: dict[str, float] = {}
    for k in ks:
        hits = _mean(candidates.clamp(max=k) / count)
        values |= {f"HR@{k}": hits, f"NDCG@{k}": expected(gain, k), f"Recall@{k}": hits}
    values["MRR"] = expected(reciprocal, depth)
    return values


def _among_first(ranks: Tensor, k: int) -> Tensor:
    if k < 1:
        raise ValueError(f"hstu_ext.training: k must be 1 or more, got {k}")
    return (ranks > 0) & (ranks <= k)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0
