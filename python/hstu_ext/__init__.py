"""HSTU attention for generative recommenders: compiled CPU and CUDA kernels for any PyTorch."""

from hstu_ext._C import MissingKernelError, build_info, cells
from hstu_ext.ops.attention import hstu_attn_qkvpacked_func, hstu_attn_varlen_func
from hstu_ext.ops.similarity import in_batch_softmax_loss, l2norm, l2norm_dot, sampled_softmax_loss, topk_dot

__version__: str = build_info()["version"]

__all__ = [
    "MissingKernelError",
    "build_info",
    "cells",
    "hstu_attn_qkvpacked_func",
    "hstu_attn_varlen_func",
    "in_batch_softmax_loss",
    "l2norm",
    "l2norm_dot",
    "sampled_softmax_loss",
    "topk_dot",
]
