"""Embeddings of what a model reads: items with their side features, and the features of users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

EMBEDDING_STD = 0.02  # of item embeddings at the start; they are scaled by sqrt(dim) on their way into the encoder


class ItemTower(nn.Module):
    """One row for every item: its embedding, plus a small network of its side features where there are any.

        row_i = E_i + W2 relu(W1 [features of i] + b1) + b2

    A categorical feature contributes an embedding of its own to the network's input, any other one its numbers.

    Args:
        num_items: of the catalogue.
        dim: of the rows.
        features: by name, int64 [num_items] (categories from 0) or floating point or bool [num_items, width].
        feature_dim: of the embedding of a category.
    """

    def __init__(
        self, num_items: int, dim: int, features: Mapping[str, Tensor] | None = None, feature_dim: int = 16
    ) -> None:
        super().__init__()
        self.num_items, self.dim = num_items, dim
        self.embedding = nn.Embedding(num_items, dim)
        nn.init.trunc_normal_(self.embedding.weight, std=EMBEDDING_STD, a=-2 * EMBEDDING_STD, b=2 * EMBEDDING_STD)
        self.categories = nn.ModuleDict()
        self.names: list[str] = sorted(features or {})
        width = 0
        for name in self.names:
            assert features is not None
            width += self._add_feature(name, features[name], feature_dim)
        self.network = (
            nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim)) if self.names else nn.Identity()
        )

    def _add_feature(self, name: str, values: Tensor, feature_dim: int) -> int:
        """Keeps the values and returns the width of their part in the network's input."""
        shape = list(values.shape)
        if values.shape[:1] != (self.num_items,) or values.dim() != (1 if values.dtype == torch.int64 else 2):
            raise ValueError(
                f"hstu_ext.models: item feature {name!r} must be int64 [{self.num_items}] or floating point "
                f"[{self.num_items}, width], got {values.dtype} {shape}"
            )
        if values.dtype == torch.int64:
            if self.num_items and int(values.min()) < 0:
                raise ValueError(f"hstu_ext.models: item feature {name!r} must be 0 or more, got {int(values.min())}")
            self.categories[name] = nn.Embedding(int(values.max()) + 1 if self.num_items else 1, feature_dim)
            self.register_buffer(f"feature_{name}", values.clone(), persistent=False)
            return feature_dim
        self.register_buffer(f"feature_{name}", values.to(torch.float32), persistent=False)
        return values.shape[1]

    def table(self) -> Tensor:
        """[num_items, dim]: the row of every item, before normalisation."""
        if not self.names:
            return self.embedding.weight
        parts = []
        for name in self.names:
            values: Tensor = getattr(self, f"feature_{name}")
            parts.append(self.categories[name](values) if name in self.categories else values)
        rows: Tensor = self.embedding.weight + self.network(torch.cat(parts, dim=1))
        return rows


class ContextTower(nn.Module):
    """One token for every contextual feature of a user, each from an embedding of its own.

    Args:
        sizes: the number of values of each feature, by name and in the order of the tokens.
        dim: of the tokens.
    """

    def __init__(self, sizes: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.names: Sequence[str] = tuple(sizes)
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in sizes.values())
        for embedding in self.embeddings:
            assert isinstance(embedding, nn.Embedding)
            nn.init.normal_(embedding.weight, std=dim**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """features int64 [batch, number of features] -> [batch, number of features, dim]"""
        return torch.stack([embed(column) for embed, column in zip(self.embeddings, features.unbind(1))], dim=1)
