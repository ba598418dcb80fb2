"""sm80/block_order.h, sm90/schedule.h and fast_divisor.h: which block does what."""

from __future__ import annotations

from pathlib import Path

import cpp_program


def test_block_order(tmp_path: Path) -> None:
    """Every (sequence, head, rank) has one block, and no block of a group comes before a heavier one of it."""
    cpp_program.run("test_block_order.cpp", tmp_path)


def test_schedule(tmp_path: Path) -> None:
    """Every row block has one place, and blocks get even shares of the work."""
    cpp_program.run("test_schedule.cpp", tmp_path, emulated=True)
