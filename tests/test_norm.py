"""The gated norm against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hstu_ext import MissingKernelError, build_info, gated_norm

EPS = 1e-6
# rows, heads, width, dim: whole vectors and not, columns that do not count, rows of many vectors a lane
SHAPES = {
    "five-columns": (3, 1, 5, 5),
    "d50": (70, 1, 56, 50),
    "d50-whole": (70, 1, 50, 50),
    "heads-of-25": (33, 2, 32, 25),
    "d64": (40, 1, 64, 64),
    "heads-of-32": (40, 4, 32, 32),
    "padded-vectors": (9, 1, 72, 64),
    "long": (5, 2, 2560, 2500),
    "no-rows": (0, 2, 8, 5),
}


def definition(x: Tensor, gate: Tensor | None, dim: int) -> Tensor:
    columns = x[..., :dim].flatten(1)
    centred = columns - columns.mean(1, keepdim=True)
    normalised = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    return normalised if gate is None else normalised * gate


def drawn(shape: tuple[int, int, int, int], dtype: torch.dtype, gate_dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, with a mean that is far from 0, gate and dout."""
    rows, heads, width, dim = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, heads, width, generator=generator) * 0.3 + 2
    gate = torch.randn(rows, heads * dim, generator=generator)
    dout = torch.randn(rows, heads * dim, generator=generator)
    return [x.to(device, dtype), gate.to(device, gate_dtype), dout.to(device, gate_dtype)]


def results(x: Tensor, gate: Tensor | None, dout: Tensor, function: object) -> list[Tensor]:
    """The output and the gradients of x and gate."""
    leaves = [each.detach().requires_grad_() for each in (x, gate) if each is not None]
    out = function(*leaves)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_near(ours: list[Tensor], x: Tensor, gate: Tensor | None, dout: Tensor, dim: int) -> None:
    wide = [None if each is None else each.double() for each in (x, gate, dout)]
    exact = results(wide[0], wide[1], wide[2], lambda x, gate=None: definition(x, gate, dim))  # type: ignore[arg-type]
    for name, got, expected in zip(("out", "dx", "dgate"), ours, exact):
        assert got.isfinite().all(), name
        unit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}[got.dtype]
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(got.double(), expected, rtol=unit, atol=4 * unit * max(scale, 1e-3), msg=name)


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "plain"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32(shape: tuple[int, int, int, int], gated: bool, device: str) -> None:
    x, gate, dout = drawn(shape, torch.float32, torch.float32, device)
    dim = shape[3]
    if not gated:
        gate, x, dim = None, x[..., :dim].contiguous(), dim
    found = results(x, gate, dout, gated_norm)
    assert_near(found, x, gate, dout, dim)
    assert not found[1][..., dim:].any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_may_differ(
    shape: tuple[int, int, int, int], dtype: torch.dtype, gate_dtype: torch.dtype, device: str
) -> None:
    x, gate, dout = drawn(shape, dtype, gate_dtype, device)
    found = results(x, gate, dout, gated_norm)
    assert [each.dtype for each in found] == [gate_dtype, dtype, gate_dtype]
    exact = results(x.double(), gate.double(), dout.double(), lambda x, gate: definition(x, gate, shape[3]))
    # Of torch's own ops in the wider dtype, and one rounding more.
    unit = max(2e-6, torch.finfo(dtype).eps, torch.finfo(gate_dtype).eps)
    for name, got, expected in zip(("out", "dx", "dgate"), found, exact):
        largest = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(got.double(), expected, rtol=2 * unit, atol=4 * unit * largest, msg=name)


def test_dtype_of_the_result(device: str) -> None:
    x, _, _ = drawn((5, 1, 16, 16), torch.float32, torch.float32, device)
    out = gated_norm(x[:, 0], dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), definition(x.double(), None, 16), rtol=1e-2, atol=1e-2)


def test_views(device: str) -> None:
    """Every second row of a wider tensor, and columns that are not side by side."""
    x, gate, dout = drawn((24, 2, 40, 32), torch.float32, torch.float32, device)
    whole = results(x[::2], gate[::2], dout[::2], gated_norm)
    parts = results(x[::2].contiguous(), gate[::2].contiguous(), dout[::2].contiguous(), gated_norm)
    for one, other in zip(whole, parts):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    turned = results(x.mT.contiguous().mT, gate.T.contiguous().T, dout.T.contiguous().T, gated_norm)
    for one, other in zip(turned, results(x, gate, dout, gated_norm)):
        torch.testing.assert_close(one, other)
    expanded = results(x, gate, dout[:1, :1].expand(24, 64), gated_norm)
    for one, other in zip(expanded, results(x, gate, dout[:1, :1].repeat(24, 64), gated_norm)):
        torch.testing.assert_close(one, other)


def test_a_constant_row_is_zero(device: str) -> None:
    x = torch.full((4, 1, 24), 3.0, device=device)
    out, dx = results(x, None, torch.ones(4, 24, device=device), gated_norm)
    assert not out.any()
    assert dx.abs().max() < 1e-2  # 1 / sqrt(eps) times the rounding of a sum of 24


def test_gradcheck() -> None:
    x, gate, _ = drawn((3, 2, 6, 5), torch.float64, torch.float64, "cpu")
    torch.autograd.gradcheck(gated_norm, (x.requires_grad_(), gate.requires_grad_()))


@pytest.mark.plain_allocations
def test_compiled() -> None:
    torch._dynamo.reset()
    x, gate, dout = drawn((7, 2, 8, 5), torch.float32, torch.float32, "cpu")
    compiled = torch.compile(gated_norm, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(results(x, gate, dout, compiled), results(x, gate, dout, gated_norm)):
        torch.testing.assert_close(ours, theirs)


def test_what_is_refused() -> None:
    x = torch.zeros(4, 2, 8)
    with pytest.raises(TypeError, match=r"hstu_ext.gated_norm: x must be a tensor, got list"):
        gated_norm([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gate must be a tensor, got float"):
        gated_norm(x, 1.0)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"x must be floating point \[rows, heads, width\], got torch.int64 \[4, 1, 2\]"
    ):
        gated_norm(torch.zeros(4, 2, dtype=torch.int64))
    for shape in ((4, 17), (4, 18), (3, 16), (4, 0), (4,)):
        with pytest.raises(ValueError, match=r"gate must be \[4, a multiple of 2 up to 16\], got"):
            gated_norm(x, torch.zeros(shape))
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        gated_norm(x, eps=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(bool(build_info()["cuda"]), reason="this build has GPU kernels")
def test_a_build_without_gpu_kernels_says_so() -> None:
    with pytest.raises(MissingKernelError, match=r"hstu_ext.gated_norm: x is on a GPU and this build has CPU kernels"):
        gated_norm(torch.zeros(4, 8, device="cuda"))
