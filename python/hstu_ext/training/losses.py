"""Losses of next-item retrieval: softmax cross entropy on cosine similarity, apart in where the negatives come from.

All take the same arguments, so that one can be put in another's place:

    query: [rows, dim], floating point, of any length: the losses normalise it
    table: [num_items, dim], dtype of query, one row an item, of any length
    positives: int64 [rows], the item that follows each position
    weights: [rows] or None for ones; a row of weight 0 takes no part
    sequences: int64 [rows], the sequence that each positive belongs to; read where the loss masks by it

and return sum(weights * loss) / sum(weights), float32 (float64 for float64), differentiable in query and table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hstu_ext.ops._shared import product_dtype
from hstu_ext.ops.similarity import in_batch_softmax_loss, sampled_softmax_loss
from hstu_ext.training.samplers import InBatchNegativesSampler, UniformNegativesSampler, log_q

if TYPE_CHECKING:
    from hstu_ext.models.catalogue import Catalogue
    from hstu_ext.training.config import Config


class RetrievalLoss(nn.Module):
    """The common part: temperature, eps of the norms, and the log q correction.

    Args:
        temperature: similarities are divided by it.
        eps: the least norm that a row is divided by.
        log_q: float [num_items], log of each item's probability of being drawn, taken off its logit; None for none.
    """

    capturable = False
    """Whether the loss can run inside of a CUDA graph: it reads nothing back from the device."""
    log_q: Tensor | None

    def __init__(self, temperature: float = 0.05, eps: float = 1e-6, log_q: Tensor | None = None) -> None:
        super().__init__()
        self.temperature, self.eps = temperature, eps
        self.register_buffer("log_q", log_q, persistent=False)


class SampledSoftmaxLoss(RetrievalLoss):
    """loss_t = -log softmax of position t's positive among itself and negatives of its own (sampled_softmax_loss).

    Args:
        sampler: positives [rows] -> negatives int64 [rows, K].
        temperature, eps, log_q: as in RetrievalLoss.
    """

    capturable = True

    def __init__(
        self,
        sampler: UniformNegativesSampler,
        temperature: float = 0.05,
        eps: float = 1e-6,
        log_q: Tensor | None = None,
    ) -> None:
        super().__init__(temperature, eps, log_q)
        self.sampler = sampler

    def forward(
        self,
        query: Tensor,
        table: Tensor,
        positives: Tensor,
        weights: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> Tensor:
        negatives = self.sampler(positives)
        return sampled_softmax_loss(query, table, positives, negatives, self.temperature, self.eps, self.log_q, weights)


class InBatchSoftmaxLoss(RetrievalLoss):
    """loss_t = -log softmax of position t's positive among all items of the batch (in_batch_softmax_loss).

    Args:
        sampler: positives [rows] -> the items of the batch and each row's place among them.
        similarity_threshold: an item whose cosine with the positive is above it is no negative; None for no limit.
        mask_same_sequence: the items of a position's own sequence are no negatives as such. The batch then has an item
            once for every sequence that it occurs in, and it stays a negative if it occurs in another one.
        temperature, eps, log_q: as in RetrievalLoss.
    """

    def __init__(
        self,
        sampler: InBatchNegativesSampler,
        temperature: float = 0.05,
        eps: float = 1e-6,
        log_q: Tensor | None = None,
        similarity_threshold: float | None = None,
        mask_same_sequence: bool = False,
    ) -> None:
        super().__init__(temperature, eps, log_q)
        self.sampler, self.similarity_threshold = sampler, similarity_threshold
        self.mask_same_sequence = mask_same_sequence

    def forward(
        self,
        query: Tensor,
        table: Tensor,
        positives: Tensor,
        weights: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> Tensor:
        query, table = query.to(product_dtype(query)), table.to(product_dtype(table))
        item_sequences = None
        if not self.mask_same_sequence:
            sequences = None
            ids, places = self.sampler(positives)
        elif sequences is None:
            raise ValueError("hstu_ext.training: sequences must be given for mask_same_sequence, got None")
        else:
            pairs, places = self.sampler(sequences * table.shape[0] + positives)
            item_sequences, ids = pairs // table.shape[0], pairs % table.shape[0]
        return in_batch_softmax_loss(
            query,
            torch.nn.functional.embedding(ids, table),
            ids,
            sequences,
            log_q=None if self.log_q is None else self.log_q[ids],
            similarity_threshold=self.similarity_threshold,
            positives=places,
            item_sequence_ids=item_sequences,
            temperature=self.temperature,
            eps=self.eps,
            weights=weights,
        )


class FullSoftmaxLoss(RetrievalLoss):
    """loss_t = -log softmax of position t's positive over the whole catalogue.

    For small catalogues: the time is that of the product rows x num_items, the memory a tile of it.
    """

    capturable = True

    def forward(
        self,
        query: Tensor,
        table: Tensor,
        positives: Tensor,
        weights: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> Tensor:
        query, table = query.to(product_dtype(query)), table.to(product_dtype(table))
        return in_batch_softmax_loss(
            query,
            table,
            torch.arange(table.shape[0], device=table.device),
            log_q=self.log_q,
            positives=positives,
            temperature=self.temperature,
            eps=self.eps,
            weights=weights,
        )


def loss_from_config(config: Config, catalogue: Catalogue) -> RetrievalLoss:
    """The loss that a configuration asks for."""
    options = config.loss
    correction = log_q(catalogue.counts, options.log_q_exponent) if options.log_q else None
    common = (options.temperature, config.model.eps, correction)
    if options.kind == "sampled":
        return SampledSoftmaxLoss(UniformNegativesSampler(catalogue.num_items, options.num_negatives), *common)
    if options.kind == "in_batch":
        return InBatchSoftmaxLoss(
            InBatchNegativesSampler(), *common, options.similarity_threshold or None, options.mask_same_sequence
        )
    return FullSoftmaxLoss(*common)
