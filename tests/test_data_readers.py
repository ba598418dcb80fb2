"""Every format by small files written by hand: what is read, and what is refused with its file and line."""

from __future__ import annotations

import gzip
import io
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_ext.data import DataError, InteractionLog, load, numeric_table
from hstu_ext.data.events import integer_vocabulary, order_of_ids, plain_decimal
from hstu_ext.data.sequences import write_sequences

# User 10 has a tie at time 5 (movies 7, then 30), user 2 comes with falling times.
RATINGS = [(10, 7, "5", 5), (2, 30, "3", 9), (10, 30, "4", 5), (2, 7, "1", 1), (10, 200, "3", 2)]
MOVIES = {"7": ("Café (1995)", ["Comedy", "Drama"]), "30": ("Heat: 1995 (2001)", []), "9": ("Unseen (1931)", ["War"])}


def sequences_of(log: InteractionLog) -> dict[str, list[str]]:
    """The ids of every user's events."""
    offsets = log.offsets.tolist()
    items = [log.item_ids[item] for item in log.items.tolist()]
    return {user: items[start:end] for user, start, end in zip(log.user_ids, offsets, offsets[1:])}


def assert_same_events(log: InteractionLog, other: InteractionLog) -> None:
    assert (list(log.user_ids), list(log.item_ids)) == (list(other.user_ids), list(other.item_ids))
    assert list(log.action_names) == list(other.action_names)
    for name in ("items", "offsets", "timestamps", "ratings", "actions"):
        ours, theirs = getattr(log, name), getattr(other, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def assert_is_the_hand_made_log(log: InteractionLog) -> None:
    assert list(log.user_ids) == ["2", "10"]  # as numbers, not as text
    assert list(log.item_ids) == ["7", "30", "200"]
    assert (log.items.dtype, log.offsets.dtype) == (torch.int64, torch.int64)
    assert log.offsets.tolist() == [0, 2, 5]
    assert log.items.tolist() == [0, 1, 2, 0, 1]  # the tie of user 10 is in the order of the file
    assert log.timestamps is not None
    assert (log.timestamps.dtype, log.timestamps.tolist()) == (torch.int64, [1, 9, 2, 5, 5])
    assert log.ratings is not None
    assert (log.ratings.dtype, log.ratings.tolist()) == (torch.float32, [1.0, 3.0, 3.0, 5.0, 4.0])
    assert log.actions is not None
    assert (log.actions.dtype, log.actions.tolist()) == (torch.int64, [0, 1, 1, 3, 2])
    assert list(log.action_names) == ["1", "3", "4", "5"]


def write_ml1m(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in RATINGS))
    movies = "".join(f"{i}::{title}::{'|'.join(genres)}\n" for i, (title, genres) in MOVIES.items())
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    (folder / "users.dat").write_text("2::F::1::12::48067\n10::M::56::0::70072\n")
    return folder


def write_ml20m(folder: Path, line_end: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["userId,movieId,rating,timestamp", *(f"{u},{i},{r}.0,{t}" for u, i, r, t in RATINGS)]
    (folder / "ratings.csv").write_bytes("".join(row + line_end for row in rows).encode())
    movies = 'movieId,title,genres\n7,Café (1995),Comedy|Drama\n30,"Heat, The (2001)",(no genres listed)\n'
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    return folder


def write_ml100k(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in RATINGS))
    (folder / "u.genre").write_text("unknown|0\nDrama|1\nComedy|2\n\n")
    (folder / "u.item").write_bytes(
        "7|Café (1995)|01-Jan-1995||http://x|0|1|1\n30|unknown||||1|0|0\n".encode("latin-1")
    )
    (folder / "u.user").write_text("10|24|M|writer|85711\n2|17|F|artist|1\n")
    return folder


