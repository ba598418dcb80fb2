"""Draws efficiency against sequence length, a panel for each direction and head dimension.

python benchmarks/plot.py benchmarks/results/attention-h100.jsonl docs/images/efficiency.png [--peers peers.csv]

Rows are those of bench_attention.py; of equal cells the latest counts. --peers adds dashed lines from such rows or from
a CSV with the columns head_dim, lengths, peer, fwd_efficiency and bwd_efficiency: what others reached, as shares of the
roof of the machine that they were measured on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from harness import Row, read_peers, read_rows

TITLES = {"fwd": "forward", "bwd": "backward"}
Panel = tuple[str, int]  # direction, head dimension
Curve = dict[int, float]  # length -> efficiency


def curves(rows: Iterable[Row], provider: str) -> dict[Panel, Curve]:
    """Those of batches with equal lengths."""
    found: dict[Panel, Curve] = {}
    for row in rows:
        wanted = row["provider"] == provider and row["direction"] in TITLES and row["lengths"].startswith("u")
        if wanted and row.get("efficiency"):
            points = found.setdefault((row["direction"], row["head_dim"]), {})
            points[int(row["lengths"][1:])] = row["efficiency"]
    return found


def draw(rows: list[Row], provider: str, target: Path, peers: list[Row] | None = None) -> None:
    found = curves(rows, provider)
    if not found:
        raise SystemExit(f"no rows of {provider} with equal lengths")
    names = sorted({row["provider"] for row in peers or []} - {provider})
    others = {name: curves(peers or [], name) for name in names}
    directions = [direction for direction in TITLES if any(of == direction for of, _ in found)]
    dims = sorted({dim for _, dim in found})
    size = (3.4 * len(dims), 3.1 * len(directions) + 0.9)
    figure, panels = plt.subplots(
        len(directions), len(dims), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for line, direction in zip(panels, directions, strict=True):
        for panel, dim in zip(line, dims, strict=True):
            for name, points, style in (
                *((name, others[name].get((direction, dim), {}), "--") for name in names),
                (provider, found.get((direction, dim), {}), "-"),
            ):
                lengths = sorted(points)
                color = f"C{names.index(name) + 1 if name in names else 0}"
                panel.plot(lengths, [100 * points[n] for n in lengths], style, color=color, marker=".", label=name)
            panel.set_xscale("log", base=2)
            panel.set_title(f"{TITLES[direction]}, d = {dim}")
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("sequence length")
    for line in panels:
        line[0].set_ylabel("% of the measured roof")
    panels[0][0].set_ylim(0, 100)
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    last = [row for row in rows if row["provider"] == provider][-1]
    figure.suptitle(f"{provider}, {last['mask']}, {last['dtype']}, {last['gpu'] or last.get('cpu')}")
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--provider", default="hstu_ext")
    parser.add_argument("--peers", type=Path)
    options = parser.parse_args()
    peers = read_peers(options.peers) if options.peers else None
    draw(read_rows(options.rows), options.provider, options.picture, peers)


if __name__ == "__main__":
    main()
