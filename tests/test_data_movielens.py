"""The real MovieLens data, where HSTU_EXT_DATA says that they lie. None of it is in the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hstu_ext.data import InteractionLog, leave_one_out, load

pytestmark = pytest.mark.skipif("HSTU_EXT_DATA" not in os.environ, reason="HSTU_EXT_DATA is not set")


def load_or_skip(name: str) -> InteractionLog:
    if not Path(os.environ["HSTU_EXT_DATA"], name).exists():
        pytest.skip(f"no {name} in HSTU_EXT_DATA")
    return load(f"$HSTU_EXT_DATA/{name}")


def test_ml1m() -> None:
    log = load_or_skip("ml-1m")
    assert (log.num_users, log.num_items, len(log)) == (6040, 3706, 1_000_209)
    assert (int(log.lengths.min()), log.max_seqlen) == (20, 2314)
    assert log.item_titles is not None
    most_popular = int(log.popularity().argmax())
    assert (log.item_titles[most_popular], int(log.popularity()[most_popular])) == ("American Beauty (1999)", 3428)
    assert log.item_titles[0] == "Toy Story (1995)"
    assert "Misérables, Les (1995)" in log.item_titles  # Latin-1
    genres = log.item_feature_names["genres"]
    assert len(genres) == 18
    first = log.item_features["genres"][0].nonzero().flatten().tolist()
    assert [genres[genre] for genre in first] == ["Animation", "Children's", "Comedy"]
    assert log.user_feature_sizes == {"gender": 3, "age": 8, "occupation": 22}
    assert torch.bincount(log.user_features["gender"]).tolist() == [0, 1709, 4331]
    split = leave_one_out(log)
    assert (split.targets.numel(), split.short_users, len(split.train)) == (6040, 0, 1_000_209 - 6040)


def test_ml100k() -> None:
    log = load_or_skip("ml-100k")
    assert (log.num_users, log.num_items, len(log)) == (943, 1682, 100_000)
    assert log.timestamps is not None
    assert log.ratings is not None
    assert (int(log.timestamps.min()), int(log.timestamps.max())) == (874724710, 893286638)
    users = log.users()
    falls = log.timestamps.diff() < 0
    assert not bool((falls & (users.diff() == 0)).any())
    assert torch.bincount(log.ratings.long()).tolist() == [0, 6110, 11370, 27145, 34174, 21201]
    assert list(log.action_names) == ["1", "2", "3", "4", "5"]
    assert log.item_titles is not None
    assert log.item_titles[int(log.popularity().argmax())] == "Star Wars (1977)"
    assert log.user_feature_sizes == {"gender": 3, "age": 8, "occupation": 22}
    first = {name: int(values[0]) for name, values in log.user_features.items()}
    assert (first["gender"], first["age"]) == (2, 2)  # a man of 24