def zipped(folder: Path) -> Path:
    """The archive of a folder as GroupLens makes it, with the folder inside."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr(f"{folder.name}/", "")
        for file in sorted(folder.iterdir()):
            out.write(file, f"{folder.name}/{file.name}")
    return archive


@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("write", [write_ml1m, write_ml20m, write_ml100k])
def test_movielens_ratings(tmp_path: Path, write: Callable[[Path], Path], as_zip: bool) -> None:
    folder = write(tmp_path / "ml")
    assert_is_the_hand_made_log(load(zipped(folder) if as_zip else folder))


def test_movielens_file_by_its_path_and_with_carriage_returns(tmp_path: Path) -> None:
    assert_is_the_hand_made_log(load(write_ml20m(tmp_path / "crlf", "\r\n")))
    assert_is_the_hand_made_log(load(write_ml1m(tmp_path / "ml") / "ratings.dat"))


@pytest.mark.parametrize("write", [write_ml1m, write_ml20m, write_ml100k])
def test_movielens_last_line_needs_no_end(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    folder = write(tmp_path / "ml")
    for name in ("ratings.dat", "ratings.csv", "u.data"):
        if (folder / name).exists():
            (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert_is_the_hand_made_log(load(folder))


def test_ml1m_titles_and_features(tmp_path: Path) -> None:
    log = load(write_ml1m(tmp_path / "ml"))
    assert log.item_titles == ["Café (1995)", "Heat: 1995 (2001)", "movie 200"]  # Latin-1; 200 is in no file
    assert log.item_feature_names["genres"] == ["Comedy", "Drama", "War"]
    assert log.item_features["genres"].tolist() == [[1.0, 1.0, 0.0], [0.0] * 3, [0.0] * 3]
    assert log.item_features["genres"].dtype == torch.float32
    assert log.item_feature_names["year"] == ["unknown", "1995", "2001"]
    assert log.item_features["year"].tolist() == [1, 2, 0]
    assert {name: values.tolist() for name, values in log.user_features.items()} == {
        "gender": [1, 2],
        "age": [1, 7],
        "occupation": [2, 1],  # occupations in the order of their numbers, from 1
    }
    assert log.user_feature_sizes == {"gender": 3, "age": 8, "occupation": 3}


def test_ml20m_titles_are_utf8_and_quoted(tmp_path: Path) -> None:
    log = load(write_ml20m(tmp_path / "ml"))
    assert log.item_titles == ["Café (1995)", "Heat, The (2001)", "movie 200"]
    assert log.item_feature_names["genres"] == ["Comedy", "Drama"]
    assert log.item_features["genres"].tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert log.user_features == {}


def test_ml100k_titles_and_features(tmp_path: Path) -> None:
    log = load(write_ml100k(tmp_path / "ml"))
    assert log.item_titles == ["Café (1995)", "unknown", "movie 200"]
    assert log.item_feature_names["genres"] == ["Comedy", "Drama", "unknown"]
    assert log.item_features["genres"].tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert log.item_features["year"].tolist() == [1, 0, 0]
    assert {name: values.tolist() for name, values in log.user_features.items()} == {
        "gender": [1, 2],
        "age": [1, 2],
        "occupation": [1, 2],
    }


def test_users_without_a_line_are_unknown(tmp_path: Path) -> None:
    folder = write_ml1m(tmp_path / "ml")
    (folder / "users.dat").write_text("2::F::1::12::48067\n")
    log = load(folder)
    assert {name: values.tolist() for name, values in log.user_features.items()} == {
        "gender": [1, 0],
        "age": [1, 0],
        "occupation": [1, 0],
    }


def test_half_star_ratings_are_ten_actions(tmp_path: Path) -> None:
    rows = "".join(f"1,{star},{star / 2},{star}\n" for star in range(1, 11))
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
    log = load(tmp_path)
    assert list(log.action_names) == ["0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5"]
    assert log.actions is not None
    assert log.actions.tolist() == list(range(10))


def test_large_files_are_parsed_by_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows lie across the ends of blocks, and an error still knows its line."""
    monkeypatch.setattr(numeric_table, "BLOCK", 64)
    rows = [(user % 7 + 1, 3 * user + 1, user % 5 + 1, 10**9 + user) for user in range(200)]
    lines = [f"{u}::{i}::{r}::{t}" for u, i, r, t in rows]
    (tmp_path / "ratings.dat").write_text("\n".join(lines) + "\n")
    log = load(tmp_path)
    assert sequences_of(log) == {
        str(user): [str(item) for owner, item, _, _ in rows if owner == user] for user in range(1, 8)
    }
    assert log.timestamps is not None
    assert sorted(log.timestamps.tolist()) == [time for *_, time in rows]
    lines[150] = "1::2::3::4x"
    (tmp_path / "ratings.dat").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=re.escape("ratings.dat:151: expected an integer")):
        load(tmp_path)
    (tmp_path / "ratings.dat").write_text("x" * 1000)
    with pytest.raises(DataError, match=re.escape("ratings.dat:1: expected 4 columns")):
        load(tmp_path)


