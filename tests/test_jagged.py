"""The jagged ops against plain PyTorch indexing: every result and gradient is a copy, so all comparisons are exact."""

from __future__ import annotations

import gc
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cpp_program
from hstu_ext import (
    dense_to_jagged,
    jagged_concat,
    jagged_deinterleave,
    jagged_interleave,
    jagged_split,
    jagged_to_dense,
    lengths_to_offsets,
    offsets_to_lengths,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool]
ROW_SHAPES = [(), (1,), (3,), (8,), (64,), (50,), (2, 5), (0,)]
JOINS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "concat": (jagged_concat, jagged_split),
    "interleave": (jagged_interleave, jagged_deinterleave),
}


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Different in every element as far as the dtype allows."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if not dtype.is_floating_point:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=dtype)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def index(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def offsets_of(lengths: Sequence[int], start: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    ends = [start]
    for length in lengths:
        ends.append(ends[-1] + length)
    return index(*ends, dtype=dtype)


class Batch(NamedTuple):
    """Parts of a batch. slack: rows before and after the sequences that belong to none."""

    lengths: Sequence[Sequence[int]]  # of every part, one a sequence
    slack: tuple[int, int] = (0, 0)

    def offsets(self, dtype: torch.dtype = torch.int64) -> list[Tensor]:
        return [offsets_of(part, self.slack[0], dtype) for part in self.lengths]

    def values(self, row: Sequence[int] = (3,), dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [numbers(sum(part) + sum(self.slack), *row, dtype=dtype) for part in self.lengths]


BATCHES = {
    "two": Batch([[3, 0, 2, 1], [1, 2, 0, 4]]),
    "one_part": Batch([[2, 3]]),
    "three": Batch([[1, 4, 0], [0, 0, 0], [5, 1, 2]]),
    "no_sequences": Batch([[], []]),
    "all_empty": Batch([[0, 0], [0, 0]]),
    "one_token": Batch([[1], [0]]),
    "slack": Batch([[3, 0, 2], [1, 2, 2]], slack=(2, 3)),
    "no_sequences_slack": Batch([[], []], slack=(0, 4)),
    "256_parts": Batch([[(7 * i + b) % 4 for b in range(5)] for i in range(256)]),
    "long": Batch([[9000, 1, 0, 40], [20, 3000, 5, 8000], [0, 700, 100, 9000]]),
    "many": Batch([[(i * i) % 7 for i in range(4000)], [(3 * i) % 5 for i in range(4000)]]),
}


# Oracle: the rows of the result as indices into all rows of the parts, in plain Python.


def joined_rows(offsets: Sequence[Tensor], sizes: Sequence[int], total: int, interleave: bool) -> list[int]:
    """For every joined row the row of torch.cat(parts) that it is, or sum(sizes) where it belongs to no sequence."""
    ends = [x.tolist() for x in offsets]
    starts = [sum(sizes[:p]) for p in range(len(sizes))]
    found = [sum(sizes)] * total
    for b in range(len(ends[0]) - 1):
        own = [range(start + end[b], start + end[b + 1]) for start, end in zip(starts, ends)]
        if interleave:
            rows = [row for group in zip_longest(*own) for row in group if row is not None]
        else:
            rows = [row for part in own for row in part]
        begin = sum(end[b] for end in ends)
        found[begin : begin + len(rows)] = rows
    return found


def join_oracle(values: Sequence[Tensor], offsets: Sequence[Tensor], total: int, interleave: bool) -> Tensor:
    rows = joined_rows(offsets, [len(x) for x in values], total, interleave)
    return torch.cat([*values, zero_row(values[0])])[rows]


def split_oracle(values: Tensor, offsets: Sequence[Tensor], totals: Sequence[int], interleave: bool) -> list[Tensor]:
    place = {row: i for i, row in enumerate(joined_rows(offsets, totals, len(values), interleave))}
    source = [place.get(row, len(values)) for row in range(sum(totals))]
    return list(torch.cat([values, zero_row(values)])[source].split(list(totals)))


def zero_row(like: Tensor) -> Tensor:
    return torch.zeros((1, *like.shape[1:]), dtype=like.dtype)


def dense_oracle(values: Tensor, offsets: Tensor, max_len: int, padding: float) -> Tensor:
    padded = torch.cat([values, torch.full((1, *values.shape[1:]), padding, dtype=values.dtype)])
    ends = offsets.tolist()
    rows = [[e + t if e + t < end else len(values) for t in range(max_len)] for e, end in zip(ends, ends[1:])]
    return padded[torch.tensor(rows, dtype=torch.int64).reshape(len(ends) - 1, max_len)]


def jagged_oracle(dense: Tensor, offsets: Tensor, total: int) -> Tensor:
    batch, max_len = dense.shape[:2]
    flat = dense.reshape(batch * max_len, *dense.shape[2:])
    source = [batch * max_len] * total
    ends = offsets.tolist()
    for b, (begin, end) in enumerate(zip(ends, ends[1:])):
        for t in range(min(end - begin, max_len)):
            source[begin + t] = b * max_len + t
    return torch.cat([flat, zero_row(flat)])[source]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)


def assert_all_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected):
        assert_equal(x, y)


