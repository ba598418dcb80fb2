from typing import TypedDict

from torch import Tensor

class MissingKernelError(RuntimeError):
    """The kernel that a call needs was not compiled into this build."""

class MisalignedError(ValueError):
    """A GPU tensor's rows are not 16-byte aligned; the ops catch this and try again with copies."""

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cuda: str  # version of nvcc; empty: CPU kernels only
    cutlass: str
    archs: list[str]  # "80", ...
    set: str  # "ci", "default" or "full"
    cpu_variants: list[str]  # instruction sets of the CPU kernels
    cpu_variant: str  # the one in use

def build_info() -> BuildInfo:
    """Versions, architectures and the kernel set of this build."""

def cells() -> list[str]:
    """Names of the GPU kernels in this build, such as attn_fwd_sm80_bf16_d64_window."""

def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rab: Tensor | None,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_contexts: Tensor | None,
    num_targets: Tensor | None,
    target_group_size: int,
    window_left: int,
    window_right: int,
    alpha: float,
    func: Tensor | None,
    scaling_seqlen: int,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    stream: int,
    num_threads: int,
    /,
) -> None: ...
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rab: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    drab: Tensor | None,
    dq_accum: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_contexts: Tensor | None,
    num_targets: Tensor | None,
    target_group_size: int,
    window_left: int,
    window_right: int,
    alpha: float,
    func: Tensor | None,
    scaling_seqlen: int,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    deterministic: bool,
    stream: int,
    num_threads: int,
    /,
) -> None: ...
def attention_backward_scratch(q: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_seqlen_k: int, /) -> int:
    """Elements of dq_accum that attention_backward wants unless it is deterministic; 0 for none."""

def jagged_join(
    split: bool,
    interleave: bool,
    joined: Tensor,
    joined_offsets: Tensor,
    stream: int,
    num_threads: int,
    parts: int,
    /,
    *values_and_offsets: Tensor,
) -> None:
    """The parts' values, then their offsets. Writes joined, or with split the values, and joined_offsets."""

def jagged_dense(
    to_jagged: bool,
    dense: Tensor,
    values: Tensor,
    offsets: Tensor,
    padding: int,
    stream: int,
    num_threads: int,
    /,
) -> None:
    """Writes dense, or with to_jagged the values. padding: the bits of one element."""

def jagged_sizes(op: str, rows: int, is_list: bool, /, *offsets: Tensor) -> list[tuple[int, int]]:
    """The end of the last sequence and the length of the longest, of offsets on the CPU that must end within rows."""
