"""One way in for every format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hstu_ext.data.download import DATASETS
from hstu_ext.data.errors import DataError, broken_file
from hstu_ext.data.events import Duplicates, Events, pack
from hstu_ext.data.files import Folder, csv_rows, expand
from hstu_ext.data.interaction_log import InteractionLog
from hstu_ext.data.interactions import read_interactions_csv, read_interactions_parquet
from hstu_ext.data.movielens import RATINGS, read_ratings, with_movies_and_users
from hstu_ext.data.sequences import ITEMS, read_sequences
from hstu_ext.data.synthetic import synthetic

SEQUENCES = ("sequences.csv", "sequences.csv.gz")
IN_FOLDERS = (*RATINGS, *SEQUENCES)


def load(
    source: str | os.PathLike[str] = "synthetic",
    *,
    columns: Mapping[str, str] | None = None,
    duplicates: Duplicates = "keep",
    **options: Any,
) -> InteractionLog:
    """Reads a log from where its name or path says.

    "synthetic": `synthetic(**options)`, the only source with options of its own.
    A folder or zip archive: MovieLens by its ratings.dat, ratings.csv or u.data, else sequences.csv or
    sequences.csv.gz; movies.dat, movies.csv or u.item, and users.dat or u.user, beside them give titles and features.
    A file: one of these, a CSV of sequences (`user_id,sequence_item_ids[,sequence_ratings,sequence_timestamps]`), or a
    CSV or Parquet file with one event a row. A CSV may be compressed (.csv.gz).

    Users and items are numbered by id, ascending, as numbers where all ids are integers. Users' events are in order of
    time, ties and everything without times in the order of the file.

    Args:
        source: name or path; ~ and $VARIABLES are filled in.
        columns: of a file with one event a row, by role: {"user": ..., "item": ..., "time": ..., "rating": ...,
            "action": ...}; user and item are needed. By default user_id, item_id, and what there is of timestamp,
            rating and action.
        duplicates: "keep", or "drop" all but the first of several events of the same user, item and time.

    Raises:
        DataError: with file and line, for a source that cannot be read.
    """
    if os.fspath(source) == "synthetic":
        if columns is not None:
            raise DataError("hstu_ext.data: columns are for files, got some for 'synthetic'")
        return synthetic(**options)
    if options:
        raise DataError(f"hstu_ext.data: {', '.join(options)} must be left out for a file, got {os.fspath(source)!r}")
    path = expand(source)
    if not path.exists():
        hint = f"; `hstu-ext data download {path.name}` fetches {path.name}.zip" if path.name in DATASETS else ""
        raise broken_file(str(path), "'synthetic', or a file or folder", f"nothing there{hint}")
    is_folder = path.is_dir() or path.suffix == ".zip"
    with Folder(path, IN_FOLDERS) if is_folder else Folder(path.parent, (path.name,)) as folder:
        if folder.found is None:
            raise broken_file(str(path), f"one of {', '.join(IN_FOLDERS)} in it", "none of them")
        log = pack(_read(folder, folder.found, columns), folder.label(folder.found), duplicates)
        return with_movies_and_users(log, folder) if folder.found in IN_FOLDERS else log


def _read(folder: Folder, name: str, columns: Mapping[str, str] | None) -> Events:
    file = folder.label(name)
    if name.endswith((".parquet", ".pq")):
        return read_interactions_parquet(file, columns)
    is_csv = name.endswith((".csv", ".csv.gz"))
    if columns is not None and not is_csv:
        raise broken_file(file, "no columns, which are for CSV and Parquet", f"{dict(columns)}")
    if columns is None and name in RATINGS:
        return read_ratings(folder, name)
    if not is_csv:
        formats = f"{', '.join(RATINGS)}, .csv, .csv.gz, .parquet or .zip"
        raise broken_file(file, f"a name that tells the format ({formats})", f"'{name}'")
    with folder.open(name) as stream:
        header = next(csv_rows(stream, file), (1, []))[1]
    with folder.open(name) as stream:
        if columns is None and ITEMS in header:
            return read_sequences(stream, file)
        return read_interactions_csv(stream, file, columns)
