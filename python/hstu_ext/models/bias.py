"""The learned relative bias of HSTU's attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_ext.bias import RelativeBias
from hstu_ext.models.sequence import Layout

TABLE_STD = 0.02  # of the tables at the start
NUM_BUCKETS = 128  # the last one begins at exp(0.301 * 128) = 5e16, 1,700 years in microseconds


class RelativeTimePositionBias(nn.Module):
    """position_table[i - j] + time_table[bucket(|query time of i - time of j|)], the same for all heads.

    The query time of a token is that of the item to predict from it. forward gives what the attention takes: the two
    tables and the times, and with them nothing of size tokens x tokens.

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


def _precise(table: Tensor | None) -> Tensor | None:
    """In the dtype that the attention wants of tables."""
    return table if table is None or table.dtype == torch.float64 else table.float()
