"""How arguments reach the compiled module. A GPU tensor is stood in for by an object with what is read of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from hstu_ext import _C, MissingKernelError, build_info, cells
from hstu_ext.ops.attention import _Problem


@dataclass
class GpuTensor:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int = 4096
    dtype: torch.dtype = torch.bfloat16
    is_cuda: bool = True
    device: str = "cuda:63"

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return 63

    def new_empty(self, *shape: int) -> GpuTensor:
        return replace(self, shape=shape, strides=torch.empty(shape, device="meta").stride())


ROWS = GpuTensor((4, 2, 64), (128, 64, 1))
OFFSETS = GpuTensor((2,), (1,), dtype=torch.int32)
PROBLEM = _Problem(OFFSETS, OFFSETS, 4, 4, None, None, 1, -1, 0, 1.0, None, -1, None, None, None, None)  # type: ignore[arg-type]


def forward(q: object = ROWS, k: object = ROWS, v: object = ROWS, out: object = ROWS, *, stream: object = 0) -> None:
    _C.attention_forward(q, k, v, None, None, None, out, *PROBLEM, stream, 1)


@pytest.mark.parametrize(
    "q",
    [
        replace(ROWS, address=4104),
        replace(ROWS, strides=(132, 64, 1)),
        replace(ROWS, strides=(128, 68, 1)),
    ],
    ids=["address", "row stride", "head stride"],
)
def test_misaligned_rows(q: GpuTensor) -> None:
    with pytest.raises(_C.MisalignedError, match="q must have rows aligned to 16 bytes"):
        forward(q)


def test_strides_of_one_element_dimensions_do_not_matter() -> None:
    q = GpuTensor((4, 1, 64), (64, 3, 1))
    with pytest.raises(RuntimeError, match=r"CPU kernels only|CUDA|compute capability|invalid device") as caught:
        forward(q, q, q, q)
    assert caught.type is not _C.MisalignedError


@pytest.mark.skipif(bool(build_info()["cuda"]), reason="this build has GPU kernels")
def test_gpu_tensors_in_a_cpu_build() -> None:
    count = 1 << 20  # more than what _C allocates by other means than new_empty
    rows, offsets = GpuTensor((count, 64), (64, 1)), OFFSETS
    for call in (
        forward,
        lambda: _C.jagged_join(None, False, [rows], [offsets], None, offsets),
        lambda: _C.jagged_separate(None, False, rows, [offsets], [count]),
        lambda: _C.jagged_dense(None, False, rows, offsets, count, 0),
        lambda: _C.jagged_dense(None, True, rows.new_empty(1, count, 64), offsets, count, 0),
    ):
        with pytest.raises(MissingKernelError, match=r"CPU kernels only.*HSTU_EXT_CUDA=on"):
            call()


def test_only_half_precision_on_gpu() -> None:
    q = replace(ROWS, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"q must be torch\.float16 or torch\.bfloat16 on a GPU, got torch\.float32"):
        forward(q, q, q, q)


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match="k must be on cuda:63 like q, got cpu"):
        forward(k=torch.zeros(4, 2, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="q must be on cpu or cuda, got meta"):
        forward(torch.zeros(4, 2, 64, dtype=torch.bfloat16, device="meta"))


def test_things_that_are_no_tensors_or_numbers() -> None:
    with pytest.raises(TypeError, match="k must be a tensor, got list"):
        forward(k=[1.0])
    with pytest.raises(TypeError, match="stream must be a 64-bit int, got float"):
        forward(stream=0.5)
    with pytest.raises(TypeError, match="too few arguments"):
        _C.attention_forward(ROWS)  # type: ignore[call-arg]


def test_dtypes_that_are_not_supported() -> None:
    with pytest.raises(ValueError, match=r"v must be of a supported type, got torch\.complex64"):
        forward(v=replace(ROWS, dtype=torch.complex64))


def test_scratch_is_for_gpus() -> None:
    q, offsets = torch.zeros(4096, 2, 64), torch.tensor([0, 4096])
    assert _C.attention_backward_scratch(q, q, offsets, 4096, False) == 0


@pytest.mark.skipif(not build_info()["cuda"], reason="this build has no GPU kernels")
@pytest.mark.skipif(
    any("bwd_sm90_" in cell for cell in cells()) and not torch.cuda.is_available(),
    reason="which family's scratch it is depends on the GPU",
)
def test_scratch_of_long_sequences() -> None:
    rows = GpuTensor((16384, 2, 64), (128, 64, 1))
    assert _C.attention_backward_scratch(rows, rows, OFFSETS, 16384, False) >= 16384 * 2 * 64


def test_no_streams_in_the_compiled_module() -> None:
    """Two copies of the C++ library in one process, one linked statically, crash in each other's stream locales."""
    assert _C.__file__ is not None
    binary = Path(_C.__file__).read_bytes()
    for symbol in (b"_ZNSo", b"_ZSt4cout", b"_ZNSt6locale", b"basic_ostringstream"):
        assert symbol not in binary, symbol
