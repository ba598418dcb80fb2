"""Batches against plain Python: what is in them, in which order, and how a run goes on where it stopped."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_ext.data import Batch, DataError, InteractionLog, SequenceBatches, load


def log_of(lengths: list[int]) -> InteractionLog:
    """User u's event t is item 10 u + t, so that every event says where it is from."""
    log = InteractionLog.from_sequences([[10 * u + t for t in range(n)] for u, n in enumerate(lengths)], 1000)
    return replace(
        log, timestamps=log.items * 2, ratings=log.items / 4, actions=log.items % 5, action_names=list("abcde")
    )


def rows_of(batch: Batch) -> list[list[int]]:
    return [row.tolist() for row in batch.items.split(batch.cu_seqlens.long().diff().tolist())]


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        for field in fields(Batch):
            ours, theirs = getattr(batch, field.name), getattr(other, field.name)
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@given(
    st.lists(st.integers(0, 9), max_size=20),
    st.integers(1, 7),
    st.integers(1, 10),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
)
@settings(deadline=None)
def test_batches_against_plain_python(
    lengths: list[int], batch_size: int, max_len: int, shuffle: bool, drop_last: bool, min_len: int
) -> None:
    log = log_of(lengths)
    batches = SequenceBatches(log, batch_size, max_len, shuffle=shuffle, drop_last=drop_last, min_len=min_len, seed=3)
    users = [user for user, length in enumerate(lengths) if length >= min_len]
    assert batches.num_users == len(users)
    whole, rest = divmod(len(users), batch_size)
    sizes = [batch_size] * whole + ([rest] if rest and not drop_last else [])
    got = list(batches)
    assert len(batches) == len(got) == len(sizes)
    assert [batch.users.numel() for batch in got] == sizes
    order = [user for batch in got for user in batch.users.tolist()]
    if not shuffle:
        assert order == users[: sum(sizes)]
    assert len(order) == len(set(order)) == sum(sizes)
    assert set(order) <= set(users)
    for batch in got:
        expected = [[10 * u + t for t in range(lengths[u])][-max_len:] for u in batch.users.tolist()]
        assert rows_of(batch) == expected
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.items.dtype == batch.users.dtype == torch.int64
        assert type(batch.max_seqlen) is int
        assert batch.max_seqlen == max(map(len, expected))
        assert batch.timestamps is not None
        assert batch.ratings is not None
        assert batch.actions is not None
        assert torch.equal(batch.timestamps, batch.items * 2)
        assert torch.equal(batch.ratings, batch.items / 4)
        assert torch.equal(batch.actions, batch.items % 5)


def test_what_the_log_does_not_have_is_none() -> None:
    (batch,) = SequenceBatches(InteractionLog.from_sequences([[1, 2], [3]], 5), 4, 9)
    assert batch.timestamps is None
    assert batch.ratings is None
    assert batch.actions is None


def test_users_without_events_are_left_out_by_default() -> None:
    (batch,) = SequenceBatches(log_of([0, 2, 0, 1]), 8, 9)
    assert batch.users.tolist() == [1, 3]
    (training,) = SequenceBatches(log_of([0, 2, 0, 1]), 8, 9, min_len=2)
    assert training.users.tolist() == [1]
    assert list(SequenceBatches(log_of([0, 0]), 8, 9)) == []


