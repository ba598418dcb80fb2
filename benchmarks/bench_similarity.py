"""Times the similarity ops against eager PyTorch in the same run, on the GPU where there is one, else on the CPU.

    python benchmarks/bench_similarity.py                          every case
    python benchmarks/bench_similarity.py --cases topk_dot         the cases whose name begins so
    python benchmarks/bench_similarity.py --dtype bf16 --device cpu

A case is `op:sizes`; direction `fwd` is without autograd, `both` is forward and backward. Both providers get the same
random inputs and must agree before they are timed; eager is left out where its tensors would not fit. extra_mib is the
peak of the memory during a call beyond what there was before and what the call returns: on a GPU of torch's allocator,
on the CPU of the process, with the allocator's free memory given back first. Ratios are of p50, launch gaps included.

FLOPs: 2 D for each pair of rows that is multiplied, and twice as much again in the backward. Bytes: every input and
output once, for l2norm, which multiplies nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hstu_ext
from harness import RESULTS, CpuTimer, CudaTimer, Rates, Row, Timer, append_rows, machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEMPERATURE, EPS = 0.05, 1e-6
# Of each op: rows (and items, samples, k as the names say) and dim.
SIZES: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "cpu": {
        "l2norm": ((25600, 64), (25600, 256)),
        "topk_dot": ((1, 100_000, 256, 200), (128, 100_000, 256, 200), (1024, 100_000, 64, 100)),
        "sampled_softmax_loss": ((6400, 128, 3953, 50), (6400, 128, 100_000, 256)),
        "l2norm_dot": ((512, 50_000, 64),),
        "in_batch_softmax_loss": ((4096, 4096, 64), (4096, 4096, 256)),
    },
    "cuda": {
        "l2norm": ((1_000_000, 64), (1_000_000, 256)),
        "topk_dot": (
            (1, 1_000_000, 256, 200), (32, 1_000_000, 256, 200), (1024, 1_000_000, 256, 200),
            (128, 100_000, 256, 200), (1024, 3953, 64, 200),
        ),
        "sampled_softmax_loss": ((25600, 128, 3953, 50), (25600, 128, 100_000, 256), (65536, 512, 1_000_000, 256)),
        "l2norm_dot": ((1024, 100_000, 256),),
        "in_batch_softmax_loss": ((25600, 20_000, 256), (4096, 4096, 64)),
    },
}  # fmt: skip
EAGER_FITS = 4e9  # elements of the largest tensor that eager makes


class MemoryTimer(CpuTimer):
    """Also reads the peak of the resident memory, where the system is Linux."""

    def extra_mib(self, call: Callable[[], object]) -> float | None:
        if not sys.platform.startswith("linux"):
            return None
        call()
        ctypes.CDLL(None).malloc_trim(0)
        before = self._status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        returned = call()
        peak = self._status("VmHWM")
        kept = sum(x.nbytes for x in returned if isinstance(x, Tensor)) if isinstance(returned, tuple) else 0
        return max(0.0, peak - before - kept / 2**20)

    def _status(self, key: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
        return math.nan


Provider = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """inputs are differentiated in direction `both`; others are passed by name."""

    op: str
    sizes: str
    direction: str
    dim: int
    rows: int
    flops: float
    nbytes: float
    inputs: tuple[Tensor, ...]
    ours: Provider
    eager: Provider
    others: dict[str, Any] = field(default_factory=dict)
    eager_elements: float = 0.0  # of the largest tensor that eager makes

    def call(self, provider: str) -> Callable[[], tuple[Tensor, ...]]:
        function = {"hstu_ext": self.ours, "eager": self.eager}[provider]

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                out = function(*self.inputs, **self.others)
            return out if isinstance(out, tuple) else (out,)

        def both() -> tuple[Tensor, ...]:
            inputs = tuple(x.detach().requires_grad_() for x in self.inputs)
            out = function(*inputs, **self.others)
            return out.detach(), *torch.autograd.grad(out.float().sum(), inputs)

        return forward if self.direction == "fwd" else both


def eager_topk(query: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = (query @ items.t()).topk(k)
    return values.float(), indices


def eager_l2norm_dot(q: Tensor, items: Tensor) -> Tensor:
    return F.normalize(q, dim=1, eps=EPS) @ F.normalize(items, dim=1, eps=EPS).t()


def eager_sampled(query: Tensor, table: Tensor, pos_ids: Tensor, neg_ids: Tensor) -> Tensor:
    """As one writes it in PyTorch: gather, normalise, multiply."""
    q = F.normalize(query, dim=1, eps=EPS)
    positive = F.normalize(F.embedding(pos_ids, table), dim=1, eps=EPS)
    negative = F.normalize(F.embedding(neg_ids, table), dim=2, eps=EPS)
    positive_logits = (q * positive).sum(1, keepdim=True) / TEMPERATURE
    negative_logits = torch.bmm(negative, q.unsqueeze(2)).squeeze(2) / TEMPERATURE
    negative_logits = torch.where(neg_ids == pos_ids.unsqueeze(1), -5e4, negative_logits)
    return -F.log_softmax(torch.cat([positive_logits, negative_logits], 1).float(), 1)[:, 0].mean()


def eager_in_batch(
    query: Tensor,
    items: Tensor,
    item_ids: Tensor,
    positives: Tensor,
    sequence_ids: Tensor,
    item_sequence_ids: Tensor,
    log_q: Tensor,
) -> Tensor:
    logits = eager_l2norm_dot(query, items).float() / TEMPERATURE - log_q
    masked = (item_ids == item_ids[positives].unsqueeze(1)) | (item_sequence_ids == sequence_ids.unsqueeze(1))
    masked &= torch.arange(len(item_ids), device=item_ids.device) != positives.unsqueeze(1)
    return F.cross_entropy(logits.masked_fill(masked, -math.inf), positives)


def cases(dtype: torch.dtype, wanted: str = "", scale: int = 1, device: str = "cpu") -> Iterator[Case]:
    """The cases whose name begins with `wanted`, made one at a time; scale divides the row counts."""
    size, sizes = dtype.itemsize, SIZES[device]

    def keep(name: str) -> bool:
        return name.startswith(wanted)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def index(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=device)

    for rows, dim in sizes["l2norm"]:
        rows //= scale
        for direction in ("fwd", "both"):
            if keep("l2norm:"):
                x = normal(rows, dim)
                moved = (2 if direction == "fwd" else 5) * x.numel() * size
                yield Case(
                    "l2norm", f"{rows}x{dim}", direction, dim, rows, 0.0, moved, (x,),
                    hstu_ext.l2norm, lambda x: F.normalize(x, dim=-1, eps=EPS),
                )  # fmt: skip
    for batch, count, dim, k in sizes["topk_dot"]:
        count //= scale
        if keep("topk_dot:"):
            yield Case(
                "topk_dot", f"{batch}x{count}k{k}", "fwd", dim, batch, 2.0 * batch * count * dim, 0.0,
                (normal(batch, dim), normal(count, dim)),
                hstu_ext.topk_dot, eager_topk, {"k": k},
            )  # fmt: skip
    for rows, samples, items, dim in sizes["sampled_softmax_loss"]:
        rows //= scale
        for direction in ("fwd", "both"):
            if keep("sampled_softmax_loss:"):
                ids = {"pos_ids": index(items, rows), "neg_ids": index(items, rows, samples)}
                yield Case(
                    "sampled_softmax_loss", f"{rows}x{samples}v{items}", direction, dim, rows,
                    (2.0 if direction == "fwd" else 6.0) * rows * (samples + 1) * dim, 0.0,
                    (normal(rows, dim), normal(items, dim)),
                    hstu_ext.sampled_softmax_loss, eager_sampled, ids, 1.0 * rows * samples * dim,
                )  # fmt: skip
    for rows, count, dim in sizes["l2norm_dot"]:
        count //= scale
        for direction in ("fwd", "both"):
            if keep("l2norm_dot:"):
                yield Case(
                    "l2norm_dot", f"{rows}x{count}", direction, dim, rows,
                    (2.0 if direction == "fwd" else 6.0) * rows * count * dim, 0.0,
                    (normal(rows, dim), normal(count, dim)),
                    hstu_ext.l2norm_dot, eager_l2norm_dot,
                )  # fmt: skip
    for rows, count, dim in sizes["in_batch_softmax_loss"]:
        rows, count = rows // scale, count // scale
        for direction in ("fwd", "both"):
            if keep("in_batch_softmax_loss:"):
                others = {
                    "item_ids": index(count, count),
                    "positives": index(count, rows),
                    "sequence_ids": torch.arange(rows, device=device) // 32,
                    "item_sequence_ids": index(rows // 32 + 1, count),
                    "log_q": torch.rand(count, device=device),
                }
                yield Case(
                    "in_batch_softmax_loss", f"{rows}x{count}", direction, dim, rows,
                    (2.0 if direction == "fwd" else 6.0) * rows * count * dim, 0.0,
                    (normal(rows, dim), normal(count, dim)),
                    hstu_ext.in_batch_softmax_loss, eager_in_batch, others,
                )  # fmt: skip


def disagreement(ours: tuple[Tensor, ...], eager: tuple[Tensor, ...]) -> float:
    """The largest relative difference of the floating point results. Indices may differ where rounding ties scores."""
    worst = 0.0
    for got, expected in zip(ours, eager):
        if got.is_floating_point():
            difference = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
            worst = max(worst, float(difference))
    return worst


def measure(case: Case, dtype_name: str, rates: Rates, timer: Timer, common: Row) -> Iterator[Row]:
    providers = ("hstu_ext", "eager") if case.eager_elements <= EAGER_FITS else ("hstu_ext",)
    calls = {provider: case.call(provider) for provider in providers}
    with timer.context():
        results = [call() for call in calls.values()]
    difference = disagreement(results[0], results[-1])
    del results
    tolerance = 1e-4 if dtype_name == "fp32" else 3e-2
    if not difference <= tolerance:
        raise AssertionError(f"{case.op} {case.sizes} {case.direction}: off by {difference:.2g} from eager")
    for provider, call in calls.items():
        times = timer.measure(call)
        yield {
            "op": case.op,
            "direction": case.direction,
            "cell": None,
            "provider": provider,
            "dtype": dtype_name,
            "head_dim": case.dim,
            "heads": 1,
            "lengths": case.sizes,
            "rows": case.rows,
            "mask": None,
            "p20_ms": times.p20,
            "p50_ms": times.p50,
            "p80_ms": times.p80,
            "graph_ms": times.graph,
            "tflops": case.flops / (times.best * 1e9),
            "gbps": case.nbytes / (times.best * 1e6),
            "efficiency": rates.roof_ms(case.flops, case.nbytes) / times.best,
            "matmul_tflops": rates.matmul_tflops,
            "copy_gbps": rates.copy_gbps,
            "extra_mib": timer.extra_mib(call),
        } | common


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="how the names of the cases begin, such as topk_dot")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--quick", action="store_true", help="a quarter of the repetitions")
    parser.add_argument("--out", type=Path, default=RESULTS / "similarity.jsonl", help="rows are appended here")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        timer: Timer = CudaTimer(50.0 if options.quick else 200.0)
    else:
        timer = MemoryTimer(250.0 if options.quick else 1000.0)
    common, rates = machine(device), timer.rates()
    where = common["gpu"] or f"{common['cpu']}, {common['threads']} threads"
    print(f"{where}, torch {common['torch']}, commit {common['commit']}")
    print(f"{'op':>22} {'sizes':>18} {'D':>4} {'dir':>5} {'ours ms':>9} {'eager ms':>9} {'ratio':>6}  extra MiB, eager")
    with timer.context():
        for case in cases(DTYPES[options.dtype], options.cases, device=device):
            ours, *others = list(measure(case, options.dtype, rates, timer, common))
            append_rows(options.out, [ours, *others])
            eager = others[0] if others else {"p50_ms": math.nan, "extra_mib": math.nan}
            print(
                f"{case.op:>22} {case.sizes:>18} {case.dim:>4} {case.direction:>5} {ours['p50_ms']:9.3f} "
                f"{eager['p50_ms']:9.3f} {eager['p50_ms'] / ours['p50_ms']:6.2f} {ours['extra_mib'] or 0:8.1f} "
                f"{eager['extra_mib'] or 0:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