NUMBERS = st.integers(0, 10**18 - 1)
DECIMALS = st.from_regex(r"[0-9]{1,4}(\.[0-9]{0,3})?", fullmatch=True)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, DECIMALS, NUMBERS), min_size=1, max_size=30), st.booleans(), st.booleans())
@settings(deadline=None)
def test_numeric_table_reads_what_python_reads(
    rows: list[tuple[int, int, str, int]], carriage: bool, end: bool
) -> None:
    line_end = "\r\n" if carriage else "\n"
    text = line_end.join(f"{a}::{b}::{c}::{d}" for a, b, c, d in rows) + (line_end if end else "")
    columns = [numeric_table.Column(name, decimal=name == "c") for name in "abcd"]
    read = numeric_table.read_numeric_table(io.BytesIO(text.encode()), "file", "::", columns)
    expected = zip(*((a, b, torch.tensor(float(c)).item(), d) for a, b, c, d in rows))
    assert [column.tolist() for column in read] == [list(column) for column in expected]


@given(st.lists(st.integers(0, 300), max_size=60), st.sampled_from([1, 10**6]))
@settings(deadline=None)
def test_integer_vocabulary_is_ascending_dense_or_sparse(ids: list[int], scale: int) -> None:
    indices, names = integer_vocabulary(np.array([scale * name for name in ids], np.int64))
    assert names == [str(name) for name in sorted({scale * name for name in ids})]
    assert [names[index] for index in indices.tolist()] == [str(scale * name) for name in ids]


def test_ids_are_ordered_as_numbers_only_where_all_are() -> None:
    assert order_of_ids(["10", "9", "0"]) == [2, 1, 0]
    assert order_of_ids(["10", "9", "a"]) == [0, 1, 2]
    assert order_of_ids(["10", "09"]) == [1, 0]


def test_plain_decimal_reads_back() -> None:
    assert [plain_decimal(value) for value in (4.0, 3.5, 0.1, -2.0)] == ["4", "3.5", "0.1", "-2"]


@pytest.mark.parametrize("name", ["s.csv", "s.csv.gz"])
def test_sequences(tmp_path: Path, name: str) -> None:
    text = (
        "index,user_id,sequence_item_ids,sequence_ratings,sequence_timestamps\n"
        '0,10,"200,7,30","3,5,4.0","2,5,5"\n'
        '1,2,"30,7","3,1","9,1"\n'
    )
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert_is_the_hand_made_log(load(path))


def test_sequences_without_times_stay_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text('\ufeffuser_id,sequence_item_ids\nb,"x,y,x"\na,y\n', encoding="utf-8")
    log = load(tmp_path / "s.csv")
    assert sequences_of(log) == {"a": ["y"], "b": ["x", "y", "x"]}
    assert log.timestamps is None
    assert log.ratings is None
    assert log.actions is None
    assert log.item_titles is None


def test_sequences_beside_movies_have_titles(tmp_path: Path) -> None:
    folder = write_ml1m(tmp_path / "ml")
    (folder / "ratings.dat").unlink()
    (folder / "sequences.csv").write_text('user_id,sequence_item_ids\n10,"7,30"\n')
    log = load(folder)
    assert log.item_titles == ["Café (1995)", "Heat: 1995 (2001)"]
    assert log.user_features["gender"].tolist() == [2]