def assert_same_gradients(
    op: Callable[..., Any], oracle: Callable[..., Any], inputs: Sequence[Tensor], check: bool = True
) -> None:
    """Both are given the inputs and return one tensor or several; gradients are random numbers."""

    def gradients(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        outs = [out] if isinstance(out, Tensor) else list(out)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
        return torch.autograd.grad(outs, leaves, grads)

    assert_all_equal(gradients(op), gradients(oracle))


On = Callable[[Callable[..., Any]], Callable[..., Any]]


def moved(x: Any, device: str) -> Any:
    """Tensors, also those in lists, with their strides and their place in autograd's graph."""
    if isinstance(x, (list, tuple)):
        return type(x)(moved(y, device) for y in x)
    if not isinstance(x, Tensor) or x.device.type == device:
        return x
    if x.is_contiguous() or x.requires_grad:
        return x.to(device)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@pytest.fixture
def on(device: str) -> On:
    """on(op) takes tensors on the CPU and gives results on the CPU, as op gives them on the device."""
    return lambda op: lambda *args: moved(op(*(moved(x, device) for x in args)), "cpu")


@pytest.fixture(params=JOINS)
def join_name(request: pytest.FixtureRequest) -> str:
    return request.param


# Results and gradients


@pytest.mark.parametrize("name", BATCHES)
def test_join(name: str, join_name: str, on: On) -> None:
    batch, interleave = BATCHES[name], join_name == "interleave"
    join = on(JOINS[join_name][0])
    values, offsets = batch.values((64,)), batch.offsets()
    total = sum(len(x) for x in values)
    out, joined_offsets = join(values, offsets)
    assert_equal(out, join_oracle(values, offsets, total, interleave))
    assert_equal(joined_offsets, torch.stack(offsets).sum(0))
    assert_same_gradients(
        lambda *x: join(x, offsets)[0],
        lambda *x: join_oracle(x, offsets, total, interleave),
        values,
    )


@pytest.mark.parametrize("name", BATCHES)
def test_separate(name: str, join_name: str, on: On) -> None:
    batch, interleave = BATCHES[name], join_name == "interleave"
    separate = on(JOINS[join_name][1])
    offsets = batch.offsets()
    totals = [sum(part) + sum(batch.slack) for part in batch.lengths]
    values = numbers(sum(totals), 64)
    expected = split_oracle(values, offsets, totals, interleave)
    assert_all_equal(separate(values, offsets, totals), expected)
    without = separate(values, offsets)
    assert_all_equal(without, [x[: int(end[-1])] for x, end in zip(expected, offsets)])
    assert_same_gradients(
        lambda x: separate(x, offsets, totals),
        lambda x: split_oracle(x, offsets, totals, interleave),
        [values],
    )


@pytest.mark.parametrize("row", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_row(dtype: torch.dtype, row: tuple[int, ...], join_name: str, on: On) -> None:
    join, separate = map(on, JOINS[join_name])
    batch = BATCHES["slack"]
    values, offsets = batch.values(row, dtype), batch.offsets(torch.int32)
    out, joined_offsets = join(values, offsets)
    assert_equal(out, join_oracle(values, offsets, len(out), join_name == "interleave"))
    assert joined_offsets.dtype == torch.int32
    parts = separate(out, offsets, [len(x) for x in values])
    assert_all_equal(parts, split_oracle(out, offsets, [len(x) for x in values], join_name == "interleave"))
    dense = on(jagged_to_dense)(values[0], offsets[0], 4, 1)
    assert_equal(dense, dense_oracle(values[0], offsets[0], 4, 1))
    assert_equal(on(dense_to_jagged)(dense, offsets[0], 12), jagged_oracle(dense, offsets[0], 12))


@pytest.mark.parametrize("max_len", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("lengths", [[3, 0, 2], [], [0], [1], [2, 2]], ids=str)
@pytest.mark.parametrize("slack", [(0, 0), (2, 3)], ids=str)
def test_dense(lengths: list[int], max_len: int, slack: tuple[int, int], on: On) -> None:
    batch = Batch([lengths], slack)
    to_dense, to_jagged = on(jagged_to_dense), on(dense_to_jagged)
    (values,), (offsets,) = batch.values((2, 3)), batch.offsets()
    assert_equal(to_dense(values, offsets, max_len, -2.5), dense_oracle(values, offsets, max_len, -2.5))
    dense = numbers(len(lengths), max_len, 2, 3)
    total = len(values)
    assert_equal(to_jagged(dense, offsets, total), jagged_oracle(dense, offsets, total))
    assert_same_gradients(
        lambda x: to_dense(x, offsets, max_len, 7.0), lambda x: dense_oracle(x, offsets, max_len, 7.0), [values]
    )
    if max_len:
        assert_same_gradients(
            lambda x: to_jagged(x, offsets, total), lambda x: jagged_oracle(x, offsets, total), [dense]
        )


def test_sizes_are_read_where_they_are_not_given(on: On) -> None:
    values, offsets = numbers(9, 2), index(1, 4, 4, 6)
    assert_equal(on(jagged_to_dense)(values, offsets), dense_oracle(values, offsets, 3, 0))
    assert on(jagged_to_dense)(numbers(3, 2), index(0)).shape == (0, 0, 2)
    dense = numbers(3, 3, 2)
    assert_equal(on(dense_to_jagged)(dense, offsets), jagged_oracle(dense, offsets, 6))
    parts = on(jagged_split)(values, [offsets, index(0, 1, 2, 3)])
    assert [len(x) for x in parts] == [6, 3]


@pytest.mark.parametrize("join", [jagged_concat, jagged_interleave])
@pytest.mark.parametrize("total", [9, 10, 15])
def test_total_of_a_join(join: Callable[..., Any], total: int, on: On) -> None:
    """Fewer rows than all parts have, as long as the sequences fit; more are 0."""
    batch = Batch([[3, 0], [2, 2]], slack=(1, 2))
    values, offsets = batch.values(), batch.offsets()
    interleave = join is jagged_interleave
    join = on(join)
    assert_equal(join(values, offsets, total)[0], join_oracle(values, offsets, total, interleave))
    assert_same_gradients(
        lambda *x: join(x, offsets, total)[0], lambda *x: join_oracle(x, offsets, total, interleave), values
    )


def test_older_torch(monkeypatch: pytest.MonkeyPatch, join_name: str, device: str) -> None:
    """Without the function that small results are allocated with."""
    monkeypatch.delattr(torch._C._dynamo.guards, f"_empty_strided_{device}")
    batch, interleave = BATCHES["slack"], join_name == "interleave"
    values, offsets = batch.values(), batch.offsets()
    join, separate = JOINS[join_name]
    out, _ = join(moved(values, device), moved(offsets, device))
    assert_equal(out.cpu(), join_oracle(values, offsets, len(out), interleave))
    parts = separate(out, moved(offsets, device), [len(x) for x in values])
    assert_all_equal(moved(parts, "cpu"), split_oracle(out.cpu(), offsets, [len(x) for x in values], interleave))


@pytest.mark.parametrize("dtype", [*DTYPES[:6], torch.bool], ids=str)
def test_padding_value(dtype: torch.dtype, on: On) -> None:
    """Exactly what torch.full gives, in every element: numbers whose bytes differ, and the limits of the dtype."""
    paddings: list[Any] = [0, 1, True]
    if dtype.is_floating_point:
        paddings += [-0.0, 0.1, -1e4, float("inf"), float("-inf"), torch.finfo(dtype).max, torch.finfo(dtype).tiny]
    elif dtype != torch.bool:
        paddings += [-1, 258, torch.iinfo(dtype).min, torch.iinfo(dtype).max]
    values = numbers(2, 3, dtype=dtype)
    for padding in paddings:
        dense = on(jagged_to_dense)(values, index(0, 2, 2), 3, padding)
        expected = torch.full((2, 3, 3), padding, dtype=dtype)
        expected[0, :2] = values
        assert torch.equal(as_bytes(dense), as_bytes(expected)), padding
    if dtype.is_floating_point:
        assert on(jagged_to_dense)(values, index(0, 2, 2), 3, float("nan"))[1].isnan().all()


def as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def test_nan_and_negative_zero_are_copied_bit_by_bit(on: On) -> None:
    bits = torch.randint(-(2**15), 2**15, (6, 4), dtype=torch.int16)
    values = bits.view(torch.bfloat16)
    out, _ = on(jagged_concat)([values, values], [index(0, 6), index(0, 6)])
    assert torch.equal(out.view(torch.int16), torch.cat([bits, bits]))


def test_strided_views(join_name: str, on: On) -> None:
    """Views of one fused projection: rows are contiguous, at a stride of their own."""
    join, separate = map(on, JOINS[join_name])
    fused = numbers(7, 3, 4)
    offsets = [index(0, 3, 7), index(0, 5, 7)]
    views = [fused[:, 0], fused[:, 2]]
    expected = join_oracle(views, offsets, 14, join_name == "interleave")
    assert_equal(join(views, offsets)[0], expected)
    wide = torch.cat([expected, expected], 1)[:, :4]
    assert not wide.is_contiguous()
    assert_all_equal(separate(wide, offsets, [7, 7]), split_oracle(wide, offsets, [7, 7], join_name == "interleave"))
    assert_equal(on(jagged_to_dense)(views[0], offsets[0], 5), dense_oracle(views[0], offsets[0], 5, 0))
    dense = numbers(4, 2, 6, 4).transpose(0, 1)[:, :, 1]
    assert_equal(on(dense_to_jagged)(dense, offsets[0], 7), jagged_oracle(dense, offsets[0], 7))


def test_expanded_gradient(join_name: str, device: str) -> None:
    """The gradient of a sum is one element seen many times."""
    join, separate = JOINS[join_name]
    values = [x.to(device).requires_grad_() for x in BATCHES["two"].values()]
    offsets = moved(BATCHES["two"].offsets(), device)
    out, _ = join(values, offsets)
    (sum(x.sum() for x in separate(out, offsets)) + out.sum()).backward()
    assert all(x.grad is not None and x.grad.eq(2).all() for x in values)
    dense = jagged_to_dense(values[0], offsets[0], 3)
    total = dense.sum() + dense_to_jagged(dense, offsets[0]).sum()
    (grad,) = torch.autograd.grad(total, values[0])
    assert grad.eq(2).all()


def test_only_what_needs_a_gradient_gets_one(join_name: str, device: str) -> None:
    values, offsets = moved(BATCHES["two"].values(), device), moved(BATCHES["two"].offsets(), device)
    values[1].requires_grad_()
    out, joined_offsets = JOINS[join_name][0](values, offsets)
    assert out.requires_grad
    assert not joined_offsets.requires_grad
    out.sum().backward()
    assert values[0].grad is None
    assert values[1].grad is not None
    parts = JOINS[join_name][1](out, offsets)
    (grad,) = torch.autograd.grad(parts[0].sum(), out)  # parts[1] is not used
    assert_equal(grad, JOINS[join_name][0]([torch.ones_like(parts[0]), torch.zeros_like(parts[1])], offsets)[0])


def test_lists_may_change_after_a_call(join_name: str, device: str) -> None:
    """The gradient is that of the offsets and sizes that were given."""
    join, separate = JOINS[join_name]
    values = [x.to(device).requires_grad_() for x in BATCHES["two"].values()]
    offsets, totals = moved(BATCHES["two"].offsets(), device), [6, 7]
    given_offsets, given_totals = list(offsets), list(totals)
    out, _ = join(values, given_offsets)
    parts = separate(out, given_offsets, given_totals)
    given_offsets.reverse()
    given_totals.clear()
    gradients = [torch.randn_like(x) for x in parts]
    assert_all_equal(torch.autograd.grad(parts, values, gradients), gradients)


def test_gradcheck(join_name: str, on: On) -> None:
    join, separate = map(on, JOINS[join_name])
    batch = BATCHES["slack"]
    offsets = batch.offsets()
    values = [x.requires_grad_() for x in batch.values((2,), torch.float64)]
    totals = [len(x) for x in values]
    joined = numbers(sum(totals), 2, dtype=torch.float64).requires_grad_()
    checks: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda *x: join(x, offsets)[0], tuple(values)),
        (lambda x: tuple(separate(x, offsets, totals)), (joined,)),
        (lambda x: on(jagged_to_dense)(x, offsets[0], 2, 0.5), (values[0],)),
        (lambda x: on(dense_to_jagged)(x, offsets[0], 9), (numbers(3, 2, 2, dtype=torch.float64).requires_grad_(),)),
    ]
    for function, inputs in checks:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_and_blocks(threads: int, join_name: str) -> None:
    """More bytes than a block, in one long sequence and in many short ones, on several threads."""
    join, separate = JOINS[join_name]
    torch.set_num_threads(threads)
    try:
        for name in ("long", "many"):
            values, offsets = BATCHES[name].values((50,)), BATCHES[name].offsets()
            out, _ = join(values, offsets)
            assert out.nbytes > 8 * 256 * 1024 or name == "many"
            assert_equal(out, join_oracle(values, offsets, len(out), join_name == "interleave"))
            assert_all_equal(separate(out, offsets), values)
            dense = jagged_to_dense(values[0], offsets[0], 1500 if name == "long" else 6, 3.0)
            assert_equal(dense, dense_oracle(values[0], offsets[0], dense.shape[1], 3.0))
            jagged = dense_to_jagged(dense, offsets[0])
            assert_equal(jagged, jagged_oracle(dense, offsets[0], len(values[0])))
    finally:
        torch.set_num_threads(1)


def asks_for_huge_pages(x: Tensor) -> bool:
    """Whether the mapping of the middle of x has been advised so."""
    inside, address = False, x.data_ptr() + x.nbytes // 2
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping of {address:x}")


@pytest.mark.plain_allocations
def test_large_results(join_name: str) -> None:
    """The largest blocks, in memory that has asked for huge pages where the system has them."""
    join, separate = JOINS[join_name]
    values = [torch.randint(0, 2**31, (rows, 32), dtype=torch.int64) for rows in (70_000, 90_000)]
    offsets = [index(0, 1000, 70_000), index(0, 80_000, 90_000)]
    out, _ = join(values, offsets)
    assert out.nbytes > 2 * 8 * 2**21
    assert_equal(out, join_oracle(values, offsets, len(out), join_name == "interleave"))
    parts = separate(out, offsets)
    assert_all_equal(parts, values)
    dense = jagged_to_dense(values[1], offsets[1], 80_000, 3)
    assert_equal(dense[0], values[1][:80_000])
    assert_equal(dense[1, :10_000], values[1][80_000:])
    assert dense[1, 10_000:].eq(3).all()
    jagged = dense_to_jagged(dense, offsets[1])
    assert_equal(jagged, values[1])
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        assert [asks_for_huge_pages(x) for x in (out, *parts, dense, jagged)] == [True] * 5


def test_past_2_to_the_31_elements() -> None:
    """Offsets past what an int32 holds. Pages that nobody touches cost nothing."""
    rows = 2**31 + 100
    values = torch.empty(rows, dtype=torch.bool)
    values[rows - 50 : rows - 46] = torch.tensor([True, False, False, True])
    offsets = index(0, rows - 50, rows)
    dense = jagged_to_dense(values, offsets, 4)
    assert dense[1].tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match=re.escape(f"offsets must be torch.int64 for {rows} rows, got torch.int32")):
        jagged_concat([values[:1].expand(rows)], [index(0, 1, dtype=torch.int32)])


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 4])
def test_copies_past_2_to_the_31_elements(width: int, join_name: str) -> None:
    join, separate = JOINS[join_name]
    rows = 2**30 // width + 40
    values = [torch.zeros(rows, width, dtype=torch.bool), torch.ones(rows, width, dtype=torch.bool)]
    values[0][-2], values[1][-3] = True, False
    offsets = [index(0, 5, rows - 7, rows)] * 2
    out, _ = join(values, offsets)
    assert out.numel() > 2**31
    tail = [x[-7:] for x in values]
    assert torch.equal(out[-14:], join(tail, [index(0, 7)] * 2)[0])
    for part, x in zip(separate(out, offsets), values):
        assert torch.equal(part, x)


