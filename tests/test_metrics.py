"""Metrics by hand, and the ranking that they are taken of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hstu_ext import MissingKernelError
from hstu_ext.data import InteractionLog, leave_one_out
from hstu_ext.training import Evaluator, hit_rate, mrr, ndcg, rank_targets, ranks_of, recall
from hstu_ext.training.config import EvaluationConfig
from hstu_ext.training.evaluation import ranking_device
from hstu_ext.training.metrics import chance, summary


def test_ranks_count_from_one_and_zero_is_not_found() -> None:
    indices = torch.tensor([[5, 3, 8], [1, 2, 3], [7, 0, -1], [4, 9, 2]])
    assert ranks_of(indices, torch.tensor([5, 3, 6, 9])).tolist() == [1, 3, 0, 2]
    assert ranks_of(indices[:1], torch.tensor([8])).tolist() == [3]
    assert ranks_of(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 1])).tolist() == [0, 0]


def test_metrics_by_hand() -> None:
    ranks = torch.tensor([1, 3, 10, 11, 0])
    assert hit_rate(ranks, 10) == pytest.approx(3 / 5)
    assert recall(ranks, 10) == pytest.approx(3 / 5)
    assert hit_rate(ranks, 1) == pytest.approx(1 / 5)
    assert hit_rate(ranks, 1000) == pytest.approx(4 / 5)
    assert ndcg(ranks, 10) == pytest.approx((1.0 + 0.5 + 1 / math.log2(11)) / 5)
    assert ndcg(ranks, 1) == pytest.approx(1 / 5)
    assert ndcg(ranks, 2) == pytest.approx(1 / 5)
    assert ndcg(ranks, 3) == pytest.approx((1.0 + 0.5) / 5)
    assert mrr(ranks) == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 11) / 5)
    assert hit_rate(torch.zeros(0, dtype=torch.int64), 10) == 0.0
    with pytest.raises(ValueError, match=r"k must be 1 or more, got 0"):
        hit_rate(ranks, 0)


def test_summary_names_everything() -> None:
    found = summary(torch.tensor([1, 2]), (1, 2))
    assert found == pytest.approx(
        {
            "HR@1": 0.5,
            "NDCG@1": 0.5,
            "Recall@1": 0.5,
            "HR@2": 1.0,
            "NDCG@2": (1 + 1 / math.log2(3)) / 2,
            "Recall@2": 1.0,
            "MRR": 0.75,
        }
    )


def test_chance_is_the_mean_over_all_places() -> None:
    candidates, depth = torch.tensor([3, 7, 20]), 6
    found = chance(candidates, (1, 5, 10), depth)
    expected: dict[str, float] = {}
    for count in candidates.tolist():
        ranks = torch.arange(1, count + 1)
        for k in (1, 5, 10):
            # Hits are counted to k whatever the depth, which is at least k in a configuration.
            for name, value in ((f"HR@{k}", hit_rate(ranks, k)), (f"Recall@{k}", recall(ranks, k))):
                expected[name] = expected.get(name, 0.0) + value / 3
            gain = ndcg(torch.where(ranks <= depth, ranks, 0), k)
            expected[f"NDCG@{k}"] = expected.get(f"NDCG@{k}", 0.0) + gain / 3
        expected["MRR"] = expected.get("MRR", 0.0) + mrr(torch.where(ranks <= depth, ranks, 0)) / 3
    assert found == pytest.approx(expected)


def brute_force(query: Tensor, items: Tensor, targets: Tensor, seen: list[list[int]]) -> list[int]:
    """Ranks by counting what is better, one user at a time."""
    ranks = []
    for user, target in enumerate(targets.tolist()):
        scores = items @ query[user]
        left = [item for item in range(len(items)) if item == target or item not in seen[user]]
        better = [i for i in left if scores[i] > scores[target] or (scores[i] == scores[target] and i < target)]
        ranks.append(len(better) + 1)
    return ranks


def packed(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    return torch.tensor([value for row in rows for value in row], dtype=torch.int64), offsets


@pytest.mark.parametrize("users", [1, 2, 9])
def test_rank_targets_against_counting(users: int) -> None:
    generator = torch.Generator().manual_seed(4)
    # Small integers: every product is exact, and there are ties.
    query = torch.randint(-3, 4, (users, 3), generator=generator).float()
    items = torch.randint(-3, 4, (50, 3), generator=generator).float()
    targets = torch.randint(50, (users,), generator=generator)
    seen = [torch.randint(50, (n,), generator=generator).tolist() for n in range(users)]
    seen[-1].append(int(targets[-1]))  # a seen target is ranked all the same
    expected = brute_force(query, items, targets, seen)
    assert rank_targets(query, items, targets, packed(seen), depth=1000).tolist() == expected
    for depth in (1, 5, 50):
        found = rank_targets(query, items, targets, packed(seen), depth=depth)
        assert found.tolist() == [rank if rank <= depth else 0 for rank in expected]
    unseen = brute_force(query, items, targets, [[]] * users)
    assert rank_targets(query, items, targets, depth=50).tolist() == unseen


def test_rank_targets_in_a_catalogue_larger_than_a_tile() -> None:
    """One user and 300,000 items: more than the 2^18 scores that topk_dot holds at a time."""
    count = 300_000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randperm(count, generator=generator).float()[:, None]
    by_rank = scores[:, 0].argsort(descending=True)
    for rank in (1, 2, 10, 999, 1000, 1001):
        target = by_rank[rank - 1 : rank]
        found = rank_targets(torch.ones(1, 1), scores, target, depth=1000)
        assert found.tolist() == [rank if rank <= 1000 else 0]
    seen = packed([by_rank[:5].tolist() + by_rank[7:9].tolist()])
    assert rank_targets(torch.ones(1, 1), scores, by_rank[9:10], seen).tolist() == [3]


def test_where_the_ranking_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise MissingKernelError("hstu_ext.topk_dot: not on this device")

    elsewhere = torch.device("meta")
    monkeypatch.setattr("hstu_ext.training.evaluation.topk_dot", lambda *arguments: None)
    assert ranking_device("auto", elsewhere) == elsewhere
    assert ranking_device("cpu", elsewhere) == torch.device("cpu")
    monkeypatch.setattr("hstu_ext.training.evaluation.topk_dot", missing)
    assert ranking_device("auto", elsewhere) == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"evaluation.device must be there, got 'cuda' without a CUDA GPU"):
            ranking_device("cuda", elsewhere)


def test_baselines_by_hand() -> None:
    # Training counts: item 0 four times, 1 and 3 three times, 2 twice, 4 once, 5 never.
    log = InteractionLog.from_sequences(
        [[0, 1, 2, 3, 5], [0, 1, 2, 4], [0, 1, 3, 0, 2], [4, 3, 0]],
        6,
    )
    split = leave_one_out(log)
    assert split.train.popularity().tolist() == [4, 3, 2, 3, 1, 0]
    found = Evaluator(split, EvaluationConfig(ks=(1, 2), depth=6, batch_size=3), 200).baselines()
    # Unseen by popularity: user 0 ranks 4, 5 -> 2; user 1: 3, 4, 5 -> 2; user 2: 2, 4, 5 -> 1; user 3: 0, 1, 2, 5 -> 1.
    assert found["popularity"]["HR@1"] == pytest.approx(0.5)
    assert found["popularity"]["HR@2"] == pytest.approx(1.0)
    assert found["popularity"]["MRR"] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert found["random"]["HR@1"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3 + 1 / 4) / 4)
    assert found["random"]["HR@2"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 2 / 4) / 4)
