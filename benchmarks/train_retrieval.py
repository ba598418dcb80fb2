"""Trains retrieval models, one row of quality and time a run: seeds of one configuration, or a search.

    python benchmarks/train_retrieval.py configs/ml-1m/hstu.toml --seeds 0 1 2
    python benchmarks/train_retrieval.py configs/ml-1m/best.toml --validation --trials trials.txt --workers 3
    python benchmarks/train_retrieval.py configs/ml-100k/hstu.toml --trials benchmarks/trials/bias.txt --seeds 0 1 2 3 4

A line of --trials is one more run: overrides of the configuration, as for `hstu-ext train --set`, with blanks between.
Empty lines and what follows a # do not count. With --validation every run holds out the second-last event of each user
and never sees the last one: so is the choice made that a row without it reports. At the end stands a table of the mean
and the standard deviation of every trial over its seeds.

A row has config, overrides, seed, holdout, the metrics of the last epoch, best_epoch with the highest NDCG@10 of those
that were evaluated, seconds (from the data in memory to the last evaluation), and the machine.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

import harness
from hstu_ext.data import InteractionLog, load
from hstu_ext.training import Trainer, load_config

QUIET = ["output.report=false", "output.tensorboard=off"]


def run(config_path: str, overrides: list[str], seed: int, validation: bool, log: InteractionLog) -> harness.Row:
    """Trains and evaluates once."""
    holdout = "validation" if validation else "test"
    config = load_config(config_path, [*overrides, f"training.seed={seed}", f"data.holdout={holdout}", *QUIET])
    begin = time.perf_counter()
    trainer = Trainer(config, log, write=None)
    results = trainer.fit()
    seconds = time.perf_counter() - begin
    evaluated = [each for each in results if "NDCG@10" in each]
    last, best = evaluated[-1], max(evaluated, key=lambda each: each["NDCG@10"])
    training_seconds = sum(each["seconds"] for each in results[1:])  # the first epoch sets things up
    names = [name for name in last if name.startswith(("HR@", "NDCG@", "MRR"))]
    return {
        "op": "train_retrieval",
        "config": config_path,
        "overrides": overrides,
        "seed": seed,
        "holdout": holdout,
        "epochs": len(results),
        "loss": last["loss"],
        **{name: last[name] for name in names},
        "best_epoch": best["epoch"],
        "best_HR@10": best["HR@10"],
        "best_NDCG@10": best["NDCG@10"],
        "parameters": sum(each.numel() for each in trainer.model.parameters()),
        "seconds": round(seconds, 2),
        "step_ms": round(1e3 * training_seconds / max(1, trainer.steps_per_epoch * (len(results) - 1)), 3),
    }


def read_trials(path: Path) -> list[list[str]]:
    """The overrides of every line."""
    lines = (line.split("#", 1)[0].split() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def work(arguments: argparse.Namespace, tasks: Any, rows: Any) -> None:
    """One process: the data once, then runs until there are no more."""
    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.workers))
    config = load_config(arguments.config)
    log = load(config.data.source, **config.data.options)
    while True:
        try:
            overrides, seed = tasks.get(timeout=1)
        except queue.Empty:
            return
        try:
            rows.put(run(arguments.config, overrides, seed, arguments.validation, log))
        except FloatingPointError as error:  # a trial that diverges is a result as well
            rows.put({"overrides": overrides, "seed": seed, "error": str(error)})


def show(row: harness.Row) -> None:
    what = f"{' '.join(row['overrides']) or '-'} seed {row['seed']}"
    if "error" in row:
        print(f"{what}: {row['error']}", flush=True)
        return
    found = f"HR@10 {row['HR@10']:.4f} NDCG@10 {row['NDCG@10']:.4f} loss {row['loss']:.3f}"
    best = f"best epoch {row['best_epoch']}: {row['best_HR@10']:.4f} {row['best_NDCG@10']:.4f}"
    print(f"{found}, {best}; {row['step_ms']:.2f} ms a step, {row['seconds']:.1f} s: {what}", flush=True)


def table(rows: Sequence[harness.Row]) -> str:
    """Markdown: a line for each trial, mean ± sample standard deviation over its seeds."""
    lines = ["| overrides | seeds | HR@10 | NDCG@10 |", "|---|---|---|---|"]
    trials: dict[str, list[harness.Row]] = {}
    for row in rows:
        if "error" not in row:
            trials.setdefault(" ".join(row["overrides"]) or "none", []).append(row)
    for trial, of_trial in trials.items():
        cells = []
        for name in ("HR@10", "NDCG@10"):
            values = [row[name] for row in of_trial]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4f}{spread}")
        lines.append(f"| {trial} | {len(of_trial)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--trials", type=Path, help="a file with one run's overrides a line")
    parser.add_argument("--validation", action="store_true", help="hold out the second-last event, drop the last")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "retrieval.jsonl")
    arguments = parser.parse_args()
    trials = read_trials(arguments.trials) if arguments.trials else [[]]
    tasks = [([*arguments.overrides, *trial], seed) for trial in trials for seed in arguments.seeds]

    context = multiprocessing.get_context("spawn")
    pending, rows = context.Queue(), context.Queue()
    for task in tasks:
        pending.put(task)
    workers = [context.Process(target=work, args=(arguments, pending, rows)) for _ in range(arguments.workers)]
    for worker in workers:
        worker.start()
    done: list[harness.Row] = []
    machine = harness.machine("cuda" if torch.cuda.is_available() else "cpu")
    for _ in tasks:
        while True:
            try:
                row = rows.get(timeout=5)
                break
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    raise SystemExit("train_retrieval: the workers ended before their runs were done") from None
        show(row)
        done.append(row)
        harness.append_rows(arguments.output, [{**row, **machine}])
    for worker in workers:
        worker.join()
    print("\n" + table(sorted(done, key=lambda row: tasks.index((row["overrides"], row["seed"])))))


if __name__ == "__main__":
    main()
