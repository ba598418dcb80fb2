"""Shared fixtures: GPU tests skip themselves, and every buffer that an op allocates is full of NaN between guards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

GUARD = 256  # elements before and after a buffer
LARGEST_GUARDED = 1 << 28  # elements; larger buffers are left alone, they are tests of their own


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "plain_allocations: the op's buffers are torch's own, without NaN and guards")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """PyTorch's threads cost more than they bring on tensors this small. Tests of the op ask for more themselves."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


class GuardedAllocations:
    """Stands in for Tensor.new_empty, new_zeros, torch.empty_like, and what _C allocates small results with.

    A buffer lies between two guards of NaN. An empty one is filled with NaN too, so that an element that is never
    written, or is read before it is written, shows up in the results.
    """

    def __init__(self) -> None:
        self.guards: list[Tensor] = []
        self._new_empty = Tensor.new_empty

    def empty_like(self, like: Tensor, **options: object) -> Tensor:
        return self._allocate(like, None, tuple(like.shape), options)

    def new_empty(self, like: Tensor, *size: object, **options: object) -> Tensor:
        return self._allocate(like, None, size, options)

    def empty_strided(self, device: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        if tuple(stride) != torch.empty(size, device="meta").stride():
            return torch.empty_strided(size, stride, dtype=dtype, device=device)
        return self.new_empty(torch.empty(0, dtype=dtype, device=device), *size)

    def new_zeros(self, like: Tensor, *size: object, **options: object) -> Tensor:
        return self._allocate(like, 0, size, options)

    def _allocate(self, like: Tensor, value: float | None, size: tuple, options: dict) -> Tensor:
        options.pop("memory_format", None)  # the ops ask for contiguous buffers only
        dtype = options.get("dtype") or like.dtype
        shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        count = math.prod(shape)
        plain = type(like) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
        if not plain or not dtype.is_floating_point or count > LARGEST_GUARDED:
            result = self._new_empty(like, *size, **options)
            return result if value is None else result.fill_(value)
        with torch.no_grad():
            buffer = self._new_empty(like, count + 2 * GUARD, dtype=dtype).fill_(math.nan)
            self.guards += [buffer[:GUARD], buffer[GUARD + count :]]
            # Not a view of the buffer as far as autograd knows, as a buffer of torch's own would not be.
            result = self._new_empty(like, 0, dtype=dtype).set_(
                buffer.untyped_storage(), GUARD, shape, torch.empty(shape, device="meta").stride()
            )
            return result if value is None else result.fill_(value)

    def check(self) -> None:
        """Fails where something was written outside a buffer."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        broken = [guard for guard in self.guards if not guard.isnan().all()]
        assert not broken, f"{len(broken)} guards beside the op's buffers were written to"


@pytest.fixture(autouse=True)
def guarded_allocations(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[GuardedAllocations | None]:
    if request.node.get_closest_marker("plain_allocations"):
        yield None
        return
    allocations = GuardedAllocations()
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: allocations.empty_like(x, **kw))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **kw: allocations.new_empty(self, *size, **kw))
    monkeypatch.setattr(torch, "empty_like", lambda like, **kw: allocations.new_empty(like, like.shape))
    monkeypatch.setattr(Tensor, "new_zeros", lambda self, *size, **kw: allocations.new_zeros(self, *size, **kw))
    for device in ("cpu", "cuda"):
        allocate = partial(allocations.empty_strided, device)
        monkeypatch.setattr(torch._C._dynamo.guards, f"_empty_strided_{device}", allocate, raising=False)
    yield allocations
    monkeypatch.undo()
    allocations.check()