# Properties

LENGTHS = st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row=st.sampled_from([(), (2,), (16,)]), seed=st.integers(0, 100))
@pytest.mark.parametrize("name", JOINS)
def test_separate_undoes_join(name: str, lengths: list[list[int]], row: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    join, separate = JOINS[name]
    batch = Batch(lengths)
    values, offsets = batch.values(row), batch.offsets()
    out, joined_offsets = join(values, offsets)
    assert_equal(offsets_to_lengths(joined_offsets), torch.tensor(lengths).sum(0))
    assert_all_equal(separate(out, offsets), values)
    again, _ = join(separate(out, offsets, [len(x) for x in values]), offsets)
    assert_equal(again, out)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, order=st.permutations(range(6)))
@pytest.mark.parametrize("name", JOINS)
def test_permuting_the_batch_permutes_the_result(name: str, lengths: list[list[int]], order: list[int]) -> None:
    join, _ = JOINS[name]
    batch = Batch(lengths)
    values, offsets = batch.values(), batch.offsets()
    moved = Batch([[part[b] for b in order] for part in lengths])
    moved_values = [sequences(x, o, order) for x, o in zip(values, offsets)]
    out, joined_offsets = join(values, offsets)
    assert_equal(join(moved_values, moved.offsets())[0], sequences(out, joined_offsets, order))
    dense = jagged_to_dense(values[0], offsets[0], 5)
    assert_equal(jagged_to_dense(moved_values[0], moved.offsets()[0], 5), dense[order])


