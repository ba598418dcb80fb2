"""Times the jagged ops beside eager PyTorch, forward and backward apart.

    python benchmarks/bench_jagged.py                               the whole grid on the GPU
    python benchmarks/bench_jagged.py --device cpu                  the same on the CPU
    python benchmarks/bench_jagged.py --ops concat --cases d64:4096xjag400

Lengths are as in bench_attention.py: 4096xjag400 is a heavy-tailed batch of 4096 sequences up to 400 long. For concat
and split a uniform draw (seed 1) cuts each sequence into two parts; for interleave they are its items and its actions,
one fewer where the length is odd. Values are bf16, offsets int64, and sizes are given, so nothing waits for a device.
Every op is timed on a small batch too, d64:8xu64 of 64 KB: on the device (fwd, bwd), and as calls one after the other
(host_op, host_autograd), where p50_ms is the host's time a call and total_ms the wall time a call until the device has
done the last one. add_ms is the host's time of x.add_(1) with one element, for hosts differ by half.

GB/s counts every row once for its read and once for its write, and a dense tensor whole where it is written. Efficiency
is the time of copying as many bytes, at this run's own copy rate, over the time.

On a CPU the providers take turns, three each: its rates change from minute to minute.

eager_views cuts tensors into views by lengths that are Python lists already, and puts them together with torch.cat,
torch.stack or pad_sequence. eager_index computes row numbers from the offsets and gathers.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import hstu_ext
from harness import (
    RESULTS,
    CpuTimer,
    CudaTimer,
    Rates,
    Row,
    Timer,
    Times,
    append_rows,
    draw_lengths,
    machine,
    row_time,
    without_garbage_collection,
)

DIMS = (64, 256, 512)
LENGTHS = ("4096xjag400", "256xjag8192")
SMALL = "8xu64"  # 64 KB at a dimension of 64: what a call costs beside the copy
OPS = ("concat", "split", "interleave", "to_dense", "to_jagged")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LARGEST_DENSE = 1 << 30  # bytes
LARGEST_GRADIENT = {"cuda": 1 << 36, "cpu": 1 << 33}  # bytes; that of pad_sequence copies a dense tensor a sequence
TURNS = {"cuda": 1, "cpu": 3}
HOST_TURNS = 5  # a host's clock changes within seconds
LONGEST_CALL = {"cuda": 0.1, "cpu": 1.0}  # seconds; eager forms that take longer are left out
Call = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    dim: int
    lengths: str


class Problem:
    """What one call of an op is given."""

    def __init__(self, op: str, case: Case, dtype: torch.dtype, device: str) -> None:
        whole = torch.tensor(draw_lengths(case.lengths))
        if op == "interleave":
            first = (whole + 1) // 2
        elif op in ("concat", "split"):
            first = (whole * torch.rand(len(whole), generator=torch.Generator().manual_seed(1))).long()
        else:
            first = whole
        parts = [first, whole - first] if op in ("concat", "split", "interleave") else [whole]
        self.op, self.batch, self.max_len = op, len(whole), int(whole.max())
        self.lengths: list[list[int]] = [part.tolist() for part in parts]
        self.totals = [sum(part) for part in self.lengths]
        self.rows = sum(self.totals)
        self.offsets = [hstu_ext.lengths_to_offsets(part).to(device) for part in parts]
        row_bytes = case.dim * dtype.itemsize
        self.dense_bytes = self.batch * self.max_len * row_bytes if op.startswith("to_") else 0
        self.row_bytes = row_bytes
        self.row = {"dtype": dtype, "device": device}
        self.dim = case.dim

    def nbytes(self, direction: str) -> int:
        """A dense tensor is written whole, and read where it has rows."""
        writes_dense = (self.op, direction) in (("to_dense", "fwd"), ("to_jagged", "bwd"))
        rows_bytes = self.rows * self.row_bytes
        return rows_bytes + (self.dense_bytes if writes_dense else rows_bytes)

    def inputs(self) -> list[Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, self.dim, **self.row).requires_grad_()  # type: ignore[call-overload]

        if self.op in ("concat", "interleave"):
            return [random(total) for total in self.totals]
        return [random(self.batch, self.max_len) if self.op == "to_jagged" else random(self.rows)]


def compiled(p: Problem) -> Call:
    if p.op == "concat":
        return lambda *x: [hstu_ext.jagged_concat(x, p.offsets)[0]]
    if p.op == "interleave":
        return lambda *x: [hstu_ext.jagged_interleave(x, p.offsets)[0]]
    if p.op == "split":
        return lambda x: hstu_ext.jagged_split(x, p.offsets, p.totals)
    if p.op == "to_dense":
        return lambda x: [hstu_ext.jagged_to_dense(x, p.offsets[0], p.max_len)]
    return lambda x: [hstu_ext.dense_to_jagged(x, p.offsets[0], p.rows)]


def eager_views(p: Problem) -> Call:
    first = p.lengths[0]
    second = p.lengths[-1]
    both = [length for pair in zip(first, second) for length in pair]

    def interleave(items: Tensor, actions: Tensor) -> list[Tensor]:
        pieces = []
        for i, a in zip(items.split(first), actions.split(second)):
            pieces += [torch.stack([i[: len(a)], a], 1).flatten(0, 1), i[len(a) :]]
        return [torch.cat(pieces)]

    def split(x: Tensor) -> list[Tensor]:
        pieces = x.split(both)
        return [torch.cat(pieces[::2]), torch.cat(pieces[1::2])]

    if p.op == "concat":
        return lambda a, b: [torch.cat([x for pair in zip(a.split(first), b.split(second)) for x in pair])]
    if p.op == "interleave":
        return interleave
    if p.op == "split":
        return split
    if p.op == "to_dense":
        return lambda x: [torch.nn.utils.rnn.pad_sequence(x.split(first), batch_first=True)]
    return lambda x: [torch.cat([row[:length] for row, length in zip(x.unbind(0), first)])]


def eager_index(p: Problem) -> Call:
    def positions() -> list[Tensor]:
        """The joined row of every row of each part."""
        lengths = [end[1:] - end[:-1] for end in p.offsets]
        begins = sum(end[:-1] for end in p.offsets)
        found, before = [], torch.zeros_like(begins)
        for end, length, total in zip(p.offsets, lengths, p.totals):
            within = torch.arange(total, device=end.device) - end[:-1].repeat_interleave(length, output_size=total)
            start = begins + (before if p.op != "interleave" else 0)
            place = start.repeat_interleave(length, output_size=total) + within
            if p.op == "interleave":
                other = lengths[1 - len(found)].repeat_interleave(length, output_size=total)
                place = place + torch.minimum(other, within + len(found))
            found.append(place)
            before = before + length
        return found

    def join(*parts: Tensor) -> list[Tensor]:
        out = parts[0].new_empty((p.rows, p.dim))
        return [out.index_copy(0, torch.cat(positions()), torch.cat(parts))]

    def places() -> Tensor:
        """The row of dense.flatten(0, 1) of every jagged row."""
        end = p.offsets[0]
        length = end[1:] - end[:-1]
        before = torch.arange(p.batch, device=end.device) * p.max_len - end[:-1]
        return before.repeat_interleave(length, output_size=p.rows) + torch.arange(p.rows, device=end.device)

    if p.op in ("concat", "interleave"):
        return join
    if p.op == "split":
        return lambda x: [x.index_select(0, place) for place in positions()]
    if p.op == "to_dense":
        shape = (p.batch, p.max_len, p.dim)
        return lambda x: [x.new_zeros((p.batch * p.max_len, p.dim)).index_copy(0, places(), x).view(shape)]
    return lambda x: [x.flatten(0, 1).index_select(0, places())]


PROVIDERS: dict[str, Callable[[Problem], Call]] = {
    "hstu_ext": compiled,
    "eager_views": eager_views,
    "eager_index": eager_index,
}


def parse_cases(text: str) -> list[Case]:
    """`d64:4096xjag400` is one case, `d64` every batch of it; an empty text is the grid."""
    cases: list[Case] = []
    for word in text.split(",") if text else [""]:
        match = re.fullmatch(r"(?:d(\d+))?:?(\d+x(?:u|jag)\d+)?", word.strip())
        if match is None:
            raise ValueError(f"a case must be d64:4096xjag400, d64 or 4096xjag400, got {word!r}")
        dims = [int(match[1])] if match[1] else list(DIMS)
        cases += [Case(dim, name) for dim in dims for name in ([match[2]] if match[2] else LENGTHS)]
    return list(dict.fromkeys(cases))


def seconds(call: Callable[[], object], device: str) -> float:
    """One call that is not the first."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    op: str, case: Case, providers: Sequence[str], dtype_name: str, device: str, timer: Timer, rates: Rates
) -> Iterator[Row]:
    """A row for each provider and direction, without what is the same for the whole run."""
    problem = Problem(op, case, DTYPES[dtype_name], device)
    if problem.dense_bytes > LARGEST_DENSE:
        print(
            f"    {op} skipped at d{case.dim} {case.lengths}: the dense tensor would have {problem.dense_bytes} bytes"
        )
        return
    expected: list[Tensor] | None = None
    timed: list[tuple[str, str, Callable[[], object]]] = []
    with timer.context():
        inputs = problem.inputs()
    for name in providers:
        with timer.context():
            function = PROVIDERS[name](problem)
            outs = function(*inputs)
            douts = [torch.ones_like(x) for x in outs]
            is_right = expected is None or all(torch.equal(x, y) for x, y in zip(outs, expected))
        if expected is None:
            expected = [x.detach() for x in outs]
        if not is_right:
            print(f"    {name} wrong at {op} d{case.dim} {case.lengths}")
            continue
        detached = [x.detach() for x in inputs]
        calls: dict[str, Callable[[], object]] = {
            "fwd": lambda function=function, detached=detached: function(*detached),
            "bwd": lambda outs=outs, douts=douts: torch.autograd.grad(outs, inputs, douts, retain_graph=True),
        }
        if (op, name) == ("to_dense", "eager_views") and problem.batch * problem.dense_bytes > LARGEST_GRADIENT[device]:
            print(f"    {name} skipped at {op} bwd d{case.dim} {case.lengths}: it copies {problem.batch} dense tensors")
            del calls["bwd"]
        for direction, call in calls.items():
            with timer.context():
                took = seconds(call, device)
            if name != "hstu_ext" and took > LONGEST_CALL[device]:
                print(f"    {name} skipped at {op} {direction} d{case.dim} {case.lengths}: {took:.2f} s a call")
                continue
            timed.append((name, direction, call))
    turns = [[timer.measure(call) for _, _, call in timed] for _ in range(TURNS[device])]
    for i, (name, direction, call) in enumerate(timed):
        times = median([turn[i] for turn in turns])
        yield row_of(op, direction, name, dtype_name, case, problem.rows) | {
            "p20_ms": times.p20,
            "p50_ms": times.p50,
            "p80_ms": times.p80,
            "graph_ms": times.graph,
            "gbps": problem.nbytes(direction) / (times.best * 1e6),
            "efficiency": rates.roof_ms(0.0, problem.nbytes(direction)) / times.best,
            "matmul_tflops": rates.matmul_tflops,
            "copy_gbps": rates.copy_gbps,
            "extra_mib": timer.extra_mib(call),
        }


