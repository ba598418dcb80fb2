"""Compiles every cell of a build alone and prints what each costs, as a Markdown table.

    cmake -G Ninja -S . -B build/measure -DHSTU_EXT_SET=default
    python tools/codegen/measure.py build/measure --jobs 2

Seconds are CPU time of the compiler and its children, so that other work on the machine hardly changes them; memory is
the peak of its largest process; bytes are those of the object file.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    cell: str
    seconds: float
    megabytes: float
    object_bytes: int


def compile_commands(build: Path) -> dict[str, list[str]]:
    """Cell -> the command that compiles it, without a launcher such as ccache."""
    database = subprocess.run(["ninja", "-C", build, "-t", "compdb"], check=True, capture_output=True, text=True)
    commands = {}
    for entry in json.loads(database.stdout):
        source, words = Path(entry["file"]), shlex.split(entry["command"])
        if source.suffix == ".cu" and "-o" in words:
            compiler = next(i for i, word in enumerate(words) if Path(word).name == "nvcc")
            commands[source.stem] = words[compiler:]
    return commands


def measure(build: Path, cell: str, command: list[str]) -> Cost:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "cell.o"
        words = list(command)
        words[words.index("-o") + 1] = str(output)
        words[words.index("-MF") + 1] = str(Path(scratch) / "cell.d")
        process = subprocess.Popen(words, cwd=build, env={**os.environ, "TMPDIR": scratch})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"{cell}: the compiler failed")
        return Cost(cell, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="a CMake build tree, configured")
    parser.add_argument("--jobs", type=int, default=1, help="cells compiled at a time (default: %(default)s)")
    args = parser.parse_args()

    commands = compile_commands(args.build)
    print("| cell | CPU seconds | peak MB | object bytes |\n|---|---|---|---|")
    costs = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for cost in pool.map(partial(measure, args.build), commands.keys(), commands.values()):
            print(f"| {cost.cell} | {cost.seconds:.1f} | {cost.megabytes:.0f} | {cost.object_bytes:,} |", flush=True)
            costs.append(cost)
    total = Cost(
        f"all {len(costs)}",
        sum(cost.seconds for cost in costs),
        max(cost.megabytes for cost in costs),
        sum(cost.object_bytes for cost in costs),
    )
    print(f"| {total.cell} | {total.seconds:.0f} | {total.megabytes:.0f} | {total.object_bytes:,} |")


if __name__ == "__main__":
    main()
