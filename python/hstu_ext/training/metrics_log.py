"""Where the numbers of a run go: a JSONL file, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO


class MetricsLog:
    """metrics.jsonl of a run, one object a line, and TensorBoard's scalars.

    Args:
        run: directory of the run; None for no files.
        tensorboard: auto, on or off; auto is on where it is installed.
        resumed_from: step of a checkpoint; what was written after it is dropped.
    """

    def __init__(self, run: Path | None, tensorboard: str, resumed_from: int | None = None) -> None:
        self._file: TextIO | None = None
        self._writer: Any = None
        if run is None:
            return
        path = run / "metrics.jsonl"
        kept: list[str] = []
        if resumed_from is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= resumed_from]
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._writer = _tensorboard_writer(run, tensorboard, resumed_from)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """One line {"event": .., "step": .., values}; numbers also go to TensorBoard as event/name."""
        if self._file is not None:
            print(json.dumps({"event": event, "step": step, **values}), file=self._file, flush=True)
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


class ProgressBar:
    """`name  34% [######.............] 123/361  12.3 it/s  text`, rewritten in place, on a terminal only."""

    def __init__(self, name: str, total: int, stream: TextIO = sys.stderr, width: int = 24) -> None:
        self._name, self._total, self._stream, self._width = name, max(total, 1), stream, width
        self._visible = stream.isatty()
        self._begin = self._shown = time.perf_counter()
        self._first: int | None = None

    def update(self, done: int, text: str = "") -> None:
        """Shows `done` of the total, at most ten times a second."""
        if not self._visible:
            return
        if self._first is None:
            self._first = done - 1
        now = time.perf_counter()
        if now - self._shown < 0.1 and done < self._total:
            return
        self._shown = now
        filled = self._width * done // self._total
        rate = (done - self._first) / max(now - self._begin, 1e-9)
        bar = "#" * filled + "." * (self._width - filled)
        line = f"{self._name} {100 * done // self._total:3d}% [{bar}] {done}/{self._total} {rate:6.1f} it/s  {text}"
        print(f"\r{line}\033[K", end="", file=self._stream, flush=True)

    def close(self) -> None:
        if self._visible:
            print("\r\033[K", end="", file=self._stream, flush=True)


def table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Names and numbers in columns, to print; None is left out."""
    width = max([len(name) for name, _ in rows] + [0])
    lines = [" " * width + "".join(f"{name:>11}" for name in header)]
    for name, values in rows:
        lines.append(name.ljust(width) + "".join(" " * 11 if v is None else f"{v:11.4f}" for v in values))
    return "\n".join(lines)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut off by the end of the earlier run


def _tensorboard_writer(run: Path, wanted: str, resumed_from: int | None) -> Any:
    if wanted == "off":
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if wanted == "auto":
            return None
        raise ImportError(
            "hstu_ext.training: tensorboard must be installed for output.tensorboard = 'on': "
            "pip install 'hstu_ext[train]'"
        ) from None
    return SummaryWriter(str(run / "tensorboard"), purge_step=None if resumed_from is None else resumed_from + 1)
