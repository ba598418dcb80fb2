"""MovieLens as GroupLens publishes it: ratings, and where they lie beside them, movies and users.

https://grouplens.org/datasets/movielens, F. M. Harper and J. A. Konstan 2015, "The MovieLens Datasets: History and
Context", ACM Transactions on Interactive Intelligent Systems 5 (4).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hstu_ext.data.errors import broken_row
from hstu_ext.data.events import Events, integer_vocabulary
from hstu_ext.data.files import Folder, csv_rows
from hstu_ext.data.interaction_log import InteractionLog
from hstu_ext.data.numeric_table import Column, read_numeric_table

RATINGS = {  # file: separator, names of its columns, whether they are its first line
    "ratings.dat": ("::", ("user", "movie", "rating", "timestamp"), False),
    "ratings.csv": (",", ("userId", "movieId", "rating", "timestamp"), True),
    "u.data": ("\t", ("user", "movie", "rating", "timestamp"), False),
}
NO_GENRES = "(no genres listed)"
YEAR = re.compile(r"\((\d{4})\)")
GENDERS = ("F", "M")
AGES = (1, 18, 25, 35, 45, 50, 56)  # the least age of each group of ml-1m


class Movie(NamedTuple):
    title: str
    genres: Sequence[str]


class User(NamedTuple):
    gender: str
    age: int
    occupation: str


def read_ratings(folder: Folder, name: str) -> Events:
    """The events of ratings.dat, ratings.csv or u.data."""
    separator, names, header = RATINGS[name]
    columns = [Column(names[0]), Column(names[1]), Column(names[2], decimal=True), Column(names[3])]
    file = folder.label(name)
    with folder.open(name) as stream:
        users, items, ratings, times = read_numeric_table(stream, file, separator, columns, header=header)
    user_indices, user_ids = integer_vocabulary(users)
    item_indices, item_ids = integer_vocabulary(items)
    return Events(user_indices, item_indices, user_ids, item_ids, times, ratings)


def with_movies_and_users(log: InteractionLog, folder: Folder) -> InteractionLog:
    """Adds titles, genres, years, and gender, age and occupation, from the files that the folder has.

    Movies without events are passed over. What a movie or user has no line for is unknown: 0, or no genre at all.
    """
    if folder.has("movies.dat"):
        log = _with_movies(log, _movies_dat(folder))
    elif folder.has("movies.csv"):
        log = _with_movies(log, _movies_csv(folder))
    elif folder.has("u.item") and folder.has("u.genre"):
        log = _with_movies(log, _u_item(folder))
    if folder.has("users.dat"):
        return _with_users(log, _users_dat(folder))
    if folder.has("u.user"):
        return _with_users(log, _u_user(folder))
    return log


def _with_movies(log: InteractionLog, movies: Mapping[str, Movie]) -> InteractionLog:
    genres = sorted({genre for movie in movies.values() for genre in movie.genres})
    known = [movies.get(item, Movie("", ())) for item in log.item_ids]
    hot = torch.zeros(len(known), len(genres))
    for index, movie in enumerate(known):
        for genre in movie.genres:
            hot[index, genres.index(genre)] = 1.0
    year_of = [(YEAR.findall(movie.title) or ["unknown"])[-1] for movie in known]
    years = ["unknown", *sorted(set(year_of) - {"unknown"})]
    return replace(
        log,
        item_titles=[movie.title or f"movie {item}" for movie, item in zip(known, log.item_ids)],
        item_features={"genres": hot, "year": torch.tensor([years.index(year) for year in year_of])},
        item_feature_names={"genres": genres, "year": years},
    )


def _with_users(log: InteractionLog, users: Mapping[str, User]) -> InteractionLog:
    jobs = {user.occupation for user in users.values()}
    occupations = sorted(jobs, key=int) if all(job.isdigit() for job in jobs) else sorted(jobs)

    def category(of: Mapping[str, int]) -> Tensor:
        return torch.tensor([of.get(user, 0) for user in log.user_ids])

    ages = {name: sum(user.age >= least for least in AGES) for name, user in users.items()}
    return replace(
        log,
        user_features={
            "gender": category({name: 1 + GENDERS.index(user.gender) for name, user in users.items()}),
            "age": category(ages),
            "occupation": category({name: 1 + occupations.index(user.occupation) for name, user in users.items()}),
        },
        user_feature_sizes={
            "gender": 1 + len(GENDERS),
            "age": 1 + len(AGES),
            "occupation": 1 + len(occupations),
        },
    )


def _lines(folder: Folder, name: str, separator: str, layout: Sequence[str]) -> Iterator[tuple[int, str, list[str]]]:
    """Line number, line and fields. The older files are Latin-1, the newer ones UTF-8; empty lines are passed over."""
    with folder.open(name) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    for number, line in enumerate(text.split("\n"), start=1):
        row = line.rstrip("\r")
        if not row:
            continue
        fields = row.split(separator)
        if len(fields) != len(layout) or not fields[0]:
            raise broken_row(folder.label(name), number, f"{len(layout)} columns {separator.join(layout)}", row)
        yield number, row, fields


def _movies_dat(folder: Folder) -> dict[str, Movie]:
    lines = _lines(folder, "movies.dat", "::", ("movie", "title", "genres"))
    return {movie: Movie(title, _genres(genres)) for _, _, (movie, title, genres) in lines}


def _movies_csv(folder: Folder) -> dict[str, Movie]:
    movies = {}
    file = folder.label("movies.csv")
    with folder.open("movies.csv") as stream:
        rows = csv_rows(stream, file)
        header = next(rows, (1, []))[1]
        if header != ["movieId", "title", "genres"]:
            raise broken_row(file, 1, "the header 'movieId,title,genres'", ",".join(header))
        for line, row in rows:
            if len(row) != 3:
                raise broken_row(file, line, "3 columns movieId,title,genres", ",".join(row))
            movies[row[0]] = Movie(row[1], _genres(row[2]))
    return movies


def _genres(text: str) -> list[str]:
    return [] if text in ("", NO_GENRES) else text.split("|")


def _u_item(folder: Folder) -> dict[str, Movie]:
    names = [fields[0] for _, _, fields in _lines(folder, "u.genre", "|", ("genre", "number"))]
    layout = ("movie", "title", "release date", "video release date", "IMDb URL", *names)
    movies = {}
    for number, row, fields in _lines(folder, "u.item", "|", layout):
        flags = fields[5:]
        if not set(flags) <= {"0", "1"}:
            raise broken_row(folder.label("u.item"), number, "0 or 1 for every genre", row)
        movies[fields[0]] = Movie(fields[1], [name for name, flag in zip(names, flags) if flag == "1"])
    return movies


def _users_dat(folder: Folder) -> dict[str, User]:
    layout = ("user", "gender", "age", "occupation", "zip code")
    lines = _lines(folder, "users.dat", "::", layout)
    return {
        user: _user(folder.label("users.dat"), number, row, gender, age, occupation)
        for number, row, (user, gender, age, occupation, _) in lines
    }


def _u_user(folder: Folder) -> dict[str, User]:
    lines = _lines(folder, "u.user", "|", ("user", "age", "gender", "occupation", "zip code"))
    return {
        user: _user(folder.label("u.user"), number, row, gender, age, occupation)
        for number, row, (user, age, gender, occupation, _) in lines
    }


def _user(file: str, line: int, row: str, gender: str, age: str, occupation: str) -> User:
    if gender not in GENDERS or not (age.isascii() and age.isdigit()) or not occupation:
        raise broken_row(file, line, "a gender F or M, an age and an occupation", row)
    return User(gender, int(age), occupation)
