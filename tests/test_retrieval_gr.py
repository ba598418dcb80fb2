"""The retrieval model, its data and its metrics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_ext.data import InteractionLog, synthetic_log
from hstu_ext.models import RetrievalGR
from hstu_ext.training import hit_rate, ndcg, ranks_of


def small_log(lengths: list[int], num_items: int = 40) -> InteractionLog:
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randperm(num_items, generator=generator)[:length].tolist() for length in lengths]
    return InteractionLog.from_sequences(sequences, num_items)


def eager_states(model: RetrievalGR, sequence: Tensor) -> Tensor:
    """The model over one sequence, written out densely from its parameters."""
    n = sequence.numel()
    x = model.item_embedding.weight[sequence] + model.position_embedding.weight[:n]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    for layer in model.layers:
        width = layer.heads * layer.head_dim
        u, v, q, k = F.silu(layer.uvqk(layer.norm_in(x))).split(width, dim=-1)
        heads = []
        for h in range(layer.heads):
            columns = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
            scores = q[:, columns] @ k[:, columns].T / math.sqrt(layer.head_dim)
            heads.append((F.silu(scores) * causal / model.max_len) @ v[:, columns])
        x = x + layer.out(layer.norm_out(torch.cat(heads, dim=-1)) * u)
    return x / x.norm(dim=-1, keepdim=True)


def eager_loss(model: RetrievalGR, log: InteractionLog) -> Tensor:
    table = model.item_embedding.weight / model.item_embedding.weight.norm(dim=-1, keepdim=True)
    losses = []
    for sequence in log.items.split(log.lengths.tolist()):
        logits = eager_states(model, sequence) @ table.T / model.temperature
        losses += [torch.logsumexp(row, 0) - row[item] for row, item in zip(logits[:-1], sequence[1:])]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("lengths", [[7, 1, 12, 2], [5], [0, 9, 0, 3]], ids=["ragged", "one", "empty"])
def test_model_matches_its_dense_copy(lengths: list[int]) -> None:
    torch.manual_seed(0)
    log = small_log(lengths)
    model = RetrievalGR(log.num_items, dim=24, heads=2, head_dim=16, max_len=12, dropout=0.0).double()
    states = model(log.items, log.cu_seqlens, log.max_seqlen)
    expected = torch.cat([eager_states(model, s) for s in log.items.split(log.lengths.tolist()) if s.numel()])
    torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-9)

    loss, expected_loss = model.loss(log.items, log.cu_seqlens, log.max_seqlen), eager_loss(model, log)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    for got, wanted in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected_loss, parameters)):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


def test_model_learns_a_tiny_log_by_heart() -> None:
    torch.manual_seed(0)
    log = small_log([10, 6, 12, 8])
    model = RetrievalGR(log.num_items, dim=32, heads=2, head_dim=16, max_len=12, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(log.items, log.cu_seqlens, log.max_seqlen)
        loss.backward()
        optimizer.step()
    history, targets = log.leave_last_out()
    scores = model.next_item_scores(history.items, history.cu_seqlens, history.max_seqlen)
    assert scores.argmax(1).tolist() == targets.tolist()
    assert float(loss.detach()) < 0.1


def test_model_states_do_not_see_the_future() -> None:
    torch.manual_seed(0)
    log = small_log([9])
    model = RetrievalGR(log.num_items, max_len=9, dropout=0.0).eval()
    changed = log.items.clone()
    changed[-1] = (changed[-1] + 1) % log.num_items
    before = model(log.items, log.cu_seqlens, 9)
    after = model(changed, log.cu_seqlens, 9)
    torch.testing.assert_close(before[:-1], after[:-1])
    assert not torch.allclose(before[-1], after[-1])


def test_model_refuses_longer_sequences_than_it_has_positions_for() -> None:
    log = small_log([9])
    with pytest.raises(ValueError, match="max_seqlen must be at most 8, got 9"):
        RetrievalGR(log.num_items, max_len=8)(log.items, log.cu_seqlens, 9)


def test_log_select_and_leave_last_out() -> None:
    log = InteractionLog.from_sequences([[1, 2, 3], [4, 5], [6, 7, 8, 9]], 10)
    assert (log.num_users, log.max_seqlen, log.users().tolist()) == (3, 4, [0, 0, 0, 1, 1, 2, 2, 2, 2])
    chosen = log.select(torch.tensor([2, 0]))
    assert chosen.items.tolist() == [6, 7, 8, 9, 1, 2, 3]
    assert chosen.cu_seqlens.tolist() == [0, 4, 7]
    train, targets = log.leave_last_out()
    assert (train.items.tolist(), train.cu_seqlens.tolist()) == ([1, 2, 4, 6, 7, 8], [0, 2, 3, 6])
    assert targets.tolist() == [3, 5, 9]
    with pytest.raises(ValueError, match="two events"):
        train.leave_last_out()


def test_synthetic_log_is_seeded_and_without_repeats() -> None:
    log, again, other = (synthetic_log(50, 300, max_len=60, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(log.items, again.items)
    assert torch.equal(log.cu_seqlens, again.cu_seqlens)
    assert not torch.equal(log.items[:100], other.items[:100])
    assert int(log.lengths.min()) >= 8
    assert log.max_seqlen <= 60
    assert int(log.items.min()) >= 0
    assert int(log.items.max()) < 300
    for sequence in log.items.split(log.lengths.tolist()):
        assert sequence.unique().numel() == sequence.numel()


def test_synthetic_log_has_the_structure_it_plants() -> None:
    def repeated_pairs(structure: float) -> float:
        """The share of neighbouring pairs that occur more than once."""
        log = synthetic_log(400, 400, max_len=60, structure=structure)
        user = log.users()
        pairs = (log.items[:-1] * log.num_items + log.items[1:])[user[:-1] == user[1:]]
        counts = pairs.unique(return_counts=True)[1]
        return float(counts[counts > 1].sum() / pairs.numel())

    assert repeated_pairs(0.75) > 2 * repeated_pairs(0.0)


def test_synthetic_log_refuses_lengths_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="got 8, 128 and 200 items"):
        synthetic_log(10, 200)


def test_ranks_leave_out_the_seen_and_break_ties_by_id() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.5, 0.5, 0.5, 0.5], [0.4, 0.3, 0.2, 0.1]])
    targets = torch.tensor([2, 2, 0])
    assert ranks_of(scores, targets).tolist() == [2, 2, 0]
    seen = InteractionLog.from_sequences([[1], [], [0, 3]], 4)
    assert ranks_of(scores, targets, seen).tolist() == [1, 2, 0]


def test_hit_rate_and_ndcg_by_hand() -> None:
    ranks = torch.tensor([0, 2, 9, 10])
    assert hit_rate(ranks, 10) == 0.75
    assert hit_rate(ranks, 1) == 0.25
    assert ndcg(ranks, 10) == pytest.approx((1.0 + 0.5 + 1.0 / math.log2(11.0)) / 4)
    assert ndcg(ranks, 2) == 0.25
