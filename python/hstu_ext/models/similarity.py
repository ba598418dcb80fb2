"""What the two towers end in: normalisation, and how a query meets the items."""

from __future__ import annotations

from torch import Tensor, nn

from hstu_ext.ops.similarity import l2norm, l2norm_dot, topk_dot


class L2NormEmbeddingPostprocessor(nn.Module):
    """x / max(|x|, eps) over the last dimension, the last step of both towers.

    x [..., dim], floating point -> the same shape and dtype; under autocast in float32, as the losses have it.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return l2norm(x, self.eps)


class DotProductSimilarity(nn.Module):
    """query . item of embeddings that are normalised already: what retrieval and evaluation run on."""

    def forward(self, query: Tensor, items: Tensor) -> Tensor:
        """query [M, dim], items [N, dim] -> [M, N]"""
        return query @ items.T

    def topk(
        self, query: Tensor, items: Tensor, k: int, exclude: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best items of every query, exact, as hstu_ext.topk_dot: values [M, k] and indices int64 [M, k]."""
        return topk_dot(query, items, k, exclude)


class CosineSimilarity(nn.Module):
    """cos(query, item) of embeddings as they come, differentiable, without a normalised copy of the items."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, query: Tensor, items: Tensor) -> Tensor:
        """query [M, dim], items [N, dim] of one dtype -> [M, N]"""
        return l2norm_dot(query, items.to(query.dtype), self.eps)
