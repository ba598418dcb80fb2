"""Times HSTU attention over a grid of head dimensions and sequence lengths, forward and backward apart.

    python benchmarks/bench_attention.py                        the whole grid on the GPU, about a minute
    python benchmarks/bench_attention.py --cases d64:u200,d128  one case and every length of d=128
    python benchmarks/bench_attention.py --peers peers.csv      ratios against recorded peers (see below)
    python benchmarks/bench_attention.py --base old.jsonl       ratios against an earlier run of this benchmark
    python benchmarks/bench_attention.py --providers hstu_ext,relative,relative_rab,relative_eager
                                                                with a relative bias against without, as rab and eager
    python benchmarks/bench_attention.py --device cpu           the CPU path against padded eager PyTorch, fp32

Lengths: `uN` is a batch of equal lengths N, `jagN` a heavy-tailed batch of lengths max(1, floor(N x^3)) with x uniform
(seed 0) and the first sequence N long; a batch other than the grid's is written before it, as in 32xjag200. Inputs are
standard normal, the mask is causal, alpha = 1/sqrt(d); nothing is flushed from the caches between calls.

Times in the table are those of a call inside a replayed CUDA graph (on the CPU, medians). TFLOP/s counts 4 d operations
forward and 10 d backward for each kept pair and head. Efficiency is the roof over the time: the longer of those
operations at this run's own bf16 matmul rate, and of every input and output moved once at its own copy rate.

Recorded peers are rows of this benchmark (.jsonl) or a CSV with the columns head_dim, lengths, peer, fwd_graph_ms,
fwd_efficiency, bwd_graph_ms, bwd_efficiency and device. Where device is this run's GPU, ratios are their times over
ours; where it is another or not told, our efficiency over theirs, the fair figure then. Above 1 we are better.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import hstu_ext
from attention_providers import BIASED, PROVIDERS, QUADRATIC, Attention, Problem, eager_fits
from harness import (
    RESULTS,
    CpuTimer,
    CudaTimer,
    Rates,
    Row,
    Timer,
    Times,
    append_rows,
    compare,
    draw_lengths,
    geometric_mean,
    machine,
    read_peers,
    read_rows,
    row_time,
)

PeerTimes = dict[tuple[str, str, int, str], float]
"""(peer, direction, head_dim, lengths) -> milliseconds a call to divide by ours."""

HEADS = 4
HEAD_DIMS = (32, 64, 128, 256)
BATCHES = {
    "u128": 256,
    "u200": 128,
    "u256": 128,
    "u512": 64,
    "u1024": 32,
    "u2048": 16,
    "u4096": 8,
    "u8192": 8,
    "u16384": 4,
    "jag1024": 256,
    "jag4096": 128,
}
QUICK_LENGTHS = ("u200", "u1024", "u8192", "jag1024")
CPU_CASES = "d64:32xjag200,d64:8xjag1024"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIRECTIONS = ("fwd", "bwd")
TOLERANCE = 2e-2  # relative difference between two providers, far above half-precision rounding


@dataclass(frozen=True)
class Case:
    head_dim: int
    name: str

    def lengths(self) -> tuple[int, ...]:
        """The sequences of `uN`, `jagN`, `BxuN` or `BxjagN`."""
        batch = f"{BATCHES[self.name]}x" if self.name in BATCHES else ""
        try:
            return draw_lengths(batch + self.name)
        except ValueError as error:
            raise ValueError(
                f"lengths must be one of {', '.join(BATCHES)} or BxuN or BxjagN, got {self.name}"
            ) from error

    def problem(self, dtype: torch.dtype, device: str) -> Problem:
        return Problem(self.lengths(), HEADS, self.head_dim, dtype, device)


def parse_cases(text: str, lengths: Iterable[str] = tuple(BATCHES)) -> list[Case]:
    """`d64:u128` is one case, `d64` every length of it, `u128` every head dimension; an empty text is the grid."""
    cases: list[Case] = []
    for word in text.split(",") if text else [""]:
        match = re.fullmatch(r"(?:d(\d+))?:?((?:\d+x)?(?:u|jag)\d+)?", word.strip())
        if match is None:
            raise ValueError(f"a case must be d64:u128, d64 or u128, got {word!r}")
        dims = [int(match[1])] if match[1] else list(HEAD_DIMS)
        names = [match[2]] if match[2] else list(lengths)
        cases += [Case(dim, name) for dim in dims for name in names]
    for case in cases:
        case.lengths()
    return list(dict.fromkeys(cases))


def cell_name(problem: Problem, direction: str, dtype_name: str, provider: str = "hstu_ext") -> str | None:
    """The compiled kernel that serves a causal problem on a GPU."""
    suffix = {"hstu_ext": "", "relative": "_relative", "relative_rab": "_rab"}.get(provider)
    if suffix is None or problem.device != "cuda":
        return None
    bucket = next(bucket for bucket in HEAD_DIMS if problem.head_dim <= bucket)
    name = f"attn_{direction}_sm90_{dtype_name}_d{bucket}_window{suffix}"
    hopper = torch.cuda.get_device_capability() == (9, 0) and os.environ.get("HSTU_EXT_GPU") != "sm80"
    return name if hopper and name in hstu_ext.cells() else name.replace("sm90", "sm80")


def load_providers(names: str) -> list[str]:
    """The providers asked for; `auto` is hstu_ext with the compiled peers that can be imported."""
    if names != "auto":
        wanted = names.split(",")
        unknown = sorted(set(wanted) - set(PROVIDERS))
        if unknown:
            raise ValueError(f"providers must be among {', '.join(PROVIDERS)}, got {', '.join(unknown)}")
        return wanted
    found = ["hstu_ext"]
    probe = Problem((8,), 1, 64, torch.bfloat16, "cuda")
    for name in ("fbgemm", "meta"):
        try:
            PROVIDERS[name](probe)
        except (ImportError, OSError):
            continue
        found.append(name)
    return found


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float()
    return float((got.float() - expected).norm() / expected.norm().clamp(min=1e-30))


def measure_case(
    case: Case, problem: Problem, providers: Sequence[str], directions: Sequence[str], dtype_name: str, timer: Timer
) -> list[tuple[Row, Times]]:
    """One row for each provider and direction, without the keys that are the same for the whole run."""
    found: list[tuple[Row, Times]] = []
    expected: dict[bool, torch.Tensor] = {}  # without and with a bias
    with timer.context():
        q, k, v, dout = problem.inputs()
    for name in providers:
        if name in QUADRATIC and not eager_fits(problem):
            print(f"    {name} skipped at d{case.head_dim} {case.name}: its tensors would not fit")
            continue
        try:
            with timer.context():
                attention = PROVIDERS[name](problem)
                out = attention(q, k, v)
                finite = bool(out.isfinite().all())
        except (RuntimeError, ValueError) as error:
            print(f"    {name} skipped at d{case.head_dim} {case.name}: {str(error).splitlines()[0]}")
            continue
        biased = name in BIASED
        difference = relative_difference(out.detach(), expected[biased]) if biased in expected else 0.0
        if not finite or difference > TOLERANCE:
            print(f"    {name} wrong at d{case.head_dim} {case.name}: finite {finite}, off by {difference:.2g}")
            continue
        if biased not in expected:
            expected[biased] = out.detach().clone()
        inputs = (q, k, v, *getattr(attention, "tables", ()))
        for direction in directions:
            call = forward_call(attention, q, k, v) if direction == "fwd" else backward_call(out, inputs, dout)
            times = timer.measure(call)
            row: Row = {
                "op": "attention",
                "direction": direction,
                "cell": cell_name(problem, direction, dtype_name, name),
                "provider": name,
                "dtype": dtype_name,
                "head_dim": case.head_dim,
                "heads": problem.heads,
                "lengths": case.name,
                "rows": problem.rows,
                "mask": "causal",
                "tflops": problem.flops(direction) / (times.best * 1e9),
                "extra_mib": timer.extra_mib(call),
            }
            found.append((row, times))
        del out
    return found


class forward_call:
    """The forward as in inference: nothing is saved for a backward."""

    def __init__(self, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.attention, self.inputs = attention, (q.detach(), k.detach(), v.detach())

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return self.attention(*self.inputs)


class backward_call:
    """The backward of one finished forward, again and again."""

    def __init__(self, out: torch.Tensor, inputs: tuple[torch.Tensor, ...], dout: torch.Tensor) -> None:
        self.out, self.inputs, self.dout = out, inputs, dout

    def __call__(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.out, self.inputs, self.dout, retain_graph=True)


def finished(row: Row, times: Times, problem: Problem, rates: Rates, common: Row) -> Row:
    direction = str(row["direction"])
    roof = rates.roof_ms(problem.flops(direction), problem.nbytes(direction))
    timed: Row = {
        "p20_ms": times.p20,
        "p50_ms": times.p50,
        "p80_ms": times.p80,
        "graph_ms": times.graph,
        "efficiency": roof / times.best,
        "matmul_tflops": rates.matmul_tflops,
        "copy_gbps": rates.copy_gbps,
    }
    return row | timed | common


def host_overhead_rows(providers: Sequence[str], dtype_name: str, device: str, timer: Timer, common: Row) -> list[Row]:
    """Host time of a forward call on two sequences of 16: the bare op, and with autograd recording."""
    problem = Problem((16, 16), HEADS, 64, DTYPES[dtype_name], device)
    rows: list[Row] = []
    for name in providers:
        with timer.context():
            q, k, v, _ = problem.inputs()
            attention = PROVIDERS[name](problem)
        calls = {"host_op": forward_call(attention, q, k, v), "host_autograd": partial(attention, q, k, v)}
        for direction, call in calls.items():
            times = timer.host_overhead(call)
            rows.append(
                {
                    "op": "attention",
                    "direction": direction,
                    "cell": None,
                    "provider": name,
                    "dtype": dtype_name,
                    "head_dim": problem.head_dim,
                    "heads": problem.heads,
                    "lengths": "2xu16",
                    "rows": problem.rows,
                    "mask": "causal",
                    "p20_ms": times.p20,
                    "p50_ms": times.p50,
                    "p80_ms": times.p80,
                    "graph_ms": None,
                }
                | common
            )
    return rows


def print_table(rows: Sequence[Row], subject: str, peers: PeerTimes) -> None:
    """One line a case: the subject's times, then (peer time / subject's time) forward, backward and for their sum."""
    ours = {
        (row["head_dim"], row["lengths"], row["direction"]): row
        for row in rows
        if row["provider"] == subject and row["direction"] in DIRECTIONS
    }
    names = list(dict.fromkeys(peer for peer, _, _, _ in peers))
    heading = [f"{'d':>4} {'lengths':>10} {'rows':>7}"]
    heading += [f"{direction + ' us':>9} {'TFLOP/s':>7} {'eff.':>5}" for direction in DIRECTIONS]
    heading += [f"{name:>17}" for name in names]
    print(" | ".join(heading))
    ratios: dict[tuple[str, str], list[float]] = {}
    for dim, lengths in dict.fromkeys((dim, lengths) for dim, lengths, _ in ours):
        found = {direction: ours.get((dim, lengths, direction)) for direction in DIRECTIONS}
        case_rows = next(row["rows"] for row in found.values() if row is not None)
        columns = [f"{dim:>4} {lengths:>10} {case_rows:>7}"]
        for row in found.values():
            columns.append(
                f"{'-':>9} {'-':>7} {'-':>5}"
                if row is None
                else f"{row_time(row) * 1e3:9.1f} {row['tflops']:7.4g} {row['efficiency']:5.0%}"
            )
        for name in names:
            pairs = {
                direction: (peers[name, direction, dim, lengths], row_time(row))
                for direction, row in found.items()
                if row is not None and (name, direction, dim, lengths) in peers
            }
            if len(pairs) == len(DIRECTIONS):
                pairs["both"] = (sum(theirs for theirs, _ in pairs.values()), sum(mine for _, mine in pairs.values()))
            shown = {direction: theirs / mine for direction, (theirs, mine) in pairs.items()}
            for direction, ratio in shown.items():
                ratios.setdefault((name, direction), []).append(ratio)
            texts = [f"{shown[word]:.2f}" if word in shown else "-" for word in (*DIRECTIONS, "both")]
            columns.append(" ".join(f"{text:>5}" for text in texts))
        print(" | ".join(columns))
    for (name, direction), values in ratios.items():
        print(
            f"{name} {direction}: their time / ours, geometric mean {geometric_mean(values):.3f}, "
            f"least {min(values):.3f}, {len(values)} cases"
        )


def print_comparison(base: Sequence[Row], rows: Sequence[Row]) -> None:
    pairs = compare(base, rows)
    print(f"\nagainst the base (base time / this time), {len(pairs)} rows in both")
    for row, ratio in pairs:
        print(f"  {row['provider']:>9} {row['direction']:>13} d{row['head_dim']:<3} {row['lengths']:>10} {ratio:7.3f}")
    for direction in dict.fromkeys(row["direction"] for row, _ in pairs):
        mean = geometric_mean(ratio for row, ratio in pairs if row["direction"] == direction)
        print(f"  {direction}: geometric mean {mean:.3f}")


def recorded_peers(recorded: Sequence[Row], rows: Sequence[Row], subject: str) -> PeerTimes:
    """Recorded times of the subject's cases; of another GPU, what its efficiency would take under this run's roof."""
    ours = {
        (row["direction"], row["head_dim"], row["lengths"]): row
        for row in rows
        if row["provider"] == subject and row["direction"] in DIRECTIONS
    }
    found: PeerTimes = {}
    elsewhere: dict[str, str] = {}
    for peer in recorded:
        case = peer["direction"], peer["head_dim"], peer["lengths"]
        if peer["provider"] == subject or case not in ours:
            continue
        row, name = ours[case], peer["provider"]
        same, efficiency = peer["device"] == row["gpu"], peer.get("efficiency")
        if efficiency and not same:
            found[(name, *case)] = row["efficiency"] * row_time(row) / efficiency
            elsewhere[name] = peer["device"] or "a GPU not told"
        elif peer.get("graph_ms") and (same or peer["device"] is None):
            found[(name, *case)] = peer["graph_ms"]
    for name, device in elsewhere.items():
        print(f"{name}: recorded on {device}, so the ratios are our efficiency over theirs, not times")
    return found


def live_peers(rows: Sequence[Row], subject: str) -> PeerTimes:
    """The other providers of this run."""
    return {
        (row["provider"], row["direction"], row["head_dim"], row["lengths"]): row_time(row)
        for row in rows
        if row["provider"] != subject and row["direction"] in DIRECTIONS
    }


def run(
    cases: Sequence[Case],
    providers: Sequence[str],
    directions: Sequence[str],
    dtype_name: str,
    device: str,
    timer: Timer,
) -> Iterator[list[Row]]:
    """The rows of one case after the other, then those of the host overhead."""
    torch.manual_seed(0)
    common = machine(device)
    rates = timer.rates()
    print(f"{common['gpu'] or common.get('cpu')}, torch {common['torch']}, commit {common['commit']}")
    print(
        f"matmul {rates.matmul_tflops:.4g} TFLOP/s, copy {rates.copy_gbps:.4g} GB/s, providers {', '.join(providers)}"
    )
    for case in cases:
        problem = case.problem(DTYPES[dtype_name], device)
        measured = measure_case(case, problem, providers, directions, dtype_name, timer)
        yield [finished(row, times, problem, rates, common) for row, times in measured]
        if device == "cuda":
            torch.cuda.empty_cache()
    yield host_overhead_rows(providers, dtype_name, device, timer, common)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="d64:u128,d128,u200; default: the grid")
    parser.add_argument("--directions", default="fwd,bwd")
    parser.add_argument("--providers", default="auto", help=f"of {', '.join(PROVIDERS)}; default: those that import")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16, fp32 on the CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--quick", action="store_true", help="four lengths, a quarter of the repetitions")
    parser.add_argument("--peers", type=Path, help="recorded peers to compare with, a CSV or rows")
    parser.add_argument("--base", type=Path, help="an earlier result file to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.jsonl", help="rows are appended here")
    options = parser.parse_args(arguments)

    directions = [word for word in options.directions.split(",") if word]
    if not directions or set(directions) - set(DIRECTIONS):
        parser.error(f"--directions must be among {', '.join(DIRECTIONS)}, got {options.directions}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    on_cpu = device == "cpu"
    try:
        cases = parse_cases(
            options.cases or (CPU_CASES if on_cpu else ""), QUICK_LENGTHS if options.quick else tuple(BATCHES)
        )
        providers = load_providers("hstu_ext,eager" if on_cpu and options.providers == "auto" else options.providers)
    except ValueError as error:
        parser.error(str(error))
    timer: Timer = (
        CpuTimer(250.0 if options.quick else 1000.0) if on_cpu else CudaTimer(25.0 if options.quick else 100.0)
    )
    base = read_rows(options.base) if options.base else []
    recorded = read_peers(options.peers) if options.peers else []

    dtype_name = options.dtype or ("fp32" if on_cpu else "bf16")
    rows: list[Row] = []
    for measured in run(cases, providers, directions, dtype_name, device, timer):
        append_rows(options.out, measured)
        rows += measured
    print()
    peers = recorded_peers(recorded, rows, providers[0]) | live_peers(rows, providers[0])
    print_table(rows, providers[0], peers)
    for row in rows:
        if row["direction"].startswith("host_"):
            print(f"{row['provider']} {row['direction']}: {row['p50_ms'] * 1e3:.1f} us a forward call")
    if options.base:
        print_comparison(base, rows)
    print(f"{len(rows)} rows appended to {options.out}")


if __name__ == "__main__":
    main()
