"""Draws the masks of the README as SVG files beside this script, in images/.

python docs/make_mask_pictures.py            write them
python docs/make_mask_pictures.py --check    fail where one is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from hstu_ext.masks import IntervalMask, Mask, TargetMask, WindowMask

IMAGES = Path(__file__).resolve().parent / "images"
LENGTH = 12
CELL = 10  # pixels
DROPPED = "#e8e8e8"
CONTEXT, HISTORY, TARGET = "#2a9d8f", "#3b76c4", "#e08a2c"

# Name -> (mask, query rows). Keys are LENGTH in every picture.
PICTURES: dict[str, tuple[Mask, int]] = {
    "full": (WindowMask(-1, -1), LENGTH),
    "causal": (WindowMask(-1, 0), LENGTH),
    "window": (WindowMask(3, 1), LENGTH),
    "target": (TargetMask(num_contexts=2, num_targets=4, target_group_size=2), LENGTH),
    "delta_q": (WindowMask(-1, 0), 4),
    "interval": (
        IntervalMask(
            torch.tensor(
                [
                    [2, 2, 2, 2, 4, 4, 4, 4, 4, 0, 0, 0],
                    [4, 4, 4, 4, 6, 6, 6, 6, 6, 3, 3, 3],
                    [8, 8, 8, 8, 12, 12, 12, 12, 12, 6, 7, 8],
                ]
            )
        ),
        LENGTH,
    ),
}


def runs(row: Tensor) -> list[tuple[int, int]]:
    """[begin, end) of every run of True."""
    padded = torch.cat([row.new_zeros(1), row, row.new_zeros(1)]).int().diff()
    return list(zip((padded == 1).nonzero()[:, 0].tolist(), (padded == -1).nonzero()[:, 0].tolist()))


def svg(mask: Mask, rows: int) -> str:
    """Queries go down, keys go right. In a target mask contexts, history and targets have colours of their own."""
    keep = mask.materialize(rows, LENGTH)
    sections = [(0, LENGTH, HISTORY)]
    if isinstance(mask, TargetMask):
        end = LENGTH - mask.num_targets
        sections = [(0, mask.num_contexts, CONTEXT), (mask.num_contexts, end, HISTORY), (end, LENGTH, TARGET)]
    paths = {DROPPED: f"M0 0h{LENGTH}v{rows}h-{LENGTH}z"}
    for first, last, colour in sections:
        cells = [
            f"M{first + begin} {i}h{end - begin}v1h-{end - begin}z"
            for i in range(rows)
            for begin, end in runs(keep[i, first:last])
        ]
        paths[colour] = "".join(cells)
    grid = "".join(f"M0 {i}h{LENGTH}" for i in range(1, rows)) + "".join(f"M{j} 0v{rows}" for j in range(1, LENGTH))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{CELL * LENGTH}" height="{CELL * rows}" '
        f'viewBox="0 0 {LENGTH} {rows}">',
        *(f'<path fill="{colour}" d="{path}"/>' for colour, path in paths.items() if path),
        f'<path stroke="#fff" stroke-width=".08" d="{grid}"/>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name, (mask, rows) in PICTURES.items():
        path = IMAGES / f"mask_{name}.svg"
        text = svg(mask, rows)
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not what {Path(__file__).name} draws")


if __name__ == "__main__":
    main()
