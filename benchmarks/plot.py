"""Draws efficiency against sequence length, one panel a direction, from rows of bench_attention.py.

python benchmarks/plot.py benchmarks/results/attention.jsonl efficiency.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from harness import Row, read_rows

TITLES = {"fwd": "forward", "bwd": "backward"}


def curves(rows: list[Row], provider: str) -> dict[tuple[str, int], dict[int, float]]:
    """(direction, head dimension) -> length -> efficiency of the latest row with equal lengths."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        if row["provider"] == provider and row["direction"] in TITLES and row["lengths"].startswith("u"):
            points = found.setdefault((row["direction"], row["head_dim"]), {})
            points[int(row["lengths"][1:])] = row["efficiency"]
    return found


def draw(rows: list[Row], provider: str, target: Path) -> None:
    found = curves(rows, provider)
    if not found:
        raise SystemExit(f"no rows of {provider} with equal lengths")
    figure, panels = plt.subplots(1, len(TITLES), figsize=(10, 4), sharey=True, layout="constrained")
    for panel, (direction, title) in zip(panels, TITLES.items()):
        for (of, dim), points in sorted(found.items()):
            if of == direction:
                lengths = sorted(points)
                panel.plot(lengths, [100 * points[n] for n in lengths], marker="o", label=f"d = {dim}")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("sequence length")
        panel.set_title(title)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    panels[0].set_ylabel("efficiency, % of the measured roof")
    panels[0].set_ylim(0, 100)
    last = rows[-1]
    figure.suptitle(f"{provider}, causal, {last['gpu'] or last.get('cpu')}")
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--provider", default="hstu_ext")
    options = parser.parse_args()
    draw(read_rows(options.rows), options.provider, options.picture)


if __name__ == "__main__":
    main()
