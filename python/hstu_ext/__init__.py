"""HSTU attention for generative recommenders: compiled CPU and CUDA kernels for any PyTorch."""

import torch as _torch  # noqa: F401  (before _C, whatever libstdc++ that was linked with)

from hstu_ext._C import MissingKernelError, build_info, cells
from hstu_ext.bias import RelativeBias
from hstu_ext.ops.attention import hstu_attn_qkvpacked_func, hstu_attn_varlen_func
from hstu_ext.ops.jagged import (
    dense_to_jagged,
    jagged_concat,
    jagged_deinterleave,
    jagged_interleave,
    jagged_split,
    jagged_to_dense,
    lengths_to_offsets,
    offsets_to_lengths,
)
from hstu_ext.ops.norm import gated_norm
from hstu_ext.ops.similarity import in_batch_softmax_loss, l2norm, l2norm_dot, sampled_softmax_loss, topk_dot

__version__: str = build_info()["version"]

__all__ = [
    "MissingKernelError",
    "RelativeBias",
    "build_info",
    "cells",
    "dense_to_jagged",
    "gated_norm",
    "hstu_attn_qkvpacked_func",
    "hstu_attn_varlen_func",
    "in_batch_softmax_loss",
    "jagged_concat",
    "jagged_deinterleave",
    "jagged_interleave",
    "jagged_split",
    "jagged_to_dense",
    "l2norm",
    "l2norm_dot",
    "lengths_to_offsets",
    "offsets_to_lengths",
    "sampled_softmax_loss",
    "topk_dot",
]
