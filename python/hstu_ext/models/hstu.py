"""HSTU layers over packed tokens.

Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations" (ICML 2024), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_ext.models.bias import RelativeTimePositionBias
from hstu_ext.models.sequence import Layout, SequenceBlock
from hstu_ext.ops._shared import product_dtype
from hstu_ext.ops.attention import hstu_attn_qkvpacked_func
from hstu_ext.ops.norm import gated_norm

ALIGNMENT = 8  # the attention's kernels take heads whose width is a multiple of it


class HSTULayer(nn.Module):
    """x + W2 dropout(norm(attention(q, k, v)) * u), with q, k, v, u = silu(W1 norm(x)).

    The norms are layer norms without parameters. q, k and v go to the attention as views of the one projected tensor;
    it is causal, contexts see one another, and its sums are divided by max_tokens, whatever the batch. On a GPU the
    attention of an fp32 model runs in bf16, as its kernels have no fp32.

    Heads may have any width. For one that is no multiple of 8, W1 gets rows of zeros at the end of each head of q, k
    and v on its way into the product: silu(0) = 0 there adds nothing to q . k, and the columns of v are cut off again.

    With a bias, the score of tokens i and j is alpha q_i . k_j + b_ij, as RelativeTimePositionBias has it.

    Args:
        dim: of the tokens.
        heads: of the attention.
        head_dim: of q, k and v, up to 256.
        max_tokens: the divisor above.
        dropout: before W2.
        alpha: the factor of q . k; None is head_dim ** -0.5.
        bias: what scores depend on besides: none, position, time or time+position.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        max_tokens: int,
        dropout: float = 0.0,
        alpha: float | None = None,
        bias: str = "none",
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.max_tokens = heads, head_dim, max_tokens
        self.alpha = head_dim**-0.5 if alpha is None else alpha
        self.qkvu = nn.Linear(dim, 4 * heads * head_dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(heads * head_dim, dim)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.bias = None
        if bias != "none":
            self.bias = RelativeTimePositionBias(max_tokens, "position" in bias, "time" in bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x [tokens, dim] -> [tokens, dim]"""
        weight, width = self._aligned_weight()
        projected = F.silu(F.linear(gated_norm(x, dtype=product_dtype(x)), weight))
        qkv, gate = torch.split(projected, [3 * self.heads * width, self.heads * self.head_dim], dim=1)
        if qkv.is_cuda and qkv.dtype == torch.float32:
            qkv = qkv.to(torch.bfloat16)
        attended = hstu_attn_qkvpacked_func(
            qkv.view(-1, 3, self.heads, width),
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.num_contexts,
            window_size=(-1, 0),
            alpha=self.alpha,
            scaling_seqlen=self.max_tokens,
            bias=None if self.bias is None else self.bias(layout),
        )
        update: Tensor = self.out(self.dropout(gated_norm(attended, gate)))
        return x + update

    def _aligned_weight(self) -> tuple[Tensor, int]:
        """W1 with heads of q, k and v as wide as kernels want them, and that width."""
        weight: Tensor = self.qkvu.weight
        padding = -self.head_dim % ALIGNMENT
        if padding == 0:
            return weight, self.head_dim
        heads = 3 * self.heads
        qkv, gate = torch.split(weight, [heads * self.head_dim, self.heads * self.head_dim])
        padded = F.pad(qkv.view(heads, self.head_dim, -1), (0, 0, 0, padding))
        return torch.cat([padded.flatten(0, 1), gate]), self.head_dim + padding


class HSTUBlock(SequenceBlock):
    """Layers of HSTU between the packing and the unpacking of SequenceBlock.

    Args:
        dim, max_len, num_contexts, interleave, recompute: as in SequenceBlock.
        num_layers, heads, head_dim, alpha, bias: as in HSTULayer.
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
        max_len: int,
        num_contexts: int = 0,
        interleave: bool = False,
        dropout: float = 0.0,
        alpha: float | None = None,
        bias: str = "none",
        recompute: bool = False,
    ) -> None:
        tokens = self.max_tokens(max_len, num_contexts, interleave)
        super().__init__(
            [HSTULayer(dim, heads, head_dim, tokens, dropout, alpha, bias) for _ in range(num_layers)],
            dim=dim,
            max_len=max_len,
            num_contexts=num_contexts,
            interleave=interleave,
            dropout=dropout,
            uses_times="time" in bias,
            recompute=recompute,
        )
