"""The relative attention bias: what attention is given (RelativeBias), and its dense form in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RelativeBias", "time_bucket"]

BUCKET_WIDTH = 0.301
"""Of the logarithm of a time difference."""


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """Two learned tables that are added to the attention scores, by position and by time.

    For query row i at position p and key row j:

        bias_ij = position_table[clip(p - j)] + time_table[bucket(|query_times[i] - key_times[j]|)]
        bucket(x) = min(floor(ln(max(x, 1)) / 0.301), num_buckets)

    The first entry of position_table is distance -(max_len - 1), the last one max_len - 1, and larger distances count
    as those. Either table may be None. The attention functions compute this inside their kernels and reduce the
    gradients of the tables there; nothing of size Lq x Lk is made.

    Attributes:
        position_table: [2 * max_len - 1] or [heads, 2 * max_len - 1], float32 (float64 where q is float64).
        time_table: [num_buckets + 1] or [heads, num_buckets + 1], float32 (float64 where q is float64).
        query_times: int64 [total_q], the time of each packed query row; for a model that predicts the next item, the
            time of that item. In any unit, in any order, over the whole range of int64.
        key_times: int64 [total_k], the time of each packed key row.

    Source: the relative bias of Zhai et al., "Actions Speak Louder than Words" (ICML 2024).
    """

    position_table: Tensor | None = None
    time_table: Tensor | None = None
    query_times: Tensor | None = None
    key_times: Tensor | None = None

    def materialize(self, rows: slice, keys: slice) -> Tensor:
        """The dense bias [1 or heads, Lq, Lk] of one sequence, which owns these packed query rows and keys."""
        bias: Tensor | None = None
        if self.position_table is not None:
            reach = (self.position_table.shape[-1] - 1) // 2
            len_q, len_k = rows.stop - rows.start, keys.stop - keys.start
            device = self.position_table.device
            position = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
            distance = position - torch.arange(len_k, device=device)
            bias = _per_head(self.position_table)[:, distance.clamp(-reach, reach) + reach]
        if self.time_table is not None:
            if self.query_times is None or self.key_times is None:
                raise ValueError("query_times and key_times must be given with time_table, got None")
            bucket = time_bucket(self.query_times[rows, None], self.key_times[keys], self.time_table.shape[-1] - 1)
            by_time = _per_head(self.time_table)[:, bucket]
            bias = by_time if bias is None else bias + by_time
        if bias is None:
            raise ValueError("bias must have a position_table or a time_table, got neither")
        return bias


def _per_head(table: Tensor) -> Tensor:
    return table if table.dim() == 2 else table[None]


def time_bucket(query_times: Tensor, key_times: Tensor, num_buckets: int) -> Tensor:
    """floor(ln(max(|query_times - key_times|, 1)) / 0.301), at most num_buckets, computed in float64."""
    difference = torch.where(query_times >= key_times, query_times - key_times, key_times - query_times)
    # As an unsigned number: it may need all 64 bits, and is then negative here.
    high, low = difference >> 32 & 0xFFFFFFFF, difference & 0xFFFFFFFF
    x = high.double() * 2.0**32 + low.double()
    return (x.clamp(min=1).log() / BUCKET_WIDTH).floor().long().clamp(max=num_buckets)
