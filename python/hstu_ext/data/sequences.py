"""Logs with one user a row: user_id,sequence_item_ids[,sequence_ratings,sequence_timestamps]."""

from __future__ import annotations

import csv
import gzip
import io
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray

from hstu_ext.data.errors import DataError, broken_file, broken_row
from hstu_ext.data.events import Events, Vocabulary, parse_decimals, parse_integers, plain_decimal
from hstu_ext.data.files import csv_rows
from hstu_ext.data.interaction_log import InteractionLog

USER, ITEMS, RATINGS, TIMES = "user_id", "sequence_item_ids", "sequence_ratings", "sequence_timestamps"


def read_sequences(stream: BinaryIO, file: str) -> Events:
    """Each sequence is a quoted field of values with commas between them. Other columns are passed over."""
    rows = csv_rows(stream, file)
    header = next(rows, (1, []))[1]
    if not header:
        raise broken_file(file, "a header", "an empty file")
    if USER not in header or ITEMS not in header:
        raise broken_row(file, 1, f"a header with {USER} and {ITEMS}", ",".join(header))
    place = {name: header.index(name) for name in (USER, ITEMS, RATINGS, TIMES) if name in header}
    vocabulary, users = Vocabulary(), Vocabulary()
    items, lengths = array("q"), array("q")
    ratings: list[NDArray[Any]] = []
    times: list[NDArray[Any]] = []
    for line, row in rows:
        if len(row) != len(header):
            raise broken_row(file, line, f"{len(header)} columns {','.join(header)}", ",".join(row))
        user = row[place[USER]]
        if user in users:
            raise broken_row(file, line, f"every {USER} once", user)
        try:
            users[user]
        except ValueError:
            raise broken_row(file, line, f"an id in UTF-8 without blanks around it as {USER}", user) from None
        ids = row[place[ITEMS]].split(",")
        try:
            items.extend([vocabulary[name] for name in ids])
        except ValueError:
            raise broken_row(file, line, f"ids in UTF-8 without blanks as {ITEMS}", row[place[ITEMS]]) from None
        lengths.append(len(ids))
        if RATINGS in place:
            ratings.append(_values(row[place[RATINGS]], RATINGS, len(ids), file, line))
        if TIMES in place:
            times.append(_values(row[place[TIMES]], TIMES, len(ids), file, line))
    if not users:
        raise broken_file(file, "rows after the header", "none")
    return Events(
        users=np.repeat(np.arange(len(users)), np.frombuffer(lengths, np.int64)),
        items=np.frombuffer(items, np.int64),
        user_ids=list(users),
        item_ids=list(vocabulary),
        times=np.concatenate(times) if TIMES in place else None,
        ratings=np.concatenate(ratings) if RATINGS in place else None,
    )


def _values(field: str, name: str, length: int, file: str, line: int) -> NDArray[Any]:
    """One value for every item of a row."""
    parse, kind = (parse_integers, "integers") if name == TIMES else (parse_decimals, "numbers")
    try:
        values: NDArray[Any] = parse(field.split(","))
    except ValueError:
        raise broken_row(file, line, f"{kind} as {name}", field) from None
    if len(values) != length:
        raise broken_row(file, line, f"{length} {name}, one for every item", field)
    return values


def write_sequences(log: InteractionLog, path: Path) -> None:
    """Writes a log so that `read_sequences` reads it back, compressed where the name ends in .gz.

    Ids, ratings and times are kept. Titles, features, and actions that are not ratings have no column. The file appears
    under its name when it is complete.
    """
    comma = next((name for name in log.item_ids if "," in name), None)
    if comma is not None:
        raise DataError(f"hstu_ext.data: item ids must be without commas to be written as sequences, got {comma!r}")
    if log.num_users and int(log.lengths.min()) == 0:
        raise DataError("hstu_ext.data: every user must have events to be written as sequences, got one without")
    columns = {ITEMS: [log.item_ids[item] for item in log.items.tolist()]}
    if log.ratings is not None:
        distinct, codes = np.unique(log.ratings.cpu().numpy(), return_inverse=True)
        texts = [plain_decimal(value) for value in distinct]
        columns[RATINGS] = [texts[code] for code in codes.tolist()]
    if log.timestamps is not None:
        columns[TIMES] = [str(time) for time in log.timestamps.tolist()]
    offsets = log.offsets.tolist()
    part = path.with_name(path.name + ".part")
    try:
        with _text_writer(part, compress=path.name.endswith(".gz")) as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow([USER, *columns])
            for user, start, end in zip(log.user_ids, offsets, offsets[1:]):
                writer.writerow([user, *(",".join(values[start:end]) for values in columns.values())])
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _text_writer(path: Path, *, compress: bool) -> Iterator[TextIO]:
    with ExitStack() as stack:
        raw: Any = stack.enter_context(path.open("wb"))
        if compress:  # without name and time, so that the same log gives the same bytes
            raw = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
