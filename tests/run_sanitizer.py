"""Runs the GPU kernels of the installed hstu_ext under NVIDIA's compute-sanitizer and prints what each tool found.

The kernels are the attention cells, jagged_join (concat, split and their interleaved forms), jagged_dense, l2norm,
topk_dot (of both families on Hopper), sampled_softmax, in_batch_softmax and gated_norm.

    python tests/run_sanitizer.py [--tools memcheck,racecheck] [--match bf16_d64] [--limit 600] [--jobs 4]

A tool runs all cells in one process. Where an error ends the process, the cells after it go on in a new one. Exits 0 if
every cell is clean under every tool, 1 if one is not, 2 if something could not be run (no GPU, no compute-sanitizer, or
the time limit came first).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# torch's own kernels are left out, except from initcheck, which has to see who wrote what.
OURS = ("--kernel-name", "kernel_substring=hstu")
OPTIONS = {
    "memcheck": (*OURS, "--padding", "256", "--report-api-errors", "no"),
    "racecheck": OURS,
    "initcheck": (),
    "synccheck": OURS,
}
JAGGED = ("jagged_join", "jagged_dense")
SIMILARITY = ("l2norm", "topk_dot", "topk_dot_sm80", "sampled_softmax", "in_batch_softmax")
NORM = ("gated_norm",)
EXIT_CODE = 77
LIMIT = 1_000_000  # findings of a process; the tools' own limit of 100 would make the cells behind it look clean
KINDS_SHOWN, LAST_LINES = 10, 60
BEGIN, END = "@@ begin ", "@@ end "
# The first line of a finding: the tool's prefix and a line that is neither indented nor a frame of the report.
FINDING = re.compile(r"^========= (?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|Target application)(\S.*)")
# How torch's threads may end the process once all cells are through; no finding then.
ABORTED = "Error: process didn't terminate successfully"


@dataclass
class Run:
    """What one tool found, cell by cell: a list of findings, empty where it is clean. No entry: not run."""

    tool: str
    findings: dict[str, list[str]] = field(default_factory=dict)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    seconds: float = 0.0


def problems_of(cell: str) -> list[Any]:
    """Two small problems: a plain one of whole vectors, and a ragged strided one of a smaller head dimension."""
    import torch

    from attention_cases import Case

    match = re.fullmatch(r"attn_(?:fwd|bwd)_sm\d+_(bf16|fp16)_d(\d+)_(window|target|interval)(_rab|_relative)?", cell)
    assert match, cell
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[match[1]]
    dim, mask, rab = int(match[2]), match[3], "heads" if match[4] == "_rab" else ""
    tables = "position" if "_bwd_sm90_" in cell else "position+time"  # what the cell itself serves
    biases = (tables, tables + "+heads") if match[4] == "_relative" else ("", "")
    lengths = (130, 1, 0, 65)
    more: dict[str, Any] = {
        "window": {"window": (70, 0)},
        "target": {"contexts": (3, 0, 0, 9), "targets": (40, 1, 0, 7), "group": 3},
        "interval": {"bounds": 3},
    }[mask]
    plain = Case(cell, lengths, dim=dim, rab=rab, bias=biases[0], **more)
    ragged = replace(
        plain, dim=dim - 8, dim_v=dim, layout="padded", lengths_q=(70, 1, 0, 64), used_q=(67, 1, 0, 10),
        used_k=(129, 1, 0, 64), outside=(3, 7), offsets=torch.int64, rab="one" if rab else "", bias=biases[1],
        times="extreme",
    )  # fmt: skip
    return [case.problem("cuda", dtype) for case in (plain, ragged)]


def check(*results: Any) -> None:
    import torch

    torch.cuda.synchronize()
    for x in results:
        x.cpu()  # initcheck reports elements that were never written


def run_similarity(name: str) -> None:
    """Aligned rows and others, in every dtype; more rows than a tile and fewer, ids out of range, a sparse gradient."""
    import torch

    import hstu_ext

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dim in (64, 50):
            query, items = (torch.randn(n, dim, device="cuda").to(dtype).requires_grad_() for n in (140, 1500))
            inputs = (query, items)
            ids = torch.randint(1500, (140,), device="cuda")
            if name == "l2norm":
                out = hstu_ext.l2norm(query)
                check(out, *torch.autograd.grad(out.float().sum(), (query,)))
            elif name.startswith("topk_dot"):
                exclude, valid = torch.randint(-1, 1500, (140, 5), device="cuda"), torch.rand(1500, device="cuda") < 0.9
                for rows, k in ((140, 10), (140, 300), (140, 700), (20, 300)):
                    found = hstu_ext.topk_dot(query[:rows], items.repeat(6, 1), k, exclude[:rows], valid.repeat(6))
                    check(*found)
            elif name == "sampled_softmax":
                for negatives in (torch.randint(1500, (140, 33), device="cuda"), torch.full((140, 3), 2**40).cuda()):
                    for sparse in (False, True):
                        loss = hstu_ext.sampled_softmax_loss(query, items, ids, negatives, sparse=sparse)
                        check(loss, *(x.to_dense() for x in torch.autograd.grad(loss, inputs)))
            else:
                item_ids, sequences = torch.arange(1500, device="cuda") % 1400, torch.arange(1500, device="cuda") // 9
                for threshold in (None, 0.9):
                    loss = hstu_ext.in_batch_softmax_loss(
                        query, items, item_ids, sequences[:140], torch.rand(1500, device="cuda"), threshold,
                        positives=ids, item_sequence_ids=sequences,
                    )  # fmt: skip
                    check(loss, *torch.autograd.grad(loss, inputs))


def run_norm() -> None:
    """Whole vectors and single elements, columns that do not count, with a gate of another dtype and without."""
    import torch

    import hstu_ext

    for dtype, gate_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        for heads, width, dim in ((1, 64, 64), (2, 32, 25), (1, 600, 600)):
            x = torch.randn(70, heads, width, device="cuda").to(dtype).requires_grad_()
            gate = torch.randn(70, heads * dim, device="cuda").to(gate_dtype).requires_grad_()
            gated, plain = hstu_ext.gated_norm(x, gate), hstu_ext.gated_norm(x, dtype=gate_dtype)
            check(gated, plain, *torch.autograd.grad((gated.float().sum() + plain.float().sum()), (x, gate)))


def run_jagged(name: str) -> None:
    """Rows of whole vectors, of odd bytes and longer than a tile; a few parts and many; right offsets and garbage."""
    import torch

    import hstu_ext

    lengths = torch.tensor([[130, 1, 0, 65], [3, 0, 70, 9]])
    for width, stride, parts, offsets_dtype in (
        (64, 64, 2, torch.int64), (64, 72, 7, torch.int32), (3, 5, 3, torch.int32), (2300, 2300, 2, torch.int64),
    ):  # fmt: skip
        offsets = [hstu_ext.lengths_to_offsets(lengths[p % 2], dtype=offsets_dtype).cuda() for p in range(parts)]
        totals = [int(x[-1]) + 2 for x in offsets]
        values = [torch.randn(rows, stride, device="cuda").bfloat16()[:, :width] for rows in totals]
        wild = [x.clone() for x in offsets]
        for x in wild:
            x[1], x[3] = -5, torch.iinfo(offsets_dtype).max
        for given in (offsets, wild):
            if name == "jagged_join":
                for join, separate in (
                    (hstu_ext.jagged_concat, hstu_ext.jagged_split),
                    (hstu_ext.jagged_interleave, hstu_ext.jagged_deinterleave),
                ):
                    joined, joined_offsets = join(values, given, sum(totals))
                    check(joined, joined_offsets, *separate(joined, given, totals))
            else:
                dense = hstu_ext.jagged_to_dense(values[0], given[0], 100, 1.5)
                check(dense, hstu_ext.dense_to_jagged(dense, given[0], totals[0]))


def run_cells(cells: list[str]) -> None:
    """In the process that the sanitizer watches."""
    import torch

    from hstu_ext import hstu_attn_varlen_func

    for cell in cells:
        print(BEGIN + cell, flush=True)
        if cell in JAGGED:
            run_jagged(cell)
        elif cell in SIMILARITY:
            run_similarity(cell)
        elif cell in NORM:
            run_norm()
        for problem in () if cell in JAGGED + SIMILARITY + NORM else problems_of(cell):
            for deterministic in (False, True) if "_bwd_" in cell else (False,):
                results = problem.run(
                    hstu_attn_varlen_func,
                    backward="_bwd_" in cell,
                    deterministic=deterministic,
                    has_drab=problem.rab is not None and "_bwd_" in cell,
                )
                torch.cuda.synchronize()
                if "_sm90_" not in cell:  # of what TMA stores initcheck knows nothing
                    for value in results.values():
                        value.cpu()  # initcheck reports elements that were never written
        print(END + cell, flush=True)


def watch(tool: str, cells: list[str], sanitizer: str, deadline: float) -> Run:
    run = Run(tool)
    started = time.monotonic()
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    while remaining := [cell for cell in cells if cell not in run.findings]:
        if time.monotonic() > deadline:
            break
        # A Hopper GPU runs the cells of sm80 only where it is told to: a process for each family.
        of_sm80 = "_sm80" in remaining[0]
        remaining = [cell for cell in remaining if ("_sm80" in cell) == of_sm80]
        environment["HSTU_EXT_GPU"] = "sm80" if of_sm80 else ""
        command = [
            sanitizer, "--tool", tool, "--error-exitcode", str(EXIT_CODE), "--print-limit", str(LIMIT), *OPTIONS[tool],
            sys.executable, __file__, "--cells", ",".join(remaining),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        current, finished, killed, aborted = "", [], False, False
        while not killed and (line := process.stdout.readline()):
            run.log.append(line)
            if line.startswith(BEGIN):
                current = line[len(BEGIN) :].strip()
                run.findings[current] = []
            elif line.startswith(END):
                finished.append(current)
                killed = time.monotonic() > deadline
            elif (match := FINDING.match(line)) and match[1] == ABORTED and finished == remaining:
                aborted = True
            elif match and current:
                run.findings[current].append(match[1])
        if killed:
            process.kill()
        code = process.wait()
        if killed:
            break
        if not current:
            run.findings[remaining[0]] = [f"the process ended before this cell with code {code}"]
        elif current not in finished:
            run.findings[current].append(f"the process ended in this cell with code {code}")
        elif code and not aborted and not any(run.findings[cell] for cell in finished):
            run.findings[current].append(f"code {code} without a finding")
    run.seconds = time.monotonic() - started
    return run


def report(runs: list[Run], cells: list[str], verbose: bool) -> int:
    width = max(len(cell) for cell in cells)
    print(f"\n{'cell':<{width}}  " + "  ".join(f"{run.tool:>10}" for run in runs))
    for cell in cells:
        marks = []
        for run in runs:
            found = run.findings.get(cell)
            marks.append("not run" if found is None else f"{len(found)} errors" if found else "ok")
        print(f"{cell:<{width}}  " + "  ".join(f"{mark:>10}" for mark in marks))
    print(f"{'seconds':<{width}}  " + "  ".join(f"{run.seconds:>10.0f}" for run in runs))
    for run in runs:
        for cell, found in run.findings.items():
            kinds = Counter(found).most_common()
            for text, count in kinds[:KINDS_SHOWN]:
                print(f"{run.tool} {cell}: {count} x {text}")
            if len(kinds) > KINDS_SHOWN:
                print(f"{run.tool} {cell}: {len(kinds) - KINDS_SHOWN} other kinds")
        if verbose or any(run.findings.values()) or not run.findings:
            print(f"\n--- {run.tool}, last lines ---\n" + "".join(run.log))
    if any(found for run in runs for found in run.findings.values()):
        return 1
    return 0 if all(cell in run.findings for run in runs for cell in cells) else 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS), help="comma separated, default all four")
    parser.add_argument("--match", default="", help="only kernels whose name this regular expression finds")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for all of it; begun cells are finished")
    parser.add_argument("--jobs", type=int, default=1, help="tools at a time")
    parser.add_argument("--sanitizer", default="", help="path of compute-sanitizer")
    parser.add_argument("--verbose", action="store_true", help="print the end of every tool's output")
    parser.add_argument("--cells", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if options.cells:
        run_cells(options.cells.split(","))
        return 0

    import torch

    import hstu_ext

    if not torch.cuda.is_available():
        print("no CUDA GPU")
        return 2
    sanitizer = options.sanitizer or shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        print(f"{sanitizer} not found: install the CUDA toolkit or give --sanitizer")
        return 2
    cells = [cell for cell in (*hstu_ext.cells(), *JAGGED, *SIMILARITY, *NORM) if re.search(options.match, cell)]
    if torch.cuda.get_device_capability() != (9, 0):
        cells = [cell for cell in cells if "_sm90_" not in cell]
    tools = options.tools.split(",")
    if not cells or not set(tools) <= set(TOOLS):
        print(f"no cell matches {options.match!r}" if not cells else f"tools are {', '.join(TOOLS)}")
        return 2
    deadline = time.monotonic() + options.limit
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda tool: watch(tool, cells, sanitizer, deadline), tools))
    return report(runs, cells, options.verbose)


if __name__ == "__main__":
    sys.exit(main())