def test_a_long_sequence_is_one_field(tmp_path: Path) -> None:
    items = [str(item % 1000) for item in range(100_000)]  # longer than the csv module's own limit
    (tmp_path / "s.csv").write_text('user_id,sequence_item_ids\nu,"' + ",".join(items) + '"\n')
    assert sequences_of(load(tmp_path / "s.csv")) == {"u": items}


INTERACTIONS = "when,who,what,stars,note\n" + "".join(f'{t},{u},{i},{r},"a, b"\n' for u, i, r, t in RATINGS)
COLUMNS = {"user": "who", "item": "what", "time": "when", "rating": "stars"}


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "ratings.csv"])
def test_interactions_csv(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(INTERACTIONS.encode()) if name[-1] == "z" else INTERACTIONS.encode())
    assert_is_the_hand_made_log(load(tmp_path / name, columns=COLUMNS))


def test_interactions_csv_default_names_text_ids_and_actions(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        'item_id,user_id,action,price\ntea,"O\'Neil, A",view,x\nJürgen,bo,buy,\ntea,bo,view,\n', encoding="utf-8"
    )
    log = load(tmp_path / "log.csv")
    assert sequences_of(log) == {"O'Neil, A": ["tea"], "bo": ["Jürgen", "tea"]}
    assert log.actions is not None
    assert list(log.action_names) == ["buy", "view"]
    assert log.actions.tolist() == [1, 0, 1]
    assert log.timestamps is None


def test_columns_that_are_not_named_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,2,never\n")
    assert load(tmp_path / "log.csv", columns={"user": "user_id", "item": "item_id"}).timestamps is None


def test_negative_times_and_many_distinct_ratings(tmp_path: Path) -> None:
    rows = "".join(f"1,{item},{-item},{item / 7}\n" for item in range(1, 301))
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,rating\n" + rows)
    log = load(tmp_path / "log.csv")
    assert sequences_of(log)["1"] == [str(item) for item in range(300, 0, -1)]
    assert log.ratings is not None
    assert log.actions is None  # no more than 256 ratings are taken for actions


@pytest.mark.parametrize("integers", [True, False], ids=["integer", "text"])
def test_interactions_parquet(tmp_path: Path, integers: bool) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    users, items, ratings, times = zip(*RATINGS)
    as_id = int if integers else str
    table = arrow.table(
        {
            "who": [as_id(user) for user in users],
            "what": [as_id(item) for item in items],
            "stars": [float(rating) for rating in ratings],
            "when": arrow.array([time * 1000 for time in times], arrow.timestamp("ms")) if integers else list(times),
        }
    )
    parquet.write_table(table, tmp_path / "log.parquet", row_group_size=2)
    assert_is_the_hand_made_log(load(tmp_path / "log.parquet", columns=COLUMNS))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", [1.5, 2.5], "column user_id: expected text or integers as ids, got double"),
        ("user_id", ["a", None], "column user_id, row 2: expected a user, got null"),
        ("user_id", ["a", " b"], "column user_id: expected an id in UTF-8 without blanks around it as user, got ' b'"),
        ("timestamp", ["1", "2"], "column timestamp: expected integers or timestamps, got string"),
        ("rating", ["1", "2"], "column rating: expected numbers, got string"),
        ("rating", [1.0, float("nan")], "column rating, row 2: expected a finite number, got nan"),
        ("item", [1, 2], "log.parquet:1: expected the columns item_id (or others, named by `columns`), got 'user_id,"),
    ],
)
def test_broken_parquet(tmp_path: Path, column: str, values: list[Any], message: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns: dict[str, list[Any]] = {"user_id": [1, 2], "item_id": [1, 2]}
    if column == "item":
        del columns["item_id"]
    parquet.write_table(arrow.table(columns | {column: values}), tmp_path / "log.parquet")
    with pytest.raises(DataError, match=re.escape(message)):
        load(tmp_path / "log.parquet")


def test_parquet_that_is_none_or_empty(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "log.parquet").write_bytes(b"not this")
    with pytest.raises(DataError, match=r"log\.parquet: expected a Parquet file"):
        load(tmp_path / "log.parquet")
    empty = arrow.table({"user_id": arrow.array([], arrow.int64()), "item_id": arrow.array([], arrow.int64())})
    parquet.write_table(empty, tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"log\.parquet: expected rows, got none"):
        load(tmp_path / "log.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hstu_ext[parquet]'")):
        load(tmp_path / "log.parquet")


