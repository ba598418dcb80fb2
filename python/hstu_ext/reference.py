"""HSTU attention as one would write it down: plain PyTorch, any floating point dtype, any device, differentiable.

Slow and with O(Lq * Lk) memory per sequence. Everything the compiled kernels do is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from hstu_ext.bias import RelativeBias
from hstu_ext.masks import IntervalMask, Mask, TargetMask, WindowMask

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_contexts: Tensor | None = None,
    num_targets: Tensor | None = None,
    target_group_size: int = 1,
    window_size: tuple[int, int] = (-1, -1),
    alpha: float = 1.0,
    rab: Tensor | None = None,
    *,
    func: Tensor | None = None,
    scaling_seqlen: int = -1,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    bias: RelativeBias | None = None,
) -> Tensor:
    """The definition of hstu_ext.hstu_attn_varlen_func, with the same arguments.

    For each sequence and head, with N = scaling_seqlen (-1: max_seqlen_q) and p = i + (Lk - Lq):

        S_ij = alpha * (q_i . k_j + rab[p, j]) + bias_ij
        P_ij = keep(i, j) * silu(S_ij) / N
        out_i = sum_j P_ij v_j

    with the bias of hstu_ext.bias.RelativeBias. All arithmetic is in the dtype of q. Rows that belong to no sequence,
    or that lie past seqused_q or max_seqlen_q, are 0.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    used_q, used_k = _to_list(seqused_q), _to_list(seqused_k)
    contexts, targets = _to_list(num_contexts), _to_list(num_targets)
    scaling = max_seqlen_q if scaling_seqlen == -1 else scaling_seqlen
    heads = q.shape[1]

    out = q.new_zeros(q.shape[0], heads, v.shape[2])
    for b in range(len(starts_q) - 1):
        len_q = min(starts_q[b + 1] - starts_q[b], max_seqlen_q)
        len_k = min(starts_k[b + 1] - starts_k[b], max_seqlen_k)
        if used_q is not None:
            len_q = min(len_q, used_q[b])
        if used_k is not None:
            len_k = min(len_k, used_k[b])
        rows = slice(starts_q[b], starts_q[b] + len_q)
        keys = slice(starts_k[b], starts_k[b] + len_k)

        masks: list[Mask]  # one for all heads, or one per head
        if func is not None:
            masks = [IntervalMask(bounds[:, rows]) for bounds in func]
        elif contexts is not None or targets is not None:
            num_c = contexts[b] if contexts is not None else 0
            num_t = targets[b] if targets is not None else 0
            masks = [TargetMask(num_c, num_t, target_group_size)]
        else:
            masks = [WindowMask(*window_size)]
        keep = torch.stack([mask.materialize(len_q, len_k, q.device) for mask in masks])

        scores = torch.einsum("ihd,jhd->hij", q[rows], k[keys])
        if rab is not None:
            scores = scores + rab[b, :, len_k - len_q : len_k, :len_k]
        scores = alpha * scores
        if bias is not None:
            scores = scores + bias.materialize(rows, keys).to(q.dtype)
        weights = torch.where(keep, silu(scores), 0) / scaling
        out[rows] = torch.einsum("hij,jhd->ihd", weights, v[keys])
    return out


def _to_list(values: Tensor | None) -> list[int] | None:
    return None if values is None else values.tolist()
