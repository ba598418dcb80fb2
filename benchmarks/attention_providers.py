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


def eager(problem: Problem, bias: Callable[[], torch.Tensor] | None = None) -> Attention:
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
        if bias is not None:
            scores = scores + bias()
        weights = F.silu(scores).masked_fill(~causal, 0.0) / n
        out = (weights @ padded(v)).transpose(1, 2).reshape(batch * n, problem.heads, problem.head_dim)
        return out[index]

    return attention


def eager_fits(problem: Problem) -> bool:
    """Whether eager's [batch, heads, N, N] tensors (six of them alive at the worst) fit half of the free memory."""
    need = 6 * len(problem.lengths) * problem.heads * problem.max_seqlen**2 * problem.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if problem.device == "cuda" else 8 * 2**30
    return need <= free / 2


class RelativeInputs:
    """Two tables and times: ascending, in seconds, gaps log-normal about ten minutes with many far longer."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        generator = torch.Generator().manual_seed(1)
        n, device = problem.max_seqlen, problem.device
        times = [
            1_600_000_000 + torch.randn(length + 1, generator=generator).mul(2).add(6.4).exp().long().cumsum(0)
            for length in problem.lengths
        ]
        self.query_times = torch.cat([t[1:] for t in times]).to(device)
        self.key_times = torch.cat([t[:-1] for t in times]).to(device)
        tables = (torch.randn(entries, generator=generator).mul(0.1) for entries in (2 * n - 1, 129))
        self.position_table, self.time_table = (table.to(device).requires_grad_() for table in tables)
        # Dense form: where each pair reads the tables.
        self._index: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        return self.position_table, self.time_table

    def dense(self) -> torch.Tensor:
        """[batch, 1, N, N] from the tables, differentiably; the places in the tables are made once."""
        if self._index is None:
            from hstu_ext.bias import time_bucket

            n = self.problem.max_seqlen
            position = torch.arange(n, device=self.problem.device)
            buckets, start = [], 0
            for length in self.problem.lengths:
                rows = slice(start, start + length)
                bucket = time_bucket(self.query_times[rows, None], self.key_times[rows], 128)
                buckets.append(F.pad(bucket, (0, n - length, 0, n - length)))
                start += length
            self._index = position[:, None] - position + n - 1, torch.stack(buckets)
        of_position, of_time = self._index
        return (self.position_table[of_position] + self.time_table[of_time]).to(self.problem.dtype)[:, None]


class _Biased:
    """An attention with tables of its own, whose gradients belong to its backward."""

    def __init__(self, inputs: RelativeInputs, attention: Attention) -> None:
        self.tables, self._attention = inputs.tables, attention

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._attention(q, k, v)


def relative(problem: Problem) -> Attention:
    """hstu_ext with the relative bias by position and time, computed inside the kernels."""
    from hstu_ext import RelativeBias, hstu_attn_varlen_func

    inputs = RelativeInputs(problem)
    cu, n, alpha = problem.cu_seqlens(), problem.max_seqlen, problem.alpha
    bias = RelativeBias(*inputs.tables, inputs.query_times, inputs.key_times)
    return _Biased(
        inputs,
        lambda q, k, v: hstu_attn_varlen_func(q, k, v, cu, cu, n, n, window_size=(-1, 0), alpha=alpha, bias=bias),
    )


def relative_rab(problem: Problem) -> Attention:
    """The same bias as a dense rab, made from the tables in the call; buckets are made before."""
    from hstu_ext import hstu_attn_varlen_func

    inputs = RelativeInputs(problem)
    cu, n, alpha = problem.cu_seqlens(), problem.max_seqlen, problem.alpha
    return _Biased(
        inputs,
        lambda q, k, v: hstu_attn_varlen_func(
            q, k, v, cu, cu, n, n, window_size=(-1, 0), alpha=alpha, rab=inputs.dense() / alpha, has_drab=True
        ),
    )


def relative_eager(problem: Problem) -> Attention:
    """The same in plain PyTorch over padded tensors; buckets are made before."""
    inputs = RelativeInputs(problem)
    return _Biased(inputs, eager(problem, inputs.dense))


PROVIDERS: dict[str, Callable[[Problem], Attention]] = {
    "hstu_ext": hstu_ext,
    "fbgemm": fbgemm,
    "meta": meta,
    "eager": eager,
    "relative": relative,
    "relative_rab": relative_rab,
    "relative_eager": relative_eager,
}
BIASED = ("relative", "relative_rab", "relative_eager")  # these give one result, the others another
QUADRATIC = ("eager", "relative_rab", "relative_eager")  # with tensors of batch * N * N elements