DAT, CSV = "user::movie::rating::timestamp", "userId,movieId,rating,timestamp"
TAB = "user<tab>movie<tab>rating<tab>timestamp"
INTEGER, NUMBER = "an integer of at most 18 digits as", "a number of at most 8 characters as"
IDS = "ids in UTF-8 without blanks as sequence_item_ids"
ID = "an id in UTF-8 without blanks around it as"


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("ratings.dat", "1::2::3::4\n1::2::3\n", 2, f"4 columns {DAT}, got '1::2::3'"),
        ("ratings.dat", "1::2::3::4\n1::2::3::4::5\n", 2, f"4 columns {DAT}, got '1::2::3::4::5'"),
        ("ratings.dat", "1::2::3::4\n\n1::2::3::4\n", 2, f"4 columns {DAT}, got ''"),
        ("ratings.dat", "1::2::3\n4::1::2::3::4\n", 1, f"4 columns {DAT}, got '1::2::3'"),
        ("ratings.dat", "1\t2\t3\t4\n", 1, f"4 columns {DAT}, got '1\t2\t3\t4'"),
        ("ratings.dat", "1::2::3::4\nx::2::3::4\n", 2, f"{INTEGER} user, got 'x'"),
        ("ratings.dat", "1::-2::3::4\n", 1, f"{INTEGER} movie, got '-2'"),
        ("ratings.dat", "1::2::3::\n", 1, f"{INTEGER} timestamp, got ''"),
        ("ratings.dat", "1::2::3::4 \n", 1, f"{INTEGER} timestamp, got '4 '"),
        ("ratings.dat", "1::2::3::" + "9" * 19 + "\n", 1, f"{INTEGER} timestamp, got '" + "9" * 19 + "'"),
        ("ratings.dat", "1::2::3::4\n1::2::five::4\n", 2, f"{NUMBER} rating, got 'five'"),
        ("ratings.dat", "1::2::1.2.3::4\n", 1, f"{NUMBER} rating, got '1.2.3'"),
        ("ratings.dat", "1::2::nan::4\n", 1, f"{NUMBER} rating, got 'nan'"),
        ("ratings.dat", "1::2::::4\n", 1, f"{NUMBER} rating, got ''"),
        ("ratings.dat", "1::2::3.00000000::4\n", 1, f"{NUMBER} rating, got '3.00000000'"),
        ("ratings.dat", "1::2::\xe9::4\n", 1, f"{NUMBER} rating, got '\xe9'"),
        ("ratings.dat", "", None, f"rows {DAT}, got an empty file"),
        ("ratings.csv", CSV + "\n", None, f"rows {CSV}, got an empty file"),
        ("ratings.csv", "", 1, f"the header '{CSV}', got ''"),
        ("ratings.csv", "1,2,3,4\n", 1, f"the header '{CSV}', got '1,2,3,4'"),
        ("ratings.csv", CSV + "\n1,2,3,4\n1,2;3,4\n", 3, f"4 columns {CSV}, got '1,2;3,4'"),
        ("ratings.csv", CSV + "\n1,2,3,4\n1,2,3,4.5\n", 3, f"{INTEGER} timestamp, got '4.5'"),
        ("u.data", "1\t2\t3\t4\n1 2 3 4\n", 2, f"4 columns {TAB}, got '1 2 3 4'"),
        ("s.csv", "user_id,sequence_item_ids\n1,\n", 2, f"{IDS}, got ''"),
        ("s.csv", 'user_id,sequence_item_ids\n1,"5,,6"\n', 2, f"{IDS}, got '5,,6'"),
        ("s.csv", 'user_id,sequence_item_ids\n1,"5, 6"\n', 2, f"{IDS}, got '5, 6'"),
        ("s.csv", "user_id,sequence_item_ids\n1,5\n2,6,7\n", 3, "2 columns user_id,sequence_item_ids, got '2,6,7'"),
        ("s.csv", "user_id,sequence_item_ids\n1,5\n1,6\n", 3, "every user_id once, got '1'"),
        ("s.csv", "user_id,sequence_item_ids\n,6\n", 2, f"{ID} user_id, got ''"),
        (
            "s.csv",
            'user_id,sequence_item_ids,sequence_timestamps\n1,"5,6","7"\n',
            2,
            "2 sequence_timestamps, one for every item, got '7'",
        ),
        (
            "s.csv",
            'user_id,sequence_item_ids,sequence_timestamps\n1,"5,6","7,1_0"\n',
            2,
            "integers as sequence_timestamps, got '7,1_0'",
        ),
        (
            "s.csv",
            'user_id,sequence_item_ids,sequence_ratings\n1,"5,6","7,x"\n',
            2,
            "numbers as sequence_ratings, got '7,x'",
        ),
        ("s.csv", "user_id,sequence_item_ids\n", None, "rows after the header, got none"),
        ("s.csv", '"user_id,sequence_item_ids\n1,5', 1, "a row of CSV, got 'unexpected end of data'"),
        ("sequences.csv", "user,items\n1,5\n", 1, "the columns user_id, item_id (or others, named by `columns`), got"),
        ("log.csv", "", None, "a header, got an empty file"),
        ("log.csv", "user_id,item_id\n", None, "rows after the header, got none"),
        ("log.csv", "user_id,item_id\n1,2\n1\n", 3, "2 columns user_id,item_id, got '1'"),
        ("log.csv", "user_id,item_id\n1,2\n\n1,3\n", 3, "2 columns user_id,item_id, got ''"),
        ("log.csv", 'user_id,item_id\n1,"2\n2"\n1,\n', 4, f"{ID} item, got ''"),
        ("log.csv", "user_id,item_id,timestamp\n1,2,3\n1,2,noon\n", 3, "an integer as time, got 'noon'"),
        ("log.csv", "user_id,item_id,timestamp\n1,2,5.0\n", 2, "an integer as time, got '5.0'"),
        ("log.csv", f"user_id,item_id,timestamp\n1,2,{2**63}\n", 2, f"an integer as time, got '{2**63}'"),
        ("log.csv", "user_id,item_id,rating\n1,2,inf\n", 2, "a number as rating, got 'inf'"),
        ("log.csv", "user_id,item_id,rating\n1,2,1e39\n", 2, "a number as rating, got '1e39'"),
        ("log.csv", 'user_id,item_id\n1,2\n1,"2"x\n', 3, "a row of CSV, got '"),
    ],
)  # fmt: skip
def test_broken_rows_are_named(tmp_path: Path, name: str, content: str, line: int | None, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    where = f"{path}:{line}" if line else f"{path}"
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"hstu_ext.data: {where}: expected {message}")


