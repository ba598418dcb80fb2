"""The log itself and the leave-one-out split, by hand and against plain Python."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu_ext.data import DataError, InteractionLog, leave_one_out, load


def rows_of(log: InteractionLog, values: Tensor | None = None) -> list[list[Any]]:
    values = log.items if values is None else values
    return [row.tolist() for row in values.split(log.lengths.tolist())]


def full_log(device: str = "cpu") -> InteractionLog:
    """Four users, the second of whom is new and the third short; timestamps are 100 + place."""
    log = InteractionLog.from_sequences([[1, 2, 3, 1], [], [4, 5], [6, 7, 9]], 10)
    events = torch.arange(len(log))
    return replace(
        log,
        user_ids=["a", "b", "c", "d"],
        timestamps=100 + events,
        ratings=events / 2,
        actions=events % 3,
        action_names=["x", "y", "z"],
        item_features={"genres": torch.ones(10, 2), "year": torch.arange(10)},
        user_features={"age": torch.tensor([3, 1, 2, 0])},
        user_feature_sizes={"age": 4},
    ).to(device)


def test_select_takes_all_that_belongs_to_the_users(device: str) -> None:
    log = full_log(device)
    chosen = log.select(torch.tensor([3, 1, 0], device=device))
    assert rows_of(chosen) == [[6, 7, 9], [], [1, 2, 3, 1]]
    assert chosen.user_ids == ["d", "b", "a"]
    assert chosen.timestamps is not None
    assert chosen.ratings is not None
    assert chosen.actions is not None
    assert rows_of(chosen, chosen.timestamps) == [[106, 107, 108], [], [100, 101, 102, 103]]
    assert rows_of(chosen, chosen.ratings) == [[3.0, 3.5, 4.0], [], [0.0, 0.5, 1.0, 1.5]]
    assert rows_of(chosen, chosen.actions) == [[0, 1, 2], [], [0, 1, 2, 0]]
    assert chosen.user_features["age"].tolist() == [0, 1, 3]
    assert chosen.num_items == 10
    assert chosen.cu_seqlens.dtype == torch.int32
    assert chosen.cu_seqlens.tolist() == [0, 3, 3, 7]
    assert chosen.users().tolist() == [0, 0, 0, 2, 2, 2, 2]


def test_users_and_items_by_id() -> None:
    log = full_log()
    assert rows_of(log.user("a")) == rows_of(log.user(0)) == [[1, 2, 3, 1]]
    assert log.item_index("7") == 7
    with pytest.raises(DataError, match="user must be one of the 4 ids of the log, got 'e'"):
        log.user("e")
    with pytest.raises(DataError, match=r"user must be in \[0, 4\), got 4"):
        log.user(4)
    with pytest.raises(DataError, match="item must be one of the 10 ids of the log, got '10'"):
        log.item_index("10")


def test_counts(device: str) -> None:
    log = full_log(device)
    assert (len(log), log.num_users, log.num_items, log.num_actions, log.max_seqlen) == (9, 4, 10, 3, 4)
    assert log.popularity().dtype == torch.int64
    assert log.popularity().tolist() == [0, 2, 1, 1, 1, 1, 1, 1, 0, 1]
    empty = InteractionLog.from_sequences([], 3)
    assert (len(empty), empty.num_users, empty.max_seqlen, empty.popularity().tolist()) == (0, 0, 0, [0, 0, 0])


def test_to_moves_every_tensor() -> None:
    log = full_log().to("meta")
    tensors = [log.items, log.offsets, log.timestamps, log.ratings, log.actions]
    tensors += [*log.item_features.values(), *log.user_features.values()]
    assert [tensor.device.type for tensor in tensors if tensor is not None] == ["meta"] * 8


def test_split_for_test_by_hand(device: str) -> None:
    split = leave_one_out(full_log(device))
    assert rows_of(split.train) == [[1, 2, 3], [], [4, 5], [6, 7]]  # the short user trains with all events
    assert rows_of(split.history) == [[1, 2, 3], [6, 7]]
    assert split.history.user_ids == ["a", "d"]
    assert split.history.user_features["age"].tolist() == [3, 0]
    assert split.users.tolist() == [0, 3]
    assert split.targets.tolist() == [1, 9]
    assert split.target_timestamps is not None
    assert split.target_timestamps.tolist() == [103, 108]
    assert split.train.timestamps is not None
    assert rows_of(split.train, split.train.timestamps) == [[100, 101, 102], [], [104, 105], [106, 107]]
    # 1 is a repeat and known; 9 occurs nowhere in training, and 0 and 8 nowhere at all. The catalogue keeps all.
    assert (split.short_users, split.unseen_targets, split.unseen_items) == (2, 1, 3)
    assert split.train.num_items == split.history.num_items == 10
    assert split.train.popularity().tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert split.summary() == (
        "7 training events, 2 users evaluated, 2 too short and only trained on, "
        "1 targets and 3 items without a training event"
    )


def test_split_for_validation_never_holds_the_last_event(device: str) -> None:
    log = full_log(device)
    split = leave_one_out(log, holdout="validation")
    assert rows_of(split.train) == [[1, 2], [], [4, 5], [6]]
    assert rows_of(split.history) == [[1, 2], [6]]
    assert split.targets.tolist() == [3, 7]
    assert split.target_timestamps is not None
    assert split.target_timestamps.tolist() == [102, 107]
    assert torch.equal(split.users, leave_one_out(log).users)  # the same users as in the test
    last = {"a": 103, "d": 108}
    for part in (split.train, split.history):
        assert part.timestamps is not None
        assert not set(last.values()) & set(part.timestamps.tolist())


def test_history_is_the_training_part_where_all_are_evaluated() -> None:
    split = leave_one_out(load("synthetic", num_users=20))
    assert split.history is split.train
    moved = split.to("meta")
    assert moved.history is moved.train
    assert moved.targets.device.type == "meta"


def test_min_length_and_its_limits() -> None:
    log = full_log()
    assert leave_one_out(log, min_length=2).users.tolist() == [0, 2, 3]
    assert leave_one_out(log, min_length=4).users.tolist() == [0]
    nobody = leave_one_out(log, min_length=5)
    assert rows_of(nobody.train) == rows_of(log)
    assert (nobody.history.num_users, nobody.targets.numel(), nobody.short_users) == (0, 0, 4)
    with pytest.raises(DataError, match="min_length must be at least 2 for test, got 1"):
        leave_one_out(log, min_length=1)
    with pytest.raises(DataError, match="min_length must be at least 3 for validation, got 2"):
        leave_one_out(log, holdout="validation", min_length=2)
    with pytest.raises(DataError, match="holdout must be 'test' or 'validation', got 'dev'"):
        leave_one_out(log, holdout="dev")  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(0, 8), max_size=7), max_size=8), st.integers(3, 5), st.booleans())
@settings(deadline=None)
def test_split_against_plain_python(sequences: list[list[int]], min_length: int, validation: bool) -> None:
    log = InteractionLog.from_sequences(sequences, 9)
    split = leave_one_out(log, holdout="validation" if validation else "test", min_length=min_length)
    held = 2 if validation else 1
    train = [row[:-held] if len(row) >= min_length else row for row in sequences]
    users = [user for user, row in enumerate(sequences) if len(row) >= min_length]
    assert rows_of(split.train) == train
    assert rows_of(split.history) == [sequences[user][:-held] for user in users]
    assert split.targets.tolist() == [sequences[user][-held] for user in users]
    assert split.users.tolist() == users
    seen = {item for row in train for item in row}
    assert split.unseen_targets == sum(sequences[user][-held] not in seen for user in users)
    assert split.unseen_items == 9 - len(seen)
    assert split.target_timestamps is None


def test_a_tie_is_split_in_the_order_of_the_file(tmp_path: Any) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,c,5\n1,b,5\n1,a,5\n1,d,1\n")
    log = load(tmp_path / "log.csv")
    split = leave_one_out(log)
    assert [log.item_ids[item] for item in split.history.items.tolist()] == ["d", "c", "b"]
    assert [log.item_ids[item] for item in split.targets.tolist()] == ["a"]