def test_order_depends_on_seed_and_epoch_alone() -> None:
    log = log_of([3] * 40)

    def order(seed: int, epoch: int) -> list[int]:
        batches = SequenceBatches(log, 16, 2, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        return [user for batch in batches for user in batch.users.tolist()]

    assert order(1, 5) == order(1, 5)
    orders = [order(seed, epoch) for seed in (0, 1, 2**40, 2**40 + 1) for epoch in (0, 1)]
    assert len({tuple(users) for users in orders}) == len(orders)
    for users in orders:
        assert sorted(users) == list(range(40))

    batches = SequenceBatches(log, 16, 2, shuffle=True, seed=1)
    passes = [[user for batch in batches for user in batch.users.tolist()] for _ in range(3)]
    assert passes == [order(1, epoch) for epoch in range(3)]  # a pass counts the epoch up
    assert batches.epoch == 3


def test_a_run_goes_on_bit_for_bit_from_any_place() -> None:
    log = log_of([index % 9 for index in range(50)])

    def fresh() -> SequenceBatches:
        return SequenceBatches(log, 8, 5, shuffle=True, seed=7)

    whole = fresh()
    states = [whole.state_dict()]
    run = []
    for _ in range(3):
        for batch in whole:
            run.append(batch)
            states.append(copy.deepcopy(whole.state_dict()))
    total = 3 * len(whole)
    assert len(run) == total
    for done, state in enumerate(states):
        resumed = fresh()
        list(islice(resumed, 2))  # whatever was done before does not matter
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        rest: list[Batch] = []
        while len(rest) < total - done:
            resumed.set_epoch(resumed.epoch)  # as a training loop does at the start of each epoch
            rest.extend(resumed)
        assert_same(rest, run[done:])


def test_a_loop_that_was_left_begins_again() -> None:
    batches = SequenceBatches(log_of([4] * 10), 3, 5, shuffle=True, seed=1)
    first = list(islice(batches, 2))
    assert batches.state_dict()["done"] == 2
    again = list(batches)
    assert len(again) == 4
    assert_same(first, again[:2])
    assert batches.state_dict()["done"] == 0


def test_another_epoch_drops_the_loaded_place() -> None:
    batches = SequenceBatches(log_of([4] * 10), 3, 5)
    list(islice(batches, 2))
    other = SequenceBatches(log_of([4] * 10), 3, 5)
    other.load_state_dict(batches.state_dict())
    other.set_epoch(4)
    assert len(list(other)) == 4


def test_a_state_of_other_batches_is_refused() -> None:
    state = SequenceBatches(log_of([4] * 10), 3, 5, shuffle=True).state_dict()
    for name, other in [
        ("users", SequenceBatches(log_of([4] * 11), 3, 5, shuffle=True)),
        ("batch_size", SequenceBatches(log_of([4] * 10), 4, 5, shuffle=True)),
        ("max_len", SequenceBatches(log_of([4] * 10), 3, 6, shuffle=True)),
        ("shuffle", SequenceBatches(log_of([4] * 10), 3, 5)),
        ("seed", SequenceBatches(log_of([4] * 10), 3, 5, shuffle=True, seed=1)),
        ("batches", SequenceBatches(log_of([4] * 10), 3, 5, shuffle=True, drop_last=True)),
    ]:
        with pytest.raises(DataError, match=f"the state is one of batches with {name} "):
            other.load_state_dict(state)


def test_arguments_are_checked() -> None:
    log = log_of([3])
    for name, arguments in [("batch_size", (0, 5)), ("max_len", (5, 0))]:
        with pytest.raises(DataError, match=f"{name} must be at least 1, got 0"):
            SequenceBatches(log, *arguments)
    with pytest.raises(DataError, match="seed must be at least 0, got -1"):
        SequenceBatches(log, 1, 5, seed=-1)
    with pytest.raises(DataError, match=r"batch_size \* max_len must be below 2\^31"):
        SequenceBatches(log, 2**16, 2**15)


@pytest.mark.gpu
def test_batches_are_cut_on_the_gpu_without_a_synchronisation() -> None:
    log = load("synthetic", num_users=300)
    expected = list(SequenceBatches(log, 64, 50, shuffle=True, seed=2))
    batches = SequenceBatches(log, 64, 50, shuffle=True, seed=2, device="cuda")
    iterator = iter(batches)
    got = [next(iterator)]  # the order of the epoch is copied to the GPU with the first one
    torch.cuda.set_sync_debug_mode("error")
    try:
        got.extend(iterator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch in got:
        assert batch.items.is_cuda
        assert batch.cu_seqlens.is_cuda
        assert batch.users.is_cuda
    moved = [Batch(batch.items.cpu(), batch.cu_seqlens.cpu(), batch.max_seqlen, batch.users.cpu()) for batch in got]
    assert_same(moved, expected)


def test_a_padded_batch_holds_the_batch() -> None:
    log = log_of([3, 9, 1, 12, 5])
    batches = SequenceBatches(log, 3, 7, shuffle=True, seed=4)
    for chosen, batch in zip(batches.chosen(), SequenceBatches(log, 3, 7, shuffle=True, seed=4)):
        assert (chosen.total, chosen.longest) == (batch.items.numel(), batch.max_seqlen)
        for rows in (chosen.total, chosen.total + 1, 40):
            users = torch.full((4,), -1)
            users[: chosen.users.numel()] = chosen.users
            padded = batches.padded(users, rows)
            assert padded.items.shape == (rows,)
            assert torch.equal(padded.items[: chosen.total], batch.items)
            assert torch.equal(padded.timestamps[: chosen.total], batch.timestamps)
            assert padded.max_seqlen == 7
            assert padded.cu_seqlens.dtype == torch.int32
            absent = 4 - chosen.users.numel()
            assert padded.cu_seqlens.tolist() == batch.cu_seqlens.tolist() + [chosen.total] * absent


def test_random_windows_are_in_a_row_and_reach_every_event() -> None:
    lengths = [3, 9, 1, 14, 7]
    log = log_of(lengths)
    batches = SequenceBatches(log, 2, 7, shuffle=True, seed=4, random_windows=True)
    seen: set[int] = set()
    for epoch in range(40):
        batches.set_epoch(epoch)
        for chosen in batches.chosen():
            rows = rows_of(batches._cut(chosen))
            padded = batches.padded(chosen.users, 20)
            assert padded.items[: chosen.total].tolist() == [item for row in rows for item in row]
            for user, row in zip(chosen.users.tolist(), rows):
                events = list(range(10 * user, 10 * user + lengths[user]))
                assert len(row) == min(7, len(events))
                assert row == events[events.index(row[0]) :][: len(row)]
                seen |= set(row)
    assert seen == set(log.items.tolist())
    starts = []
    for _ in range(2):
        batches.set_epoch(3)
        starts.append([rows_of(batch) for batch in batches])
    assert starts[0] == starts[1]
