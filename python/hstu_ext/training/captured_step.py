"""Training steps as CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hstu_ext.data import Batch, SequenceBatches
from hstu_ext.data.batches import Chosen

SIZES = 32  # of batches that get a graph of their own: at most 1 / 32 of the largest batch is idle rows


class CapturedStep:
    """A whole step, from the users' numbers to the new parameters, as one launch.

    A step of a small model is hundreds of launches of a few microseconds each, with which the host cannot keep up. Here
    the batch is cut into a fixed number of rows (SequenceBatches.padded), so that the launches of one step serve the
    next. Batches are rounded up to one of 32 sizes; each size that comes up is captured once, in a tenth of a second.

    The result is that of the uncaptured step up to the order of sums: dropout and negatives come from torch's default
    generator of the device, whose state goes on from replay to replay as from step to step.

    Args:
        update: the step on a batch. It allocates nothing that lives longer, and reads nothing back from the device.
        gradients: the part of it that only computes gradients, to be tried before the capture.
        optimizer: capturable, with learning rates on the device.
        batches: what cuts the batches.
    """

    def __init__(
        self,
        update: Callable[[Batch], None],
        gradients: Callable[[Batch], object],
        optimizer: torch.optim.Optimizer,
        batches: SequenceBatches,
    ) -> None:
        self._update, self._gradients, self._optimizer, self._batches = update, gradients, optimizer, batches
        self._device = batches.log.items.device
        self._users = torch.full((batches.batch_size,), -1, device=self._device)
        self._rows_apart = max(1, -(-batches.batch_size * batches.max_len // SIZES))
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, chosen: Chosen) -> None:
        """The step on these users' batch."""
        count = chosen.users.numel()
        self._users[:count] = chosen.users
        if count < self._users.numel():
            self._users[count:] = -1
        rows = -(-chosen.total // self._rows_apart) * self._rows_apart
        if rows not in self._graphs:
            with torch.cuda.device(self._device):
                self._graphs[rows] = self._capture(rows)
        self._graphs[rows].replay()

    def clear(self) -> None:
        """Forgets the graphs, where the optimizer's state has moved."""
        self._graphs, self._pool = {}, None

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        state = torch.cuda.get_rng_state(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._gradients(self._batches.padded(self._users, rows))
            if not self._optimizer.state:
                self._make_optimizer_state()
            self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.set_rng_state(state, self._device)

        graph = torch.cuda.CUDAGraph()
        # The stream is given, for torch's own for captures is on the device of the first capture of the process.
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with _without_garbage_collection(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._update(self._batches.padded(self._users, rows))
        self._pool = graph.pool()
        return graph

    def _make_optimizer_state(self) -> None:
        """What the first step would allocate, as it is before that step: a step of nothing, taken back."""
        rates: list[Tensor] = [group["lr"] for group in self._optimizer.param_groups]
        kept = [rate.clone() for rate in rates]
        for group, rate in zip(self._optimizer.param_groups, rates):
            rate.zero_()
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        self._optimizer.step()
        for rate, value in zip(rates, kept):
            rate.copy_(value)
        for values in self._optimizer.state.values():
            values["step"].zero_()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A collection during a capture may destroy graphs of an earlier trainer, which breaks the capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