def sequences(values: Tensor, offsets: Tensor, order: Sequence[int]) -> Tensor:
    return torch.cat([values[int(offsets[b]) : int(offsets[b + 1])] for b in order])


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=8), extra=st.integers(0, 3))
def test_jagged_undoes_dense(lengths: list[int], extra: int) -> None:
    batch = Batch([lengths])
    (values,), (offsets,) = batch.values(), batch.offsets()
    dense = jagged_to_dense(values, offsets, max(lengths, default=0) + extra, 5.0)
    assert_equal(dense_to_jagged(dense, offsets), values)


def test_concat_of_concats_is_concat() -> None:
    values, offsets = BATCHES["three"].values(), BATCHES["three"].offsets()
    once, once_offsets = jagged_concat(values, offsets)
    first = jagged_concat(values[:2], offsets[:2])
    twice, twice_offsets = jagged_concat([first[0], values[2]], [first[1], offsets[2]])
    assert_equal(twice, once)
    assert_equal(twice_offsets, once_offsets)


def test_interleave_of_equal_lengths_is_stack() -> None:
    items, actions = numbers(6, 4), numbers(6, 4)
    offsets = [index(0, 2, 6)] * 2
    assert_equal(jagged_interleave([items, actions], offsets)[0], torch.stack([items, actions], 1).reshape(12, 4))


def test_gpu_row_maps(tmp_path: Path) -> None:
    """What the GPU kernels compute, done on the host."""
    cpp_program.run("test_row_map.cpp", tmp_path)


# Offsets


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[], [0], [3], [3, 0, 2]], ids=str)
def test_offsets_and_lengths(lengths: list[int], dtype: torch.dtype) -> None:
    given_lengths = torch.tensor(lengths, dtype=dtype)
    assert_equal(lengths_to_offsets(given_lengths), offsets_of(lengths))
    offsets = lengths_to_offsets(given_lengths, dtype=dtype)
    assert_equal(offsets, offsets_of(lengths, dtype=dtype))
    assert_equal(offsets_to_lengths(offsets), given_lengths)


def test_offsets_do_not_overflow() -> None:
    lengths = torch.full((3,), 2**30, dtype=torch.int32)
    assert lengths_to_offsets(lengths).tolist() == [0, 2**30, 2**31, 3 * 2**30]


# Errors


class Bad(NamedTuple):
    text: str  # of the error, after "hstu_ext."
    call: Callable[[], object]
    error: type[Exception] = ValueError


A, B, JOINED, DENSE = torch.zeros(5, 2), torch.zeros(3, 2), torch.zeros(8, 2), torch.zeros(2, 4, 2)
OA, OB = index(0, 2, 5), index(0, 3, 3)
HALF = torch.float16


def concat_of(values: Any = (A, B), offsets: Any = (OA, OB), total: Any = None) -> Callable[[], object]:
    return lambda: jagged_concat(values, offsets, total)


def split_of(values: Any = JOINED, offsets: Any = (OA, OB), totals: Any = None) -> Callable[[], object]:
    return lambda: jagged_split(values, offsets, totals)


def to_dense_of(values: Any = A, offsets: Any = OA, max_len: Any = 3, padding: Any = 0) -> Callable[[], object]:
    return lambda: jagged_to_dense(values, offsets, max_len, padding)


def to_jagged_of(dense: Any = DENSE, offsets: Any = OA, total: Any = None) -> Callable[[], object]:
    return lambda: dense_to_jagged(dense, offsets, total)