def test_broken_row_far_into_a_csv(tmp_path: Path) -> None:
    rows = [f"1,{item},{item}" for item in range(2000)]
    rows[1500] = "1,2,x"
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match=re.escape("log.csv:1502: expected an integer as time, got 'x'")):
        load(tmp_path / "log.csv")


def test_ids_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"user_id,item_id\n1,tea\n1,caf\xe9\n")
    with pytest.raises(DataError, match=re.escape("log.csv:3: expected an id in UTF-8")) as caught:
        load(tmp_path / "log.csv")
    str(caught.value).encode("utf-8")  # the message can be printed


def test_long_rows_are_cut_in_errors(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1" * 5000)
    with pytest.raises(DataError, match=r"got '1{100}\.\.\.'$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("write", "name", "content", "message"),
    [
        (write_ml1m, "movies.dat", "7::A::Drama\n8::B\n", ":2: expected 3 columns movie::title::genres, got '8::B'"),
        (write_ml1m, "users.dat", "2::X::1::1::0\n", ":1: expected a gender F or M, an age and an occupation, got"),
        (write_ml1m, "users.dat", "2::F::old::1::0\n", ":1: expected a gender F or M, an age and an occupation, got"),
        (write_ml20m, "movies.csv", "id,title\n", ":1: expected the header 'movieId,title,genres', got 'id,title'"),
        (write_ml20m, "movies.csv", "movieId,title,genres\n1,A,B,C\n", ":2: expected 3 columns movieId,title,genres"),
        (write_ml100k, "u.item", "7|A|||x|0|1|2\n", ":1: expected 0 or 1 for every genre, got '7|A"),
        (write_ml100k, "u.item", "7|A|||x|0|1\n", ":1: expected 8 columns movie|title"),
        (write_ml100k, "u.user", "2|F|17|artist|0\n", ":1: expected a gender F or M, an age and an occupation"),
    ],
)  # fmt: skip
def test_broken_side_files_are_named(
    tmp_path: Path, write: Callable[[Path], Path], name: str, content: str, message: str
) -> None:
    folder = write(tmp_path / "ml")
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(f"hstu_ext.data: {folder / name}{message}")):
        load(folder)
    if write is write_ml20m:
        return
    with pytest.raises(DataError, match=re.escape(f"ml.zip/ml/{name}{message}")):
        load(zipped(folder))


