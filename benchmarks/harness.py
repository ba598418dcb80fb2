"""What every benchmark shares: timers, the machine's own rates, the row format, and comparison with earlier rows.

A timer is `CudaTimer` or `CpuTimer`; benchmarks are written against the protocol `Timer`, so their bookkeeping can be
tested without a GPU.
"""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds a call. p20/p50/p80 contain what the caller pays between launches; graph does not."""

    p20: float
    p50: float
    p80: float
    graph: float | None = None

    @property
    def best(self) -> float:
        """The time that TFLOP/s and efficiency are computed from."""
        return self.p50 if self.graph is None else self.graph


@dataclass(frozen=True)
class Rates:
    """What this machine reached in this run: the denominators of every efficiency."""

    matmul_tflops: float
    copy_gbps: float

    def roof_ms(self, flops: float, nbytes: float) -> float:
        return max(flops / (self.matmul_tflops * 1e9), nbytes / (self.copy_gbps * 1e6))


class Timer(Protocol):
    def context(self) -> AbstractContextManager[object]:
        """Where inputs must be made and forwards run before their calls are timed."""
        ...

    def rates(self) -> Rates: ...

    def measure(self, call: Callable[[], object]) -> Times: ...

    def host_overhead(self, call: Callable[[], object]) -> Times: ...

    def extra_mib(self, call: Callable[[], object]) -> float | None: ...


def draw_lengths(name: str) -> tuple[int, ...]:
    """`BxuN` is B times N; `BxjagN` is heavy-tailed, max(1, floor(N x^3)) with x uniform (seed 0), the first one N."""
    match = re.fullmatch(r"(\d+)x(u|jag)(\d+)", name)
    if match is None:
        raise ValueError(f"lengths must be BxuN or BxjagN, got {name}")
    batch, longest = int(match[1]), int(match[3])
    if match[2] == "u":
        return (longest,) * batch
    draws = torch.rand(batch, generator=torch.Generator().manual_seed(0))
    drawn = (longest * draws**3).floor().long().clamp(min=1).tolist()
    return (longest, *drawn[1:])


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80 with linear interpolation."""
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.2), at(0.5), at(0.8)