BAD = {
    # the lists
    "values_tensor": Bad("jagged_concat: values must be a list of tensors, got Tensor", concat_of(A), TypeError),
    "values_0": Bad("jagged_concat: values must be a list of 1 to 256 tensors, got 0", concat_of([], [])),
    "values_257": Bad("jagged_concat: values must be a list of 1 to 256 tensors, got 257", concat_of([A] * 257)),
    "values_none": Bad("jagged_concat: values[1] must be a tensor, got NoneType", concat_of([A, None]), TypeError),
    "offsets_list": Bad(
        "jagged_concat: offsets[0] must be a tensor, got list", concat_of(offsets=[[0], OB]), TypeError
    ),
    "offsets_fewer": Bad("jagged_concat: offsets must be a list of 2 like values, got 1", concat_of(offsets=[OA])),
    "offsets_none": Bad("jagged_concat: offsets must be a list of 2 like values, got 0", concat_of(offsets=[])),
    "split_tensor": Bad("jagged_split: offsets must be a list of tensors, got Tensor", split_of(offsets=OA), TypeError),
    "split_257": Bad("jagged_split: offsets must be a list of 1 to 256 tensors, got 257", split_of(offsets=[OA] * 257)),
    "split_list": Bad("jagged_split: values must be a tensor, got list", split_of([1.0]), TypeError),
    # values
    "value_scalar": Bad("jagged_concat: values[0] must be [rows, ...], got []", concat_of([torch.tensor(1.0), B])),
    "value_dtype": Bad(
        "jagged_concat: values[1] must be torch.float32 like values[0], got torch.float16", concat_of([A, B.half()])
    ),
    "value_rows": Bad(
        "jagged_concat: values[1] must have rows like those of values[0], [5, 2], got [3, 3]",
        concat_of([A, torch.zeros(3, 3)]),
    ),
    "value_rank": Bad(
        "jagged_concat: values[1] must have rows like those of values[0], [5, 2], got [3]",
        concat_of([A, torch.zeros(3)]),
    ),
    "value_stride": Bad(
        "jagged_concat: values[0] must have contiguous rows, got a stride of 5 in dimension 1",
        concat_of([torch.zeros(2, 5).t(), B]),
    ),
    "value_complex": Bad(
        "jagged_concat: values must be of a supported type, got torch.complex64", concat_of([A.cfloat(), B.cfloat()])
    ),
    "split_scalar": Bad("jagged_split: values must be [rows, ...], got []", split_of(torch.tensor(1.0))),
    "split_stride": Bad(
        "jagged_split: values must have contiguous rows, got a stride of 8 in dimension 1",
        split_of(torch.zeros(2, 8).t()),
    ),
    # offsets
    "offsets_float": Bad(
        "jagged_concat: offsets[0] must be torch.int32 or torch.int64, got torch.float32",
        concat_of(offsets=[OA.float(), OB]),
    ),
    "offsets_mixed": Bad(
        "jagged_concat: offsets[1] must be torch.int64 like offsets[0], got torch.int32",
        concat_of(offsets=[OA, OB.int()]),
    ),
    "offsets_rank": Bad("jagged_concat: offsets[0] must be [batch + 1], got [1, 3]", concat_of(offsets=[OA[None], OB])),
    "offsets_empty": Bad("jagged_split: offsets[1] must be [batch + 1], got [0]", split_of(offsets=[OA, index()])),
    "offsets_count": Bad(
        "jagged_concat: offsets[1] must be [3] like offsets[0], got [2]", concat_of(offsets=[OA, index(0, 3)])
    ),
    "offsets_stride": Bad(
        "jagged_concat: offsets[0] must be contiguous, got a stride of 2",
        concat_of(offsets=[index(0, 9, 2, 9, 5, 9)[::2], OB]),
    ),
    "decreasing": Bad(
        "jagged_concat: offsets[1] must start at 0 or more and never decrease, got 3 and 2 for sequence 1",
        concat_of(offsets=[OA, index(0, 3, 2)]),
    ),
    "negative": Bad(
        "jagged_interleave: offsets[0] must start at 0 or more and never decrease, got -1 and 2 for sequence 0",
        lambda: jagged_interleave([A, B], [index(-1, 2, 5), OB]),
    ),
    "negative_without_sequences": Bad(
        "jagged_concat: offsets[0] must be within the 5 rows, got -1 at the end", concat_of([A], [index(-1)])
    ),
    "beyond": Bad(
        "jagged_concat: offsets[1] must be within the 3 rows, got 4 at the end", concat_of(offsets=[OA, index(0, 3, 4)])
    ),
    "huge": Bad(
        "jagged_split: offsets[0] must be within the 8 rows, got 4611686018427387904 at the end",
        split_of(offsets=[index(0, 2, 2**62), OB]),
    ),
    "minimum": Bad(
        "jagged_to_dense: offsets must start at 0 or more",
        to_dense_of(offsets=index(-(2**63), 2**63 - 1, 5), max_len=None),
    ),
    # sizes
    "total_small": Bad(
        "jagged_concat: offsets must add up to at most the 7 rows of total, got 8 in offsets[0] to offsets[1]",
        concat_of(total=7),
    ),
    "total_negative": Bad("jagged_concat: total must be 0 or more, got -1", concat_of(total=-1)),
    "total_float": Bad("jagged_concat: total must be an int, got float", concat_of(total=8.0), TypeError),
    "split_sum": Bad(
        "jagged_split: offsets must add up to at most the 8 rows of values, got 10 in offsets[0] to offsets[1]",
        split_of(offsets=[OA, index(0, 3, 5)]),
    ),
    "totals_count": Bad("jagged_split: totals must be a list of 2 sizes like offsets, got 1", split_of(totals=[5])),
    "totals_int": Bad(
        "jagged_split: totals must be a list of 2 sizes like offsets, got int", split_of(totals=8), TypeError
    ),
    "totals_small": Bad(
        "jagged_split: offsets[1] must be within the 2 rows, got 3 at the end", split_of(totals=[5, 2])
    ),
    "totals_negative": Bad("jagged_split: totals[1] must be 0 or more, got -3", split_of(totals=[5, -3])),
    "totals_text": Bad("jagged_split: totals[0] must be an int, got str", split_of(totals=["5", 3]), TypeError),
    # dense
    "to_dense_none": Bad("jagged_to_dense: values must be a tensor, got NoneType", to_dense_of(None), TypeError),
    "to_dense_scalar": Bad("jagged_to_dense: values must be [rows, ...], got []", to_dense_of(torch.tensor(1.0))),
    "to_dense_stride": Bad(
        "jagged_to_dense: values must have contiguous rows, got a stride of 5 in dimension 1",
        to_dense_of(torch.zeros(2, 5).t()),
    ),
    "to_dense_offsets": Bad("jagged_to_dense: offsets must be [batch + 1], got []", to_dense_of(offsets=index(0)[0])),
    "to_dense_beyond": Bad(
        "jagged_to_dense: offsets must be within the 5 rows, got 6 at the end", to_dense_of(offsets=index(0, 2, 6))
    ),
    "max_len_negative": Bad("jagged_to_dense: max_len must be 0 or more, got -1", to_dense_of(max_len=-1)),
    "max_len_float": Bad("jagged_to_dense: max_len must be an int, got float", to_dense_of(max_len=3.0), TypeError),
    "padding_text": Bad(
        "jagged_to_dense: padding_value must be a number, got str", to_dense_of(padding="0"), TypeError
    ),
    "padding_half": Bad(
        "jagged_to_dense: padding_value must be a number that torch.float16 can hold, got 1000000.0",
        to_dense_of(A.half(), padding=1e6),
    ),
    "padding_huge": Bad(
        "jagged_to_dense: padding_value must be a number that torch.float32 can hold, got 1000",
        to_dense_of(padding=10**400),
    ),
    "padding_int": Bad(
        "jagged_to_dense: padding_value must be a number that torch.int32 can hold, got 4294967296",
        to_dense_of(A.int(), padding=2**32),
    ),
    "padding_float_for_int": Bad(
        "jagged_to_dense: padding_value must be an int for torch.int32, got 0.5", to_dense_of(A.int(), padding=0.5)
    ),
    "to_jagged_list": Bad("dense_to_jagged: dense must be a tensor, got list", to_jagged_of([1.0]), TypeError),
    "to_jagged_rank": Bad(
        "dense_to_jagged: dense must be [2, max_len, ...] for these offsets, got [2]", to_jagged_of(torch.zeros(2))
    ),
    "to_jagged_batch": Bad(
        "dense_to_jagged: dense must be [2, max_len, ...] for these offsets, got [3, 4, 2]",
        to_jagged_of(torch.zeros(3, 4, 2)),
    ),
    "to_jagged_stride": Bad(
        "dense_to_jagged: dense must have contiguous rows, got a stride of 4 in dimension 2",
        to_jagged_of(torch.zeros(2, 2, 4).transpose(1, 2)),
    ),
    "to_jagged_total": Bad(
        "dense_to_jagged: offsets must be within the 4 rows, got 5 at the end", to_jagged_of(total=4)
    ),
    "to_jagged_decreasing": Bad(
        "dense_to_jagged: offsets must start at 0 or more and never decrease, got 5 and 4 for sequence 1",
        to_jagged_of(offsets=index(0, 5, 4)),
    ),
    # offsets helpers
    "lengths_list": Bad(
        "lengths_to_offsets: lengths must be a tensor, got list", lambda: lengths_to_offsets([1]), TypeError
    ),
    "lengths_rank": Bad(
        "lengths_to_offsets: lengths must be [batch], got [1, 3]", lambda: lengths_to_offsets(OA[None])
    ),
    "lengths_float": Bad(
        "lengths_to_offsets: lengths must be torch.int32 or torch.int64, got torch.float32",
        lambda: lengths_to_offsets(OA.float()),
    ),
    "to_lengths_empty": Bad(
        "offsets_to_lengths: offsets must be [batch + 1], got [0]", lambda: offsets_to_lengths(index())
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    text, call, error = BAD[name]
    with pytest.raises(error, match=r"^hstu_ext\." + re.escape(text)):
        call()


def test_good_input() -> None:
    """What the bad calls are changed from is legal."""
    for call in (concat_of(), split_of(), to_dense_of(), to_jagged_of()):
        call()


@pytest.mark.parametrize("name", ["value_rank", "value_stride", "to_dense_stride", "to_jagged_rank", "split_sum"])
def test_errors_are_the_same_when_gradients_are_wanted(name: str) -> None:
    for x in (A, JOINED, DENSE):
        x.requires_grad_()
    try:
        test_bad_input(name)
    finally:
        for x in (A, JOINED, DENSE):
            x.requires_grad_(False)


@pytest.mark.gpu
def test_bad_input_on_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    a, b, joined, dense, oa, ob = (x.to(device) for x in (A, B, JOINED, DENSE, OA, OB))
    bad = {
        f"jagged_concat: values[1] must be on {device} like values[0], got cpu": concat_of([a, B], [oa, ob]),
        f"jagged_concat: offsets[1] must be on {device} like values[0], got cpu": concat_of([a, b], [oa, OB]),
        f"jagged_concat: offsets[0] must be on cpu like values[0], got {device}": concat_of([A, B], [oa, ob]),
        f"jagged_split: offsets[0] must be on {device} like values, got cpu": split_of(joined),
        f"jagged_split: offsets[0] must be on cpu like values, got {device}": split_of(offsets=[oa, ob]),
        f"jagged_split: offsets[1] must be on {device} like offsets[0], got cpu": split_of(joined, [oa, OB]),
        f"jagged_split: offsets[1] must be on cpu like offsets[0], got {device}": split_of(joined, [OA, ob]),
        "jagged_split: offsets[1] must be [batch + 1], got [0]": split_of(joined, [oa, ob[:0]]),
        "jagged_split: offsets[1] must be within the 8 rows, got 9 at the end": split_of(joined, [oa, ob + 6]),
        "jagged_split: totals[0] must be 0 or more, got -1": split_of(joined, [oa, ob], [-1, 3]),
        f"jagged_to_dense: offsets must be on {device} like values, got cpu": to_dense_of(a),
        f"dense_to_jagged: offsets must be on {device} like dense, got cpu": to_jagged_of(dense),
        "dense_to_jagged: offsets must be within": to_jagged_of(dense, oa - 6, None),
    }
    for text, call in bad.items():
        with pytest.raises(ValueError, match=r"^hstu_ext\." + re.escape(text)):
            call()


# On a GPU. That the CPU's results are right is tested above, and most of it on both devices.

GPU_OFFSETS = pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64], ids=str)


