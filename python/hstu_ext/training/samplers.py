"""Where the negatives of a loss come from, and how likely each item was to be one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UniformNegativesSampler(nn.Module):
    """num_negatives items for every position, independent and uniform over the catalogue.

    Draws from torch's default generator of the device. The loss drops a negative that is its own positive.

    Args:
        num_items: of the catalogue.
        num_negatives: for every position.
    """

    def __init__(self, num_items: int, num_negatives: int) -> None:
        super().__init__()
        self.num_items, self.num_negatives = num_items, num_negatives

    def forward(self, positives: Tensor) -> Tensor:
        """positives int64 [rows] -> int64 [rows, num_negatives]"""
        return torch.randint(self.num_items, (positives.shape[0], self.num_negatives), device=positives.device)


class InBatchNegativesSampler(nn.Module):
    """The positives of the batch, every item once: each position's negatives are those of all others.

    The number of distinct items is a size that the host must know, so a GPU is waited for.
    """

    def forward(self, positives: Tensor) -> tuple[Tensor, Tensor]:
        """positives int64 [rows] -> the distinct ones, ascending int64 [items], and each row's place among them"""
        items, places = torch.unique(positives, return_inverse=True)
        return items, places


def log_q(counts: Tensor, exponent: float = 0.75) -> Tensor:
    """log of counts^exponent / sum(counts^exponent): how likely an item is to be drawn as a negative, about.

    An item that was never seen counts as seen once. In-batch negatives come with the frequency of the items, which an
    exponent below 1 flattens: 0.75 is that of Mikolov et al., "Distributed Representations of Words and Phrases and
    their Compositionality" (NeurIPS 2013), for sampled negatives.

    Args:
        counts: int64 [num_items], events of each item in the training data.
        exponent: 0 makes all items equal.

    Returns:
        float32 [num_items].
    """
    weights = counts.clamp(min=1).double().log() * exponent
    return (weights - weights.logsumexp(0)).float()