def repeats(estimate_ms: float, budget_ms: float, low: int, high: int) -> int:
    """How many calls fit the budget, within [low, high]."""
    return max(low, min(high, int(budget_ms / max(estimate_ms, 1e-6))))


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Microseconds are counted: a collection would land in some samples, its length set by all else in the process."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class CudaTimer:
    """Times on the device, all work on one side stream.

    The stream is the one graphs are captured on: autograd runs a backward on the stream of its forward, so a backward
    can only be captured where its forward ran. The L2 cache is left as the previous call left it, as in training.
    """

    GRAPH_CALLS = 5

    def __init__(self, budget_ms: float = 200.0) -> None:
        self.budget_ms = budget_ms
        self.stream = torch.cuda.Stream()

    def context(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream)

    def rates(self) -> Rates:
        size = 8192
        with self.context():
            a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            product = torch.empty_like(a)
            matmul = self._events(lambda: torch.matmul(a, b, out=product), warmup=10, calls=30)
            source = torch.randn(1 << 28, device="cuda")
            target = torch.empty_like(source)
            copy = self._events(lambda: target.copy_(source), warmup=5, calls=30)
        nbytes = 2 * source.numel() * source.element_size()
        return Rates(2 * size**3 / quantiles(matmul)[1] / 1e9, nbytes / quantiles(copy)[1] / 1e6)

    def measure(self, call: Callable[[], object]) -> Times:
        with self.context():
            estimate = quantiles(self._events(call, warmup=3, calls=3))[1]
            samples = self._events(call, warmup=1, calls=repeats(estimate, self.budget_ms, 10, 50))
        return Times(*quantiles(samples), graph=self._graph(call, estimate))

    def host_overhead(self, call: Callable[[], object]) -> Times:
        """Host milliseconds a call, the device never waited for. The work must be tiny, so that queues stay short."""
        calls, samples = 100, []
        with self.context(), without_garbage_collection():
            for _ in range(30):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                samples.append((time.perf_counter() - start) * 1e3 / calls)
            torch.cuda.synchronize()
        return Times(*quantiles(samples[5:]))

    def extra_mib(self, call: Callable[[], object]) -> float:
        """Peak memory during a call beyond its inputs and what it returns."""
        with self.context():
            call()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            returned = call()
            torch.cuda.synchronize()
            kept = torch.cuda.memory_allocated() - before
            peak = torch.cuda.max_memory_allocated() - before
        del returned
        return max(0, peak - kept) / 2**20

    def _events(self, call: Callable[[], object], warmup: int, calls: int) -> list[float]:
        for _ in range(warmup):
            call()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        torch.cuda.synchronize()
        for start, end in marks:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]

    def _graph(self, call: Callable[[], object], estimate_ms: float) -> float | None:
        """A call's share of a replayed graph of five, or None where the call cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(self.GRAPH_CALLS):
                    call()
        except RuntimeError as error:
            print(f"    not capturable in a CUDA graph: {str(error).splitlines()[0]}")
            return None
        with self.context():
            replays = repeats(self.GRAPH_CALLS * estimate_ms, self.budget_ms, 5, 50)
            samples = self._events(graph.replay, warmup=3, calls=replays)
        return quantiles(samples)[1] / self.GRAPH_CALLS


class CpuTimer:
    """Wall-clock times of fp32 work on torch.get_num_threads() threads."""

    def __init__(self, budget_ms: float = 1000.0) -> None:
        self.budget_ms = budget_ms

    def context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def rates(self) -> Rates:
        size = 1024
        a, b = torch.randn(size, size), torch.randn(size, size)
        product = torch.empty_like(a)
        matmul = self._wall(lambda: torch.matmul(a, b, out=product), warmup=3, calls=20)
        source = torch.randn(1 << 25)
        target = torch.empty_like(source)
        copy = self._wall(lambda: target.copy_(source), warmup=2, calls=10)
        nbytes = 2 * source.numel() * source.element_size()
        return Rates(2 * size**3 / quantiles(matmul)[1] / 1e9, nbytes / quantiles(copy)[1] / 1e6)

    def measure(self, call: Callable[[], object]) -> Times:
        estimate = quantiles(self._wall(call, warmup=2, calls=2))[1]
        return Times(*quantiles(self._wall(call, warmup=0, calls=repeats(estimate, self.budget_ms, 5, 50))))

    def host_overhead(self, call: Callable[[], object]) -> Times:
        return Times(*quantiles(self._wall(call, warmup=20, calls=200)))

    def extra_mib(self, call: Callable[[], object]) -> float | None:
        return None

    def _wall(self, call: Callable[[], object], warmup: int, calls: int) -> list[float]:
        for _ in range(warmup):
            call()
        samples = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e3)
        return samples


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: str) -> Row:
    """The keys of a row that say where and from what it was measured.

    HSTU_EXT_COMMIT names the commit where the sources are not a git checkout, as `git describe --always --dirty` does.
    """
    commit = os.environ.get("HSTU_EXT_COMMIT") or _output("git", "rev-parse", "--short=10", "HEAD") or "unknown"
    dirty: bool | None = commit.endswith("-dirty")
    if not os.environ.get("HSTU_EXT_COMMIT"):
        changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
        dirty = None if changes is None else bool(changes)
    row: Row = {"torch": torch.__version__, "commit": commit.removesuffix("-dirty"), "dirty": dirty}
    if device == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        row |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": driver.splitlines()[0] if driver else "unknown",
            "cuda": torch.version.cuda,
        }
    else:
        row |= {"gpu": None, "driver": None, "cuda": None, "cpu": _cpu_name(), "threads": torch.get_num_threads()}
    row["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return row


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({key: _rounded(value) for key, value in row.items()}) + "\n")


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def row_time(row: Row) -> float:
    """The time a row is compared by."""
    graph = row.get("graph_ms")
    return float(row["p50_ms"] if graph is None else graph)


KEY = ("op", "direction", "provider", "dtype", "head_dim", "heads", "lengths", "mask")


def compare(base: Iterable[Row], rows: Iterable[Row]) -> list[tuple[Row, float]]:
    """Each row with (latest base time / its time): above 1 is faster than the base."""
    earlier = {tuple(row.get(key) for key in KEY): row for row in base}
    found = []
    for row in rows:
        before = earlier.get(tuple(row.get(key) for key in KEY))
        if before is not None:
            found.append((row, row_time(before) / row_time(row)))
    return found


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def read_peers(path: Path) -> list[Row]:
    """Recorded peers, a row for each direction, from result rows (.jsonl) or a CSV.

    A CSV has the columns head_dim, lengths and peer, for a direction fwd_graph_ms or fwd_efficiency or both, and
    device, the name of the GPU, which may be left out.
    """
    if path.suffix == ".jsonl":
        return [row | {"device": row["gpu"]} for row in read_rows(path)]
    rows: list[Row] = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for direction in ("fwd", "bwd"):
                numbers = {key: line.get(f"{direction}_{key}") for key in ("graph_ms", "efficiency")}
                if any(numbers.values()):
                    row: Row = {"provider": line["peer"], "direction": direction, "head_dim": int(line["head_dim"])}
                    row |= {"lengths": line["lengths"], "device": line.get("device") or None}
                    rows.append(row | {key: float(text) if text else None for key, text in numbers.items()})
    return rows