def random_batch(parts: int, longest: int, sequences: int = 60) -> Batch:
    generator = torch.Generator().manual_seed(parts + longest)
    drawn = torch.randint(0, longest + 1, (parts, sequences), generator=generator)
    drawn *= torch.rand(parts, sequences, generator=generator) < 0.8
    return Batch(drawn.tolist(), slack=(1, 2))


def results_and_gradients(
    op: Callable[..., Any], inputs: Sequence[Tensor], offsets: Sequence[Tensor], device: str
) -> list[Tensor]:
    """Of op(inputs, offsets), which returns several tensors; gradients are random numbers, the same everywhere."""
    leaves = [x.to(device).requires_grad_() for x in inputs]
    outs = list(op(leaves, moved(list(offsets), device)))
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(x.shape, generator=generator).to(device, x.dtype) for x in outs]
    return [x.detach().cpu() for x in (*outs, *torch.autograd.grad(outs, leaves, grads))]


def assert_same_on_gpu(op: Callable[..., Any], inputs: Sequence[Tensor], offsets: Sequence[Tensor]) -> None:
    results = [results_and_gradients(op, inputs, offsets, device) for device in ("cuda", "cpu")]
    for actual, expected in zip(*results):
        assert actual.shape == expected.shape
        assert torch.equal(as_bytes(actual), as_bytes(expected))


@pytest.mark.gpu
@GPU_OFFSETS
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 17, 256])
@pytest.mark.parametrize("width", [1, 3, 24, 50, 64, 256])
def test_gpu_join_and_separate(width: int, parts: int, offsets_dtype: torch.dtype, join_name: str) -> None:
    join, separate = JOINS[join_name]
    batch = random_batch(parts, 2 + 400 // parts)
    values, offsets = batch.values((width,), torch.bfloat16), batch.offsets(offsets_dtype)
    totals = [len(x) for x in values]
    for total in (sum(totals), sum(totals) + 700):
        assert_same_on_gpu(lambda x, o, total=total: join(x, o, total)[:1], values, offsets)
    joined = numbers(sum(totals), width, dtype=torch.bfloat16)
    assert_same_on_gpu(lambda x, o: separate(x[0], o, totals), [joined], offsets)


@pytest.mark.gpu
@GPU_OFFSETS
@pytest.mark.parametrize("width", [1, 3, 24, 50, 64, 256])
@pytest.mark.parametrize("max_len", [7, 100, 500])
def test_gpu_dense(width: int, max_len: int, offsets_dtype: torch.dtype) -> None:
    batch = random_batch(1, 400)
    values, offsets = batch.values((width,), torch.float16), batch.offsets(offsets_dtype)
    assert_same_on_gpu(lambda x, o: [jagged_to_dense(x[0], o[0], max_len, -1.7)], values, offsets)
    dense = numbers(60, max_len, width, dtype=torch.float16)
    assert_same_on_gpu(lambda x, o: [dense_to_jagged(x[0], o[0], len(values[0]) + 5)], [dense], offsets)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [511, 1500, 9000, 70001])
def test_gpu_rows_longer_than_a_tile(width: int, dtype: torch.dtype, join_name: str) -> None:
    join, separate = JOINS[join_name]
    batch = Batch([[3, 0, 5], [1, 4, 4]], slack=(1, 1))
    values, offsets = batch.values((width,), dtype), batch.offsets()
    assert_same_on_gpu(lambda x, o: join(x, o)[:1], values, offsets)
    assert_same_on_gpu(lambda x, o: separate(x[0], o, [10, 11]), [numbers(21, width, dtype=dtype)], offsets)
    assert_same_on_gpu(lambda x, o: [jagged_to_dense(x[0], o[0], 4, 3.0)], values[:1], offsets)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
def test_gpu_ids_and_flags(shape: tuple[int, ...], join_name: str) -> None:
    """Many rows of a few bytes, and many sequences without any."""
    join, separate = JOINS[join_name]
    batch = Batch([[(7 * i) % 90 if i % 50 == 0 else 0 for i in range(20000)], [i % 4 for i in range(20000)]])
    offsets = batch.offsets()
    for dtype in (torch.int64, torch.bool):
        values = batch.values(shape, dtype)
        out, joined_offsets = join(moved(values, "cuda"), moved(offsets, "cuda"))
        expected = join(values, offsets)
        assert_all_equal([out.cpu(), joined_offsets.cpu()], expected)
        assert_all_equal(moved(separate(out, moved(offsets, "cuda")), "cpu"), values)


class Framed(NamedTuple):
    """Rows of int16 amid others, all of -1. A gap follows each row, and the first is `start` elements further on."""

    whole: Tensor
    rows: Tensor

    def given(self) -> Tensor:
        """The rows in a dtype that the ops take."""
        return self.rows.view(torch.bfloat16)

    def assert_frame_is_intact(self) -> None:
        frame = self.whole.clone()
        frame.as_strided(self.rows.shape, self.rows.stride(), self.rows.storage_offset()).fill_(-1)
        assert frame.eq(-1).all()


def framed(rows: int, width: int, gap: int, start: int, values: Tensor | None = None) -> Framed:
    pitch = width + gap
    whole = torch.full(((rows + 40) * pitch,), -1, dtype=torch.int16, device="cuda")
    found = Framed(whole, whole.as_strided((rows, width), (pitch, 1), 20 * pitch + start))
    if values is not None:
        found.rows.copy_(values)
    return found


