"""Implementations of causal HSTU attention that bench_attention.py times, all behind one call.

A provider is built once for a problem and then called with (q, k, v): whatever its interface needs besides is made
before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """A batch of jagged sequences: q, k and v are [sum(lengths), heads, head_dim]."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def alpha(self) -> float:
        return self.head_dim**-0.5

    @property
    def kept_pairs(self) -> int:
        """Pairs (i, j) of one head with j <= i."""
        return sum(n * (n + 1) // 2 for n in self.lengths)

    def flops(self, direction: str) -> float:
        return (4 if direction == "fwd" else 10) * self.head_dim * self.kept_pairs * self.heads

    def nbytes(self, direction: str) -> float:
        """q, k, v, out once; backward: q, k, v, dout, dq, dk, dv once."""
        return (4 if direction == "fwd" else 7) * self.rows * self.heads * self.head_dim * self.dtype.itemsize

    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q, k, v and the gradient of the output; q, k and v require gradients."""
        shape = (self.rows, self.heads, self.head_dim)
        q, k, v, dout = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(4))
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def hstu_ext(problem: Problem) -> Attention:
    from hstu_ext import hstu_attn_varlen_func

    cu, n, alpha = problem.cu_seqlens(), problem.max_seqlen, problem.alpha
    return lambda q, k, v: hstu_attn_varlen_func(q, k, v, cu, cu, n, n, window_size=(-1, 0), alpha=alpha)


def fbgemm(problem: Problem) -> Attention:
    """FBGEMM's experimental/hstu: the kernels its own dispatch picks for this GPU."""
    from hstu import hstu_attn_varlen_func

    cu, n, alpha = problem.cu_seqlens(), problem.max_seqlen, problem.alpha
    return lambda q, k, v: hstu_attn_varlen_func(
        q, k, v, cu, cu, None, None, n, n, n, None, None, window_size=(-1, 0), alpha=alpha
    )


def meta(problem: Problem) -> Attention:
    """generative-recommenders' compiled ops/cpp/hstu_attention."""
    from generative_recommenders.ops.cpp.cuda_hstu_attention import cuda_hstu_mha

    cu, n, alpha = problem.cu_seqlens(), problem.max_seqlen, problem.alpha
    return lambda q, k, v: cuda_hstu_mha(n, alpha, q, k, v, seq_offsets=cu, causal=True)


def eager(problem: Problem) -> Attention:
    """The definition over padded tensors, as one would write it in PyTorch."""
    batch, n = len(problem.lengths), problem.max_seqlen
    lengths = torch.tensor(problem.lengths, device=problem.device)
    sequence = torch.repeat_interleave(torch.arange(batch, device=problem.device), lengths)
    position = torch.arange(problem.rows, device=problem.device) - problem.cu_seqlens()[:-1].long()[sequence]
    index = sequence * n + position
    causal = torch.ones(n, n, dtype=torch.bool, device=problem.device).tril()

    def padded(x: torch.Tensor) -> torch.Tensor:
        dense = x.new_zeros(batch * n, problem.heads, problem.head_dim).index_copy(0, index, x)
        return dense.view(batch, n, problem.heads, problem.head_dim).transpose(1, 2)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = problem.alpha * padded(q) @ padded(k).transpose(2, 3)
        weights = F.silu(scores).masked_fill(~causal, 0.0) / n
        out = (weights @ padded(v)).transpose(1, 2).reshape(batch * n, problem.heads, problem.head_dim)
        return out[index]

    return attention


def eager_fits(problem: Problem) -> bool:
    """Whether eager's [batch, heads, N, N] tensors (six of them alive at the worst) fit half of the free memory."""
    need = 6 * len(problem.lengths) * problem.heads * problem.max_seqlen**2 * problem.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if problem.device == "cuda" else 8 * 2**30
    return need <= free / 2


PROVIDERS: dict[str, Callable[[Problem], Attention]] = {
    "hstu_ext": hstu_ext,
    "fbgemm": fbgemm,
    "meta": meta,
    "eager": eager,
}