def median(times: Sequence[Times]) -> Times:
    def of(name: str) -> float:
        return statistics.median(getattr(x, name) for x in times)

    return Times(of("p20"), of("p50"), of("p80"), None if times[0].graph is None else of("graph"))


def total_ms(call: Callable[[], object], device: str, timer: Timer) -> float:
    """Wall time a call of calls one after the other, until the device has done the last one."""
    calls, samples = 100, []
    with timer.context(), without_garbage_collection():
        for _ in range(20):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize(device)
            samples.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(samples[5:])


def host_overhead(op: str, providers: Sequence[str], dtype_name: str, device: str, timer: Timer) -> Iterator[Row]:
    """What a call under 1 MB costs: the bare op, and with autograd recording."""
    case = Case(64, SMALL)
    problem = Problem(op, case, DTYPES[dtype_name], device)
    with timer.context():
        one = torch.zeros(1, device=device)
    for name in providers:
        with timer.context():
            inputs = problem.inputs()
            function = PROVIDERS[name](problem)
        for direction, given in (("host_op", [x.detach() for x in inputs]), ("host_autograd", inputs)):
            call = partial(function, *given)
            hosts, totals, adds = [], [], []
            for _ in range(HOST_TURNS if name == "hstu_ext" else 1):
                hosts.append(timer.host_overhead(call))
                totals.append(total_ms(call, device, timer))
                adds.append(timer.host_overhead(lambda: one.add_(1)).p50)
            times = median(hosts)
            yield row_of(op, direction, name, dtype_name, case, problem.rows) | {
                "p20_ms": times.p20,
                "p50_ms": times.p50,
                "p80_ms": times.p80,
                "graph_ms": None,
                "total_ms": statistics.median(totals),
                "add_ms": statistics.median(adds),
            }