def number_of(bits: int) -> float:
    """The bfloat16 of these bits."""
    return torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).item()


def positive(*shape: int) -> Tensor:
    return torch.randint(1, 2**15, shape, dtype=torch.int16)


def garbage(offsets: Tensor, seed: int) -> Tensor:
    """Every third one is negative, too large or both in turn."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(offsets.dtype)
    wild = torch.tensor([-1, -40, 10, 70, 10**6, limits.min, limits.min + 1, limits.max, limits.max - 1])
    drawn = wild[torch.randint(0, len(wild), offsets.shape, generator=generator)].to(offsets.dtype)
    return torch.where(torch.rand(offsets.shape, generator=generator) < 0.35, drawn, offsets)


@contextmanager
def allocating(*results: Tensor) -> Iterator[None]:
    """The op writes these, in the order in which it allocates its results, instead of buffers of its own."""
    waiting = list(results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda self, *size: taken(waiting.pop(0), size, self.dtype))
        patch.setattr(
            torch._C._dynamo.guards,
            f"_empty_strided_{results[0].device.type}",
            lambda size, _, dtype: taken(waiting.pop(0), size, dtype),
        )
        yield
    assert not waiting


def taken(result: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    assert (result.shape, result.dtype) == (size, dtype)
    return result


LAYOUTS = pytest.mark.parametrize(
    ("width", "gap", "start"), [(64, 0, 0), (64, 8, 8), (64, 4, 0), (64, 2, 4), (48, 16, 1), (50, 3, 1), (7, 3, 0)]
)


@pytest.mark.gpu
@GPU_OFFSETS
@LAYOUTS
@pytest.mark.parametrize("parts", [1, 2, 4, 5, 40])
def test_gpu_joins_write_and_read_rows_alone(
    width: int, gap: int, start: int, parts: int, offsets_dtype: torch.dtype, join_name: str
) -> None:
    """Strided rows on both sides at every alignment, with offsets that are right and with garbage.

    All rows given are positive, all around them is negative, and so are the results before they are written.
    """
    interleave = join_name == "interleave"
    batch = random_batch(parts, 60)
    right = batch.offsets(offsets_dtype)
    values = [positive(sum(part) + 3, width) for part in batch.lengths]
    totals = [len(x) for x in values]
    total = sum(totals) + 9
    joined = positive(total, width)
    join, separate = JOINS[join_name]
    for seed in range(6):
        offsets = [garbage(x, 100 * seed + i) if seed else x for i, x in enumerate(right)]
        on_gpu = moved(offsets, "cuda")
        sums = torch.full((62,), -1, dtype=offsets_dtype, device="cuda")
        inputs, out = [framed(len(x), width, gap, start, x) for x in values], framed(total, width, gap, start)
        with allocating(out.given(), sums[:61]):
            join([x.given() for x in inputs], on_gpu, total)
        whole, separated = framed(total, width, gap, start, joined), [framed(n, width, gap, start) for n in totals]
        with allocating(*(x.given() for x in separated)):
            separate(whole.given(), on_gpu, totals)
        for x in (*inputs, out, whole, *separated):
            x.assert_frame_is_intact()
        assert sums[61] == -1
        for x in (out, *separated):
            assert x.rows.ge(0).all(), "an element was not written, or comes from outside of the rows"
        if seed == 0:
            assert_equal(out.rows.cpu(), join_oracle(values, offsets, total, interleave))
            assert_equal(sums[:61].cpu(), torch.stack(offsets).sum(0, dtype=offsets_dtype))
            expected = split_oracle(joined, offsets, totals, interleave)
            assert_all_equal([x.rows.cpu() for x in separated], expected)


@pytest.mark.gpu
@GPU_OFFSETS
@LAYOUTS
def test_gpu_dense_ops_write_and_read_rows_alone(width: int, gap: int, start: int, offsets_dtype: torch.dtype) -> None:
    batch, max_len = random_batch(1, 60), 41
    (right,) = batch.offsets(offsets_dtype)
    values, dense = positive(sum(batch.lengths[0]) + 3, width), positive(60 * max_len, width)

    def as_dense(x: Framed) -> Tensor:
        return x.given().as_strided((60, max_len, width), (max_len * (width + gap), width + gap, 1))

    for seed in range(6):
        offsets = garbage(right, seed) if seed else right
        inputs = framed(len(values), width, gap, start, values), framed(len(dense), width, gap, start, dense)
        jagged, padded = framed(len(values), width, gap, start), framed(len(dense), width, gap, start)
        with allocating(as_dense(padded)):
            jagged_to_dense(inputs[0].given(), offsets.cuda(), max_len, number_of(77))
        with allocating(jagged.given()):
            dense_to_jagged(as_dense(inputs[1]), offsets.cuda(), len(values))
        for x in (*inputs, padded, jagged):
            x.assert_frame_is_intact()
        assert padded.rows.ge(1).all()
        assert jagged.rows.ge(0).all()
        if seed == 0:
            assert_equal(padded.rows.cpu(), dense_oracle(values, offsets, max_len, 77).flatten(0, 1))
            assert_equal(jagged.rows.cpu(), jagged_oracle(dense.view(60, max_len, width), offsets, len(values)))


def everything_with_gradients(values: Sequence[Tensor], offsets: Sequence[Tensor], total: int) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in values]
    results: list[Tensor] = []
    for join, separate in JOINS.values():
        joined, joined_offsets = join(leaves, offsets, total)
        parts = separate(joined * 2, offsets, [len(x) for x in values])
        dense = jagged_to_dense(joined, joined_offsets, 50, 2.5)
        back = dense_to_jagged(dense * 3, joined_offsets, total)
        gradients = torch.autograd.grad([*parts, back], leaves, [x.detach() + 1 for x in (*parts, back)])
        results += [joined, joined_offsets, *parts, dense, back, *gradients]
    return [x.detach() for x in results]


def gpu_problem(parts: int) -> tuple[list[Tensor], list[Tensor], int]:
    batch = random_batch(parts, 120)
    values = batch.values((24,))
    return moved(values, "cuda"), moved(batch.offsets(), "cuda"), sum(len(x) for x in values)


@pytest.mark.gpu
@pytest.mark.plain_allocations
@pytest.mark.parametrize("parts", [2, 7])
def test_gpu_graph(parts: int) -> None:
    """Captured, and replayed with other rows and other offsets in the same buffers."""
    values, offsets, total = gpu_problem(parts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything_with_gradients(values, offsets, total)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything_with_gradients(values, offsets, total)
    for x in values:
        x.normal_()
    for x in offsets:
        x[1:-1] = (x[:-2] + x[2:]) // 2
    for _ in range(2):
        graph.replay()
        expected = everything_with_gradients(values, offsets, total)
        assert_all_equal(results, expected)


@pytest.mark.gpu
@pytest.mark.plain_allocations
def test_gpu_never_synchronizes() -> None:
    problem = gpu_problem(3)
    everything_with_gradients(*problem)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything_with_gradients(*problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # set_sync_debug_mode sees torch's own calls only; a sleeping stream shows the ops'.
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    started = time.perf_counter()
    everything_with_gradients(*problem)
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    waited = time.perf_counter() - started
    assert queued < waited / 2, f"{queued * 1e3:.1f} ms to queue, {waited * 1e3:.1f} ms to run"


def host_microseconds(function: Callable[[], Any]) -> float:
    """Host time of a call that waits for nothing: the least of several rounds, without collections of garbage."""
    rounds = []
    gc.collect()
    gc.disable()
    for _ in range(15):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(200):
            function()
        rounds.append((time.perf_counter() - started) / 200 * 1e6)
    gc.enable()
    torch.cuda.synchronize()
    return statistics.median(sorted(rounds)[:5])


@pytest.mark.gpu
@pytest.mark.plain_allocations
def test_gpu_host_overhead() -> None:
    """Beside one of torch's own calls, because hosts differ by half."""
    values, offsets, total = gpu_problem(2)
    totals = [len(x) for x in values]
    joined, joined_offsets = jagged_concat(values, offsets)
    dense = jagged_to_dense(joined, joined_offsets, 100)
    one = torch.zeros(1, device="cuda")
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "concat": (1.9, lambda: jagged_concat(values, offsets)),
        "split": (1.9, lambda: jagged_split(joined, offsets, totals)),
        "to_dense": (1.5, lambda: jagged_to_dense(joined, joined_offsets, 100)),
        "to_jagged": (1.5, lambda: dense_to_jagged(dense, joined_offsets, total)),
    }
    torch_call = host_microseconds(lambda: one.add_(1))
    found = {name: host_microseconds(call) for name, (_, call) in calls.items()}
    for x in (*values, joined, dense):
        x.requires_grad_()
    recorded = {name: host_microseconds(call) for name, (_, call) in calls.items()}
    print(
        f"x.add_(1) {torch_call:.1f} us; " + ", ".join(f"{x} {found[x]:.1f}, {recorded[x]:.1f} recorded" for x in found)
    )
    for name, (times, _) in calls.items():
        assert found[name] < times * torch_call, name
        assert recorded[name] < 2 * times * torch_call, name


