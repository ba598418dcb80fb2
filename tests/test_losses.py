"""Losses and samplers against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_ext.models import Catalogue
from hstu_ext.training import (
    Config,
    FullSoftmaxLoss,
    InBatchNegativesSampler,
    InBatchSoftmaxLoss,
    SampledSoftmaxLoss,
    UniformNegativesSampler,
    log_q,
)
from hstu_ext.training.losses import RetrievalLoss, loss_from_config

NUM_ITEMS, ROWS, DIM, TEMPERATURE = 30, 25, 8, 0.1


@pytest.fixture(params=[None, "weights"])
def weights(request: pytest.FixtureRequest) -> Tensor | None:
    if request.param is None:
        return None
    return torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5], dtype=torch.float64).repeat(ROWS // 5)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(NUM_ITEMS, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    return query, table, torch.randint(12, (ROWS,), generator=generator)


def similarities(query: Tensor, table: Tensor) -> Tensor:
    return F.normalize(query, dim=-1) @ F.normalize(table, dim=-1).T


def mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def check(loss: Tensor, expected: Tensor, query: Tensor, table: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    got, wanted = torch.autograd.grad(loss, (query, table)), torch.autograd.grad(expected, (query, table))
    for ours, theirs in zip(got, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def correction(wanted: bool) -> Tensor | None:
    return log_q(torch.arange(NUM_ITEMS)) if wanted else None


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "log_q"])
def test_sampled_softmax(corrected: bool, weights: Tensor | None) -> None:
    query, table, positives = problem()
    negatives = torch.randint(NUM_ITEMS, (ROWS, 6), generator=torch.Generator().manual_seed(2))
    negatives[0, 0] = positives[0]  # dropped
    loss = SampledSoftmaxLoss(lambda ids: negatives, TEMPERATURE, log_q=correction(corrected))(
        query, table, positives, weights
    )
    ids = torch.cat([positives[:, None], negatives], dim=1)
    logits = similarities(query, table).gather(1, ids) / TEMPERATURE
    if corrected:
        logits = logits - correction(True)[ids]
    same = torch.cat([torch.zeros(ROWS, 1, dtype=torch.bool), negatives == positives[:, None]], dim=1)
    logits = logits.masked_fill(same, -5e4)
    check(loss, mean(-logits.log_softmax(1)[:, 0], weights), query, table)


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "log_q"])
def test_in_batch_softmax(corrected: bool, threshold: float | None, weights: Tensor | None) -> None:
    query, table, positives = problem()
    loss = InBatchSoftmaxLoss(
        InBatchNegativesSampler(), TEMPERATURE, log_q=correction(corrected), similarity_threshold=threshold
    )(query, table, positives, weights)
    items = positives.unique()
    assert len(items) < ROWS  # there are repeated positives to take out
    logits = similarities(query, table)[:, items] / TEMPERATURE
    if corrected:
        logits = logits - correction(True)[items]
    own = items == positives[:, None]
    if threshold is not None:
        near = similarities(table, table)[positives][:, items] > threshold
        assert bool((near & ~own).any())
        logits = logits.masked_fill(near & ~own, -torch.inf)
    check(loss, mean(-logits.log_softmax(1)[own], weights), query, table)


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "log_q"])
def test_in_batch_softmax_without_the_own_sequence(corrected: bool, weights: Tensor | None) -> None:
    query, table, positives = problem()
    sequences = torch.arange(ROWS) // 4
    criterion = InBatchSoftmaxLoss(
        InBatchNegativesSampler(), TEMPERATURE, log_q=correction(corrected), mask_same_sequence=True
    )
    loss = criterion(query, table, positives, weights, sequences)
    losses = []
    for row in range(ROWS):
        pairs = sorted(set(zip(sequences.tolist(), positives.tolist())))
        own = (int(sequences[row]), int(positives[row]))
        kept = [item for sequence, item in pairs if (sequence, item) == own or (sequence != own[0] and item != own[1])]
        logits = similarities(query, table)[row, kept] / TEMPERATURE
        if corrected:
            logits = logits - correction(True)[kept]
        losses.append(logits.logsumexp(0) - logits[kept.index(own[1])])
    check(loss, mean(torch.stack(losses), weights), query, table)
    with pytest.raises(ValueError, match=r"sequences must be given for mask_same_sequence, got None"):
        criterion(query, table, positives, weights)


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "log_q"])
def test_full_softmax(corrected: bool, weights: Tensor | None) -> None:
    query, table, positives = problem()
    loss = FullSoftmaxLoss(TEMPERATURE, log_q=correction(corrected))(query, table, positives, weights)
    logits = similarities(query, table) / TEMPERATURE
    if corrected:
        logits = logits - correction(True)
    check(loss, mean(F.cross_entropy(logits, positives, reduction="none"), weights), query, table)


def test_uniform_negatives_cover_the_catalogue_evenly() -> None:
    torch.manual_seed(0)
    sampler = UniformNegativesSampler(7, 5)
    drawn = sampler(torch.zeros(4000, dtype=torch.int64))
    assert drawn.shape == (4000, 5)
    shares = torch.bincount(drawn.flatten(), minlength=7) / drawn.numel()
    assert float((shares - 1 / 7).abs().max()) < 0.01
    torch.manual_seed(0)
    assert torch.equal(sampler(torch.zeros(4000, dtype=torch.int64)), drawn)
    assert not torch.equal(sampler(torch.zeros(4000, dtype=torch.int64)), drawn)


def test_in_batch_negatives_hold_every_item_once() -> None:
    items, places = InBatchNegativesSampler()(torch.tensor([9, 2, 9, 4, 2]))
    assert items.tolist() == [2, 4, 9]
    assert places.tolist() == [2, 0, 2, 1, 0]


@pytest.mark.parametrize("exponent", [0.0, 0.75, 1.0])
def test_log_q_is_a_log_of_probabilities(exponent: float) -> None:
    counts = torch.tensor([0, 1, 16, 81])
    found = log_q(counts, exponent)
    weights = torch.tensor([1.0, 1.0, 16.0, 81.0]) ** exponent
    torch.testing.assert_close(found, (weights / weights.sum()).log())
    assert found.dtype == torch.float32


def test_a_configuration_gives_its_loss() -> None:
    catalogue = Catalogue([str(item) for item in range(4)], torch.tensor([0, 1, 16, 81]))

    def loss_of(**options: object) -> RetrievalLoss:
        config = Config.from_dict({"model": {"eps": 1e-3}, "loss": {"temperature": 0.2, **options}})
        found = loss_from_config(config, catalogue)
        assert (found.temperature, found.eps) == (0.2, 1e-3)
        return found

    sampled = loss_of(num_negatives=7)
    assert isinstance(sampled, SampledSoftmaxLoss)
    assert sampled.sampler(torch.zeros(3, dtype=torch.int64)).shape == (3, 7)
    assert sampled.log_q is None
    in_batch = loss_of(kind="in_batch", log_q=True, similarity_threshold=0.9, mask_same_sequence=True)
    assert isinstance(in_batch, InBatchSoftmaxLoss)
    assert (in_batch.similarity_threshold, in_batch.mask_same_sequence) == (0.9, True)
    assert torch.equal(in_batch.log_q, log_q(catalogue.counts, 0.75))
    assert loss_of(kind="in_batch").similarity_threshold is None
    full = loss_of(kind="full", log_q=True, log_q_exponent=0.5)
    assert isinstance(full, FullSoftmaxLoss)
    assert torch.equal(full.log_q, log_q(catalogue.counts, 0.5))
