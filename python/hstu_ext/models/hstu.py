"""HSTU layers over packed tokens.

Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations" (ICML 2024), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_ext.models.sequence import Layout, SequenceBlock
from hstu_ext.ops.attention import hstu_attn_varlen_func


class HSTULayer(nn.Module):
    """x + W2 dropout(norm(attention(q, k, v)) * u), with u, v, q, k = silu(W1 norm(x)).

    The norms are layer norms without parameters. q, k and v go to the attention as views of the one projected tensor;
    it is causal, contexts see one another, and its sums are divided by max_tokens, whatever the batch. On a GPU the
    attention of an fp32 model runs in bf16, as its kernels have no fp32.

    Args:
        dim: of the tokens.
        heads: of the attention.
        head_dim: of q, k and v, a multiple of 8 up to 256.
        max_tokens: the divisor above.
        dropout: before W2.
        alpha: the factor of q . k; None is head_dim ** -0.5.
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, max_tokens: int, dropout: float = 0.0, alpha: float | None = None
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.max_tokens = heads, head_dim, max_tokens
        self.alpha = head_dim**-0.5 if alpha is None else alpha
        self.norm_in = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.uvqk = nn.Linear(dim, 4 * heads * head_dim, bias=False)
        self.norm_out = nn.LayerNorm(heads * head_dim, eps=1e-6, elementwise_affine=False)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(heads * head_dim, dim)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x [tokens, dim] -> [tokens, dim]"""
        uvqk = F.silu(self.uvqk(self.norm_in(x))).view(-1, 4, self.heads, self.head_dim)
        gate = uvqk[:, 0].flatten(1)
        if uvqk.is_cuda and uvqk.dtype == torch.float32:
            uvqk = uvqk.to(torch.bfloat16)
        _, v, q, k = uvqk.unbind(1)
        attended = hstu_attn_varlen_func(
            q,
            k,
            v,
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            layout.num_contexts,
            window_size=(-1, 0),
            alpha=self.alpha,
            scaling_seqlen=self.max_tokens,
        )
        gated = self.norm_out(attended.flatten(1).to(gate.dtype)) * gate
        update: Tensor = self.out(self.dropout(gated))
        return x + update


class HSTUBlock(SequenceBlock):
    """Layers of HSTU between the packing and the unpacking of SequenceBlock.

    Args:
        dim, max_len, num_contexts, interleave, recompute: as in SequenceBlock.
        num_layers, heads, head_dim, alpha: as in HSTULayer.
        dropout: of the embeddings and of every layer.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        heads: int,
        head_dim: int,
        max_len: int,
        num_contexts: int = 0,
        interleave: bool = False,
        dropout: float = 0.0,
        alpha: float | None = None,
        recompute: bool = False,
    ) -> None:
        tokens = self.max_tokens(max_len, num_contexts, interleave)
        super().__init__(
            [HSTULayer(dim, heads, head_dim, tokens, dropout, alpha) for _ in range(num_layers)],
            dim=dim,
            max_len=max_len,
            num_contexts=num_contexts,
            interleave=interleave,
            dropout=dropout,
            recompute=recompute,
        )
