"""What sequence encoders share: contexts first, actions between the items, positions, layers, the items taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hstu_ext.ops.jagged import jagged_concat, jagged_deinterleave, jagged_interleave, jagged_split


class Layout(NamedTuple):
    """Where the sequences of a packed batch of tokens lie.

    cu_seqlens: int32 or int64 [batch + 1], the row where each sequence starts and the last one ends
    max_seqlen: at least the longest sequence's tokens
    num_contexts: int32 [batch], contexts at the head of each sequence; None for none
    query_times: int64 [tokens], the time of the item to predict from each token; None for layers that read no times
    key_times: int64 [tokens], the time of each token; None likewise
    """

    cu_seqlens: Tensor
    max_seqlen: int
    num_contexts: Tensor | None
    query_times: Tensor | None = None
    key_times: Tensor | None = None


def sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 [total]: the sequence that each packed row belongs to, batch for rows past the last one's end."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], rows, right=True)


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """table[index], differentiable in table: on a GPU with atomic sums, two launches instead of a sort's many."""
    return table.index_select(0, index) if table.is_cuda else F.embedding(index, table)


def next_times(times: Tensor, cu_seqlens: Tensor, request_times: Tensor | None) -> Tensor:
    """int64 [total]: the time of each event's next one; of a sequence's last event, when the next one is asked for."""
    sequence = sequence_ids(cu_seqlens, times.shape[0])
    last = F.pad(sequence[:-1] != sequence[1:], (0, 1), value=True)
    asked = times if request_times is None else request_times[sequence.clamp(max=request_times.shape[0] - 1)]
    return torch.where(last, asked, times.roll(-1))


class SequenceBlock(nn.Module):
    """From embeddings of the events to states that have seen them, for any kind of layer.

    Tokens of a sequence are [c0 .. c(C-1) | i0 i1 ..] or, with actions interleaved, [c0 .. c(C-1) | i0 a0 i1 a1 ..].
    The position of a token in its sequence has a learned embedding. Dropout follows, then the layers, then the states
    of the item tokens are taken out again. Everything is packed. Rows past the end of the last sequence belong to none:
    what their states are is finite and of no consequence.

    Args:
        layers: modules (x [tokens, dim], Layout) -> [tokens, dim].
        dim: of every embedding.
        max_len: the most events of a sequence.
        num_contexts: C above.
        interleave: actions are tokens.
        dropout: of the embeddings.
        uses_times: the layers read the times of the tokens. An action has that of its item, a context that of the
            sequence's first event.
        recompute: keep only the input of each layer for the backward and run the layer again there.
    """

    capturable = False
    """Whether forward and backward can run inside of a CUDA graph: they read nothing back from the device."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        dim: int,
        max_len: int,
        num_contexts: int = 0,
        interleave: bool = False,
        dropout: float = 0.0,
        uses_times: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.uses_times = uses_times
        self.dim, self.max_len, self.num_contexts = dim, max_len, num_contexts
        self.interleave, self.recompute = interleave, recompute
        self.positions = nn.Embedding(self.max_tokens(max_len, num_contexts, interleave), dim)
        nn.init.normal_(self.positions.weight, std=dim**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)

    @staticmethod
    def max_tokens(max_len: int, num_contexts: int, interleave: bool) -> int:
        """Tokens of a sequence of max_len events."""
        return num_contexts + max_len * (2 if interleave else 1)

    def forward(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        actions: Tensor | None = None,
        contexts: Tensor | None = None,
        times: Tensor | None = None,
        request_times: Tensor | None = None,
    ) -> Tensor:
        """The state after every event.

        Args:
            items: [total, dim], one row an event.
            cu_seqlens: int32 or int64 [batch + 1] of the events.
            max_seqlen: at least the longest sequence's events, at most max_len.
            actions: [total, dim], given exactly where the block interleaves them.
            contexts: [batch, num_contexts, dim], given exactly where num_contexts is not 0.
            times: int64 [total], of every event, given exactly where the layers use them.
            request_times: int64 [batch], when each sequence's next event is asked for; None for its last one's time.

        Returns:
            [total, dim]; row t has seen the contexts, the events before t and item t, not action t.

        Raises:
            ValueError: max_seqlen is more than max_len, or actions, contexts or times are missing or not expected.
        """
        if max_seqlen > self.max_len:
            raise ValueError(f"hstu_ext.models: max_seqlen must be at most {self.max_len}, got {max_seqlen}")
        for name, value, wanted in (
            ("actions", actions, self.interleave),
            ("contexts", contexts, self.num_contexts),
            ("times", times, self.uses_times),
        ):
            if (value is not None) != bool(wanted):
                expected = "given, as the model was built with them" if wanted else "None, as the model has none"
                came = "None" if value is None else "a tensor"
                raise ValueError(f"hstu_ext.models: {name} must be {expected}, got {came}")
        total, batch = items.shape[0], cu_seqlens.shape[0] - 1
        x, event_offsets, num_contexts = items, cu_seqlens, None
        if actions is not None:
            x, event_offsets = jagged_interleave([items, actions.to(items.dtype)], [cu_seqlens, cu_seqlens], 2 * total)
        offsets, context_rows = event_offsets, batch * self.num_contexts
        context_offsets = torch.arange(batch + 1, device=cu_seqlens.device, dtype=cu_seqlens.dtype) * self.num_contexts
        if contexts is not None:
            rows = contexts.to(items.dtype).reshape(context_rows, self.dim)
            x, offsets = jagged_concat([rows, x], [context_offsets, event_offsets], context_rows + x.shape[0])
            num_contexts = torch.full((batch,), self.num_contexts, device=cu_seqlens.device, dtype=torch.int32)
        tokens = x.shape[0]
        sequence = sequence_ids(offsets, tokens)
        position = torch.arange(tokens, device=offsets.device, dtype=offsets.dtype) - offsets[sequence]
        query_times, key_times = None, None
        if times is not None:
            event = (position - self.num_contexts).clamp(min=0) // (2 if self.interleave else 1)
            event = (cu_seqlens[sequence] + event).clamp(max=total - 1)
            query_times, key_times = next_times(times, cu_seqlens, request_times)[event], times[event]
        position = position.clamp(max=self.positions.num_embeddings - 1)  # of rows that belong to no sequence
        x = self.dropout(x + rows_of(self.positions.weight, position))

        longest = self.max_tokens(max_seqlen, self.num_contexts, self.interleave)
        layout = Layout(offsets, longest, num_contexts, query_times, key_times)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, layout, use_reentrant=False)
            else:
                x = layer(x, layout)

        if contexts is not None:
            _, x = jagged_split(x, [context_offsets, event_offsets], [context_rows, tokens - context_rows])
        if actions is not None:
            x, _ = jagged_deinterleave(x, [cu_seqlens, cu_seqlens], [total, total])
        return x