def test_what_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"expected one of ratings\.dat, .*sequences\.csv\.gz in it, got none of them"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"nothing there; `hstu-ext data download ml-1m` fetches ml-1m\.zip"):
        load(tmp_path / "ml-1m")
    monkeypatch.delenv("HSTU_EXT_DATA", raising=False)
    with pytest.raises(DataError, match="expected the environment variable HSTU_EXT_DATA to be set"):
        load("$HSTU_EXT_DATA/ml-1m")
    (tmp_path / "log.txt").write_text("1 2 3\n")
    with pytest.raises(DataError, match="expected a name that tells the format"):
        load(tmp_path / "log.txt")
    (tmp_path / "ml.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"ml\.zip: expected an intact archive, got File is not a zip file"):
        load(tmp_path / "ml.zip")
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(INTERACTIONS.encode() * 99)[:-20])
    with pytest.raises(DataError, match=r"log\.csv\.gz: expected an intact archive, got"):
        load(tmp_path / "log.csv.gz", columns=COLUMNS)


def test_paths_have_variables_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ml1m(tmp_path / "ml-1m")
    monkeypatch.setenv("HSTU_EXT_DATA", str(tmp_path))
    assert_is_the_hand_made_log(load("$HSTU_EXT_DATA/ml-1m"))


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_ml1m(tmp_path)
    with pytest.raises(DataError, match="num_users must be left out for a file"):
        load(tmp_path, num_users=3)
    with pytest.raises(DataError, match="columns are for files"):
        load("synthetic", columns=COLUMNS)
    with pytest.raises(DataError, match=r"ratings\.dat: expected no columns, which are for CSV and Parquet"):
        load(tmp_path, columns=COLUMNS)
    (tmp_path / "log.csv").write_text(INTERACTIONS)
    with pytest.raises(DataError, match="columns must name user, item, time, rating, action, got 'stamp'"):
        load(tmp_path / "log.csv", columns={**COLUMNS, "stamp": "when"})
    with pytest.raises(DataError, match=re.escape("log.csv:1: expected the columns nothing (or others")):
        load(tmp_path / "log.csv", columns={**COLUMNS, "time": "nothing"})
    with pytest.raises(DataError, match=re.escape("log.csv:1: expected the columns user_id, item_id (or others")):
        load(tmp_path / "log.csv")
    with pytest.raises(DataError, match="duplicates must be 'keep' or 'drop', got 'some'"):
        load(tmp_path, duplicates="some")  # type: ignore[arg-type]


