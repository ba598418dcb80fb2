"""The learned relative bias of HSTU's attention."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from hstu_ext._C import cells
from hstu_ext.bias import RelativeBias, time_bucket
from hstu_ext.models.sequence import Layout

TABLE_STD = 0.02  # of the tables at the start
NUM_BUCKETS = 128  # the last one begins at exp(0.301 * 128) = 5e16, 1,700 years in microseconds


class RelativeTimePositionBias(nn.Module):
    """position_table[i - j] + time_table[bucket(|query time of i - time of j|)], the same for all heads.

    The query time of a token is that of the item to predict from it. forward gives what the attention takes: the two
    tables and the times, and with them nothing of size tokens x tokens. Only a GPU build without the kernels for that
    gets the bias as a dense tensor, dense().

    Args:
        max_tokens: of a sequence; positions are up to max_tokens - 1 apart.
        position, time: which tables there are.
    """

    position_table: nn.Parameter | None
    time_table: nn.Parameter | None

    def __init__(self, max_tokens: int, position: bool = True, time: bool = False) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        for name, wanted, size in (
            ("position_table", position, 2 * max_tokens - 1),
            ("time_table", time, NUM_BUCKETS + 1),
        ):
            table = nn.Parameter(torch.empty(size).normal_(std=TABLE_STD)) if wanted else None
            self.register_parameter(name, table)

    def forward(self, layout: Layout) -> RelativeBias:
        position, time = _precise(self.position_table), _precise(self.time_table)
        if time is None:
            return RelativeBias(position)
        return RelativeBias(position, time, layout.query_times, layout.key_times)

    def dense(self, layout: Layout, alpha: float, dtype: torch.dtype) -> Tensor:
        """[batch, 1, longest, longest], over alpha, as the attention's rab is; outside of sequences of no consequence.

        The bias by position is the same for every sequence, and has the memory of one.
        """
        longest, batch = layout.max_seqlen, layout.cu_seqlens.shape[0] - 1
        bias = None
        if self.position_table is not None:
            middle = self.max_tokens - 1
            distances = self.position_table[middle - longest + 1 : middle + longest]  # 1 - longest to longest - 1
            distances = (distances / alpha).to(dtype)
            bias = distances.unfold(0, longest, 1).flip(1).expand(batch, longest, longest)  # [i, j] is that of i - j
        if self.time_table is not None:
            assert layout.query_times is not None
            assert layout.key_times is not None
            rows = layout.cu_seqlens[:-1, None].long() + torch.arange(longest, device=layout.cu_seqlens.device)
            rows = rows.clamp(max=layout.key_times.shape[0] - 1)
            bucket = time_bucket(layout.query_times[rows][:, :, None], layout.key_times[rows][:, None], NUM_BUCKETS)
            by_time = (self.time_table / alpha).to(dtype)[bucket]
            bias = by_time if bias is None else bias + by_time
        assert bias is not None
        return bias[:, None]


def _precise(table: Tensor | None) -> Tensor | None:
    """In the dtype that the attention wants of tables."""
    return table if table is None or table.dtype == torch.float64 else table.float()


@cache
def gpu_kernels() -> bool:
    """Whether this build computes the bias inside of its GPU kernels, forward and backward."""
    return any(name.startswith("attn_bwd") and name.endswith("_relative") for name in cells())
