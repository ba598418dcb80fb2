"""RetrievalGR: next-item retrieval with HSTU layers over jagged sequences.

The layer follows Zhai et al. 2024, "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for
Generative Recommendations", section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_ext import hstu_attn_varlen_func


class HSTULayer(nn.Module):
    """x + W2 (norm(attention(q, k, v)) * u), with u, v, q, k = silu(W1 norm(x)).

    q, k and v go to the attention as views of the one projected tensor. On a GPU the attention of an fp32 model runs in
    bf16.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, max_len: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.max_len = heads, head_dim, max_len
        self.norm_in = nn.LayerNorm(dim)
        self.uvqk = nn.Linear(dim, 4 * heads * head_dim, bias=False)
        self.norm_out = nn.LayerNorm(heads * head_dim)
        self.out = nn.Linear(heads * head_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """x [total, dim] -> [total, dim]"""
        uvqk = F.silu(self.uvqk(self.norm_in(x))).view(-1, 4, self.heads, self.head_dim)
        gate = uvqk[:, 0].flatten(1)
        if uvqk.is_cuda and uvqk.dtype == torch.float32:
            uvqk = uvqk.to(torch.bfloat16)
        _, v, q, k = uvqk.unbind(1)
        attended = hstu_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            window_size=(-1, 0),
            alpha=self.head_dim**-0.5,
            scaling_seqlen=self.max_len,
        )
        gated = self.norm_out(attended.flatten(1).to(gate.dtype)) * gate
        update: Tensor = self.out(self.dropout(gated))
        return x + update


class RetrievalGR(nn.Module):
    """Scores the whole catalogue by cosine similarity with the state after every event.

    Every call takes the packed events of a batch: items int64 [total], cu_seqlens int32 [batch + 1], max_seqlen the
    longest length (at most max_len). There is no padding item.
    """

    def __init__(
        self,
        num_items: int,
        *,
        dim: int = 64,
        heads: int = 2,
        head_dim: int = 32,
        layers: int = 2,
        max_len: int = 200,
        dropout: float = 0.2,
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        self.max_len, self.temperature = max_len, temperature
        self.item_embedding = nn.Embedding(num_items, dim)
        self.position_embedding = nn.Embedding(max_len, dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(HSTULayer(dim, heads, head_dim, max_len, dropout) for _ in range(layers))
        for embedding in (self.item_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=dim**-0.5)

    def forward(self, items: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """States [total, dim] of unit length; row t has seen the events of its sequence up to and including t."""
        if max_seqlen > self.max_len:
            raise ValueError(f"hstu_ext.models: max_seqlen must be at most {self.max_len}, got {max_seqlen}")
        starts = cu_seqlens.long()
        position = torch.arange(items.numel(), device=items.device)
        position = position - torch.repeat_interleave(starts[:-1], starts.diff(), output_size=items.numel())
        x = self.dropout(self.item_embedding(items) + self.position_embedding(position))
        for layer in self.layers:
            x = layer(x, cu_seqlens, max_seqlen)
        return F.normalize(x, dim=-1)

    def scores(self, states: Tensor) -> Tensor:
        """Cosine similarities [rows, num_items] of states [rows, dim]."""
        return states @ F.normalize(self.item_embedding.weight, dim=-1).T

    def loss(self, items: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Mean cross entropy of every next item over the whole catalogue, at the model's temperature."""
        states = self(items, cu_seqlens, max_seqlen)
        has_next = torch.ones_like(items, dtype=torch.bool)
        lengths = cu_seqlens.long().diff()
        has_next[cu_seqlens.long()[1:][lengths > 0] - 1] = False
        targets = items.roll(-1)[has_next]
        return F.cross_entropy(self.scores(states[has_next]) / self.temperature, targets)

    def next_item_scores(self, items: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Scores [batch, num_items] of what follows the last event. No sequence may be empty."""
        return self.scores(self(items, cu_seqlens, max_seqlen)[cu_seqlens.long()[1:] - 1])
