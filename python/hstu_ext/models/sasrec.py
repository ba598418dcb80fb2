"""SASRec, the softmax transformer that HSTU is measured against, with the interface of HSTUBlock.

Kang and McAuley, "Self-Attentive Sequential Recommendation" (ICDM 2018).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hstu_ext.models.sequence import Layout, SequenceBlock
from hstu_ext.ops.jagged import dense_to_jagged, jagged_to_dense


class SASRecLayer(nn.Module):
    """y = x + W2 attention(norm(x)), then y + dropout(V2 dropout(relu(V1 norm(y)))): a causal pre-norm transformer.

    Softmax attention is torch's scaled_dot_product_attention, which wants a dense batch: q, k and v are padded to the
    batch's longest sequence around it, and nothing else is. Padding lies after every real key, where a causal mask
    keeps it from being seen.

    Args:
        dim: of the tokens.
        heads: of the attention.
        head_dim: of q, k and v.
        ffn_dim: width of the feed-forward network.
        dropout: of attention weights and of the feed-forward network.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, ffn_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x [tokens, dim] -> [tokens, dim]"""
        qkv = self.qkv(self.norm_attention(x)).view(-1, 3, self.heads, self.head_dim)
        dense = jagged_to_dense(qkv, layout.cu_seqlens, layout.max_seqlen)  # [batch, longest, 3, heads, head_dim]
        q, k, v = dense.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)
        x = x + self.out(dense_to_jagged(attended.contiguous(), layout.cu_seqlens, x.shape[0]).flatten(1))
        hidden = self.dropout(F.relu(self.ffn_in(self.norm_ffn(x))))
        update: Tensor = self.dropout(self.ffn_out(hidden))
        return x + update


class SASRecBlock(SequenceBlock):
    """Layers of SASRec between the packing and the unpacking of SequenceBlock.

    Args:
        dim, max_len, num_contexts, interleave, recompute: as in SequenceBlock.
        num_layers, heads, head_dim, ffn_dim: as in SASRecLayer.
        dropout: of the embeddings and of every layer.
    """

    capturable = True

    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        heads: int,
        head_dim: int,
        ffn_dim: int,
        max_len: int,
        num_contexts: int = 0,
        interleave: bool = False,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            [SASRecLayer(dim, heads, head_dim, ffn_dim, dropout) for _ in range(num_layers)],
            dim=dim,
            max_len=max_len,
            num_contexts=num_contexts,
            interleave=interleave,
            dropout=dropout,
            recompute=recompute,
        )