@pytest.mark.gpu
def test_gpu_runs_on_the_current_stream(join_name: str) -> None:
    join, _ = JOINS[join_name]
    values, offsets, _ = gpu_problem(2)
    expected, _ = join(values, offsets)
    late = [torch.zeros_like(x) for x in values]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        for x, y in zip(late, values):
            x.copy_(y)
        out, _ = join(late, offsets)
    torch.cuda.synchronize()
    assert_equal(out, expected)


@pytest.mark.gpu
@pytest.mark.plain_allocations
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(2**31 + 60, 1, torch.bool), (2**25 + 60, 64, torch.bfloat16)],
    ids=["rows", "elements"],
)
def test_gpu_past_2_to_the_31_elements(rows: int, width: int, dtype: torch.dtype, join_name: str) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    join, separate = JOINS[join_name]
    values = [torch.randint(0, 2, (size, width), dtype=torch.uint8, device="cuda").to(dtype) for size in (rows, 50)]
    # The second part has its rows in the last sequence.
    offsets = [x.cuda() for x in (index(0, 5, rows - 30, rows), index(0, 0, 0, 50))]
    out, joined_offsets = join(values, offsets)
    assert out.numel() > 2**31
    assert joined_offsets.tolist() == [0, 5, rows - 30, rows + 50]
    assert torch.equal(out[: rows - 30], values[0][: rows - 30])
    tail = [values[0][-30:].cpu(), values[1].cpu()]
    assert_equal(out[rows - 30 :].cpu(), join(tail, [index(0, 30), index(0, 50)])[0])
    parts = separate(out, offsets, [rows, 50])
    assert_all_equal(parts, values)
    del out, parts
    # Dense: one sequence cut after the first few rows, one at its whole length.
    max_len = rows - 35
    dense = jagged_to_dense(values[0], index(0, 5, rows - 30).cuda(), max_len, 1)
    assert dense.numel() > 2**31
    assert torch.equal(dense[0, :5], values[0][:5])
    assert dense[0, 5:].eq(1).all()
    assert torch.equal(dense[1], values[0][5 : rows - 30])
    back = dense_to_jagged(dense, index(0, 5, rows - 30).cuda(), rows)
    assert torch.equal(back[: rows - 30], values[0][: rows - 30])
    assert back[rows - 30 :].eq(0).all()


# torch.library and torch.compile


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def everything(a: Tensor, b: Tensor, oa: Tensor, ob: Tensor, totals: list[int], max_len: int) -> list[Tensor]:
    joined, offsets = jagged_concat([a * 2, b], [oa, ob])
    parts = jagged_split(joined + 1, [oa, ob], totals)
    mixed, _ = jagged_interleave(parts, [oa, ob], joined.shape[0])
    items, _ = jagged_deinterleave(mixed * 3, [oa, ob], totals)
    dense = jagged_to_dense(items, oa, max_len, 0.5)
    return [joined, offsets, mixed, dense_to_jagged(dense, oa, totals[0]), lengths_to_offsets(offsets_to_lengths(oa))]


def run_everything(function: Callable[..., list[Tensor]], batch: Batch, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    a, b = (x.to(device).requires_grad_() for x in batch.values((4,)))
    oa, ob = moved(batch.offsets(), device)
    results = function(a, b, oa, ob, [len(a), len(b)], max(batch.lengths[0]))
    loss = sum((x * x).sum() for x in results if x.requires_grad)
    return [*(x.detach() for x in results), *torch.autograd.grad(loss, (a, b))]


def assert_compiled_is_eager(compiled: Callable[..., list[Tensor]], names: Sequence[str], device: str = "cpu") -> None:
    for name in names:
        expected = run_everything(everything, BATCHES[name], device)
        for x, y in zip(run_everything(compiled, BATCHES[name], device), expected):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, device: str) -> None:
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_compiled_is_eager(compiled, ["two", "slack"], device)


def test_compile_with_inductor() -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler")
    assert_compiled_is_eager(torch.compile(everything, fullgraph=True), ["two"])


def test_export() -> None:
    offsets = BATCHES["two"].offsets()

    class Model(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return jagged_concat([a, b], offsets)[0]

    values = tuple(BATCHES["two"].values())
    program = torch.export.export(Model(), values)
    assert any("hstu_ext.jagged_join" in str(node.target) for node in program.graph.nodes)
    assert_equal(program.module()(*values), jagged_concat(values, offsets)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func() -> None:
    """vmap goes through torch.library; a gradient is refused in torch's words rather than lost."""
    offsets = BATCHES["two"].offsets()[0]
    many = numbers(4, 6, 3)
    dense = torch.func.vmap(lambda x: jagged_to_dense(x, offsets, 4))(many)
    assert_equal(dense, torch.stack([jagged_to_dense(x, offsets, 4) for x in many]))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: jagged_to_dense(x, offsets, 4).sum())(many[0])


@pytest.mark.plain_allocations  # opcheck compares what the op does with what torch does in its place
def test_opcheck(device: str) -> None:
    ops = torch.ops.hstu_ext
    batch = BATCHES["slack"]
    values, offsets = [x.to(device).requires_grad_() for x in batch.values()], moved(batch.offsets(), device)
    joined, dense = (x.to(device).requires_grad_() for x in (numbers(20, 3), numbers(3, 4, 3)))
    for interleave in (False, True):
        torch.library.opcheck(ops.jagged_join, (values, offsets, 20, interleave))
        torch.library.opcheck(ops.jagged_separate, (joined, offsets, [10, 10], interleave))
    torch.library.opcheck(ops.jagged_to_dense, (values[0], offsets[0], 4, 0.5))
    torch.library.opcheck(ops.dense_to_jagged, (dense, offsets[0], 10))