def row_of(op: str, direction: str, provider: str, dtype_name: str, case: Case, rows: int) -> Row:
    return {
        "op": f"jagged_{op}",
        "direction": direction,
        "cell": None,
        "provider": provider,
        "dtype": dtype_name,
        "head_dim": case.dim,
        "heads": 1,
        "lengths": case.lengths,
        "rows": rows,
        "mask": None,
    }


def run(
    ops: Sequence[str], cases: Sequence[Case], providers: Sequence[str], dtype_name: str, device: str, timer: Timer
) -> Iterator[Row]:
    torch.manual_seed(0)
    common = machine(device)
    rates = timer.rates()
    print(f"{common['gpu'] or common.get('cpu')}, torch {common['torch']}, commit {common['commit']}")
    print(f"copy {rates.copy_gbps:.4g} GB/s, providers {', '.join(providers)}")
    for op in ops:
        for case in dict.fromkeys((*cases, Case(64, SMALL))):
            for row in measure(op, case, providers, dtype_name, device, timer, rates):
                yield row | common
        for row in host_overhead(op, providers, dtype_name, device, timer):
            yield row | common


def print_table(rows: Sequence[Row]) -> None:
    """One line an op, direction and case: the op's time and rate, then each other provider's time over it."""
    times: dict[tuple[str, str, int, str], dict[str, Row]] = {}
    for row in rows:
        key = (row["op"], row["direction"], row["head_dim"], row["lengths"])
        times.setdefault(key, {})[row["provider"]] = row
    for (op, direction, dim, lengths), found in times.items():
        ours = found.get("hstu_ext")
        if ours is None:
            continue
        others = [f"{name} {row_time(row) / row_time(ours):5.2f}x" for name, row in found.items() if row is not ours]
        if "gbps" in ours:
            rate = f"{ours['gbps']:8.4g} GB/s {ours['efficiency']:4.0%}"
        else:
            rate = f"in all {ours['total_ms'] * 1e3:8.1f} us"
        line = f"{op:17} {direction:13} d{dim:<3} {lengths:>11} {row_time(ours) * 1e3:10.1f} us {rate}"
        print(" | ".join([line, *others]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--cases", default="", help="d64:4096xjag400,d256; default: the grid")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--quick", action="store_true", help="a quarter of the repetitions")
    parser.add_argument("--out", type=Path, default=RESULTS / "jagged.jsonl", help="rows are appended here")
    options = parser.parse_args(arguments)
    for name, known in (("ops", OPS), ("providers", tuple(PROVIDERS))):
        words = getattr(options, name).split(",")
        if set(words) - set(known):
            parser.error(f"--{name} must be among {', '.join(known)}, got {','.join(words)}")
        setattr(options, name, words)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        cases = parse_cases(options.cases)
    except ValueError as error:
        parser.error(str(error))
    scale = 0.25 if options.quick else 1.0
    timer: Timer = CpuTimer(200.0 * scale) if device == "cpu" else CudaTimer(100.0 * scale)
    rows: list[Row] = []
    for row in run(options.ops, cases, options.providers, options.dtype, device, timer):
        append_rows(options.out, [row])
        rows.append(row)
    print_table(rows)
    print(f"{len(rows)} rows appended to {options.out}")


if __name__ == "__main__":
    main()