def test_duplicates_are_the_same_user_item_and_time(tmp_path: Path) -> None:
    rows = [("a", "x", 5, 1), ("a", "y", 5, 2), ("a", "x", 5, 3), ("b", "x", 5, 4), ("a", "x", 6, 5), ("a", "x", 5, 6)]
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp,rating\n" + "".join(f"{u},{i},{t},{r}\n" for u, i, t, r in rows)
    )
    kept, dropped = (load(tmp_path / "log.csv", duplicates=rule) for rule in ("keep", "drop"))
    assert sequences_of(kept) == {"a": ["x", "y", "x", "x", "x"], "b": ["x"]}
    assert sequences_of(dropped) == {"a": ["x", "y", "x"], "b": ["x"]}
    assert list(dropped.action_names) == ["1", "2", "4", "5"]  # 3 went with its event
    assert dropped.ratings is not None
    assert dropped.ratings.tolist() == [1.0, 2.0, 5.0, 4.0]  # the first of them
    (tmp_path / "s.csv").write_text('user_id,sequence_item_ids\n1,"5,5"\n')
    with pytest.raises(DataError, match="expected times, to tell duplicates from repeats, got none"):
        load(tmp_path / "s.csv", duplicates="drop")


EVENT = st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 5), st.integers(1, 5))
EVENTS = st.lists(EVENT, min_size=1, max_size=40)


@given(EVENTS, st.sampled_from(["keep", "drop"]))
@settings(deadline=None)
def test_events_are_sorted_as_python_sorts_them(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[int, int, int, int]], duplicates: Any
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_text("user_id,item_id,timestamp,rating\n" + "".join(f"{u},{i},{t},{r}\n" for u, i, t, r in events))
    expected: dict[str, list[tuple[str, int, int]]] = {}
    for user, item, time, rating in sorted(events, key=lambda event: (event[0], event[2])):
        row = expected.setdefault(str(user), [])
        if duplicates == "keep" or all((str(item), time) != (other, then) for other, then, _ in row):
            row.append((str(item), time, rating))
    log = load(path, duplicates=duplicates)
    assert sequences_of(log) == {user: [item for item, _, _ in row] for user, row in expected.items()}
    assert log.timestamps is not None
    assert log.ratings is not None
    assert log.timestamps.tolist() == [time for row in expected.values() for _, time, _ in row]
    assert log.ratings.tolist() == [rating for row in expected.values() for _, _, rating in row]

    for name in ("out.csv", "out.csv.gz"):  # and what is written reads back
        write_sequences(log, path.with_name(name))
        assert_same_events(load(path.with_name(name)), log)


def test_the_same_log_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    log = load(write_ml1m(tmp_path / "ml"))
    for name in ("a.csv.gz", "b.csv.gz"):
        write_sequences(log, tmp_path / name)
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.csv.gz").read_bytes()).decode() == (
        "user_id,sequence_item_ids,sequence_ratings,sequence_timestamps\n"
        '2,"7,30","1,3","1,9"\n10,"200,7,30","3,5,4","2,5,5"\n'
    )


def test_what_has_no_place_in_sequences_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('user_id,item_id\n1,"a,b"\n')
    with pytest.raises(DataError, match="item ids must be without commas to be written as sequences, got 'a,b'"):
        write_sequences(load(tmp_path / "log.csv"), tmp_path / "out.csv")
    with pytest.raises(DataError, match="every user must have events"):
        write_sequences(InteractionLog.from_sequences([[1], []], 3), tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv"]


def test_synthetic_is_the_default() -> None:
    log, again = load(), load("synthetic", num_users=2000, seed=0)
    assert_same_events(log, again)
    assert log.item_titles is not None
    assert log.item_titles[17] == "item 17"
    other = load(num_users=50, num_items=300, max_len=60, seed=3)
    assert (other.num_users, other.num_items) == (50, 300)
