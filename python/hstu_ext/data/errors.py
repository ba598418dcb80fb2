"""The one error of the readers."""

from __future__ import annotations

LONGEST_QUOTE = 100  # characters of a broken row that an error shows


class DataError(ValueError):
    """Data that cannot be read, with the file, the line where there is one, what was expected and what came."""


def broken_row(file: str, line: int, expected: str, got: str | bytes) -> DataError:
    """The error for one line (1 is the first) of a file."""
    raw = got if isinstance(got, bytes) else got.encode("utf-8", "surrogateescape")
    text = raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
    if len(text) > LONGEST_QUOTE:
        text = text[:LONGEST_QUOTE] + "..."
    return DataError(f"hstu_ext.data: {file}:{line}: expected {expected}, got '{text}'")


def broken_file(file: str, expected: str, got: str) -> DataError:
    """The error for a file as a whole."""
    return DataError(f"hstu_ext.data: {file}: expected {expected}, got {got}")
