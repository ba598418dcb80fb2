"""The named cases of the attention op: what is asked (Case), with which tensors (Problem), how good is good enough."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hstu_ext import RelativeBias, reference

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
TABLES = ("position_table", "time_table")


def ragged(longest: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """Heavy-tailed lengths; the first is the longest."""
    x = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (longest, *(max(1, int(longest * y**3)) for y in x.tolist()[1:]))


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...] = ragged(300, 10)  # keys of each sequence
    lengths_q: tuple[int, ...] | None = None  # query rows, the same unless given
    heads: int = 2
    dim: int = 64
    dim_v: int | None = None
    window: tuple[int, int] = (-1, 0)
    contexts: tuple[int, ...] | None = None
    targets: tuple[int, ...] | None = None
    group: int = 1
    bounds: int = 0  # rows of func, odd; 0: no func
    bounds_per_head: bool = True
    rab: str = ""  # "", "one" (broadcast over heads) or "heads"
    rab_margin: int = 0  # M - max_seqlen_k
    bias: str = ""  # of "position", "time", "heads" (a table per head), joined by +
    times: str = "sorted"  # or unordered, milliseconds, small, equal, extreme
    max_len: int = 90  # of the position table: some distances are clipped
    num_buckets: int = 60
    alpha: float = 0.15
    scaling: int = -1
    offsets: torch.dtype = torch.int32
    layout: str = "plain"  # or fused, packed, padded, transposed
    used_q: tuple[int, ...] | None = None
    used_k: tuple[int, ...] | None = None
    max_margin: int = 0  # max_seqlen beyond the longest sequence
    outside: tuple[int, int] = (0, 0)  # rows before the first and after the last sequence

    @property
    def mask(self) -> str:
        if self.bounds:
            return "interval"
        return "window" if self.contexts is None and self.targets is None else "target"

    def cell(self, direction: str, device: str, dtype: torch.dtype) -> str:
        """Name of the kernel that serves this case; for the CPU, which has no cells, a name in the same style."""
        largest = max(self.dim, self.dim_v or 0)
        bucket = next(size for size in (32, 64, 128, 256) if size >= largest)
        arch = "sm80" if device == "cuda" else "cpu"
        suffix = "_rab" if self.rab else "_relative" if self.bias else ""
        return f"attn_{direction}_{arch}_{DTYPE_NAMES[dtype]}_d{bucket}_{self.mask}{suffix}"

    def problem(self, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
        return Problem(self, device, dtype, seed)

    def shrunk(self, sequences: int = 5) -> Case:
        """The same kind of case, small enough for scalar arithmetic."""
        count = min(len(self.lengths), sequences)

        def cut(values: tuple[int, ...] | None, limit: tuple[int, ...]) -> tuple[int, ...] | None:
            return None if values is None else tuple(min(x, y) for x, y in zip(values, limit))

        lengths = cut(self.lengths, (6,) * count)
        lengths_q = cut(self.lengths_q, (6,) * count)
        used_k = cut(self.used_k, lengths)
        keys = used_k or lengths
        contexts = cut(self.contexts, tuple(n // 3 for n in keys))
        targets = cut(self.targets, tuple(n - (contexts[b] if contexts else 0) for b, n in enumerate(keys)))
        return replace(
            self, lengths=lengths, lengths_q=lengths_q, used_k=used_k, used_q=cut(self.used_q, lengths_q or lengths),
            contexts=contexts, targets=targets, dim=8, dim_v=16 if self.dim_v else None, max_len=4,
        )  # fmt: skip


class Problem:
    """Random tensors of a case. Whatever lies outside the sequences in use is NaN, or wild in index tensors."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, seed: int) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self._generator = torch.Generator().manual_seed(seed)
        lengths_k = case.lengths
        lengths_q = case.lengths_q or lengths_k
        before, after = case.outside
        self.starts_q = list(itertools.accumulate(lengths_q, initial=before))
        self.starts_k = list(itertools.accumulate(lengths_k, initial=before))
        self.max_q = max(lengths_q, default=0) + case.max_margin
        self.max_k = max(lengths_k, default=0) + case.max_margin
        self.scaling = self.max_q if case.scaling == -1 else case.scaling
        total_q, total_k = self.starts_q[-1] + after, self.starts_k[-1] + after

        self.q, self.k, self.v = self._qkv(total_q, total_k)
        self.dout = self._normal(total_q, case.heads, case.dim_v or case.dim)
        rows_q = [(begin, length) for begin, length, _, _ in self.spans()]
        rows_k = [(begin, length) for _, _, begin, length in self.spans()]
        for x, rows in ((self.q, rows_q), (self.dout, rows_q), (self.k, rows_k), (self.v, rows_k)):
            unused = torch.ones(x.shape[0], dtype=torch.bool)
            for begin, length in rows:
                unused[begin : begin + length] = False
            x[unused.to(device)] = torch.nan
        self.rab = self._rab() if case.rab else None
        self.func = self._func(total_q) if case.bounds else None
        self.position_table = self._table(2 * case.max_len - 1) if "position" in case.bias else None
        self.time_table = self._table(case.num_buckets + 1) if "time" in case.bias else None
        self.query_times, self.key_times = self._times(total_q, total_k) if "time" in case.bias else (None, None)

    def spans(self) -> list[tuple[int, int, int, int]]:
        """First query row, query rows, first key, keys of each sequence."""
        case, result = self.case, []
        for b in range(len(case.lengths)):
            len_q = case.used_q[b] if case.used_q else self.starts_q[b + 1] - self.starts_q[b]
            len_k = case.used_k[b] if case.used_k else self.starts_k[b + 1] - self.starts_k[b]
            result.append((self.starts_q[b], len_q, self.starts_k[b], len_k))
        return result

    def inputs(self) -> dict[str, Tensor]:
        """The differentiable ones."""
        named = {"q": self.q, "k": self.k, "v": self.v, "rab": self.rab}
        named |= {"position_table": self.position_table, "time_table": self.time_table}
        return {name: x for name, x in named.items() if x is not None}

    def arguments(self) -> dict[str, Any]:
        """All that attention is called with besides inputs()."""
        case = self.case
        return {
            "cu_seqlens_q": self.index(self.starts_q), "cu_seqlens_k": self.index(self.starts_k),
            "max_seqlen_q": self.max_q, "max_seqlen_k": self.max_k,
            "num_contexts": self.index(case.contexts), "num_targets": self.index(case.targets),
            "target_group_size": case.group, "window_size": (-1, -1) if case.bounds else case.window,
            "alpha": case.alpha, "func": self.func, "scaling_seqlen": case.scaling,
            "seqused_q": self.index(case.used_q), "seqused_k": self.index(case.used_k),
        }  # fmt: skip

    def run(
        self, function: Callable[..., Tensor], backward: bool = True, threads: int = 2, **more: Any
    ) -> dict[str, Tensor]:
        """{"out": result, "q": its gradient, ...}."""
        inputs = {name: x.detach().requires_grad_(backward) for name, x in self.inputs().items()}
        given = self.grouped(inputs)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.set_grad_enabled(backward):
                out = function(**given, **self.arguments(), **more)
            if not backward:
                return {"out": out}
            if not self.case.lengths and function is reference.attention:  # it touched no input
                grads = tuple(torch.zeros_like(x) for x in inputs.values())
            else:
                grads = torch.autograd.grad(out, list(inputs.values()), self.dout)
            return {"out": out.detach(), **dict(zip(inputs, grads))}
        finally:
            torch.set_num_threads(threads_before)

    def grouped(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Inputs as attention takes them: the tables in a RelativeBias."""
        if not self.case.bias:
            return inputs
        tables = {name: inputs[name] for name in TABLES if name in inputs}
        bias = RelativeBias(**tables, query_times=self.query_times, key_times=self.key_times)
        return {name: x for name, x in inputs.items() if name not in TABLES} | {"bias": bias}

    def run_reference(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The reference on the same values in another precision."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name in ("q", "k", "v", "dout", "rab"):
            x = getattr(self, name)
            setattr(other, name, None if x is None else x.to(dtype))
        for name in TABLES:
            x = getattr(self, name)
            setattr(other, name, None if x is None else x.to(torch.promote_types(x.dtype, dtype)))
        return other.run(reference.attention, threads=1)

    def index(self, values: tuple[int, ...] | list[int] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=self.case.offsets, device=self.device)

    def _normal(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=self._generator)
        return values.to(self.device, self.dtype)

    def _qkv(self, total_q: int, total_k: int) -> list[Tensor]:
        heads, dim, dim_v = self.case.heads, self.case.dim, self.case.dim_v or self.case.dim
        wanted = [(total_q, dim), (total_k, dim), (total_k, dim_v)]
        layout = self.case.layout
        if layout == "plain":
            return [self._normal(rows, heads, d) for rows, d in wanted]
        if layout == "padded":
            return [self._normal(rows, heads + 1, d + 8)[:, 1:, 8:] for rows, d in wanted]
        if layout == "transposed":
            return [self._normal(heads, rows, d).transpose(0, 1) for rows, d in wanted]
        if layout == "packed":
            return list(self._normal(total_q, 3, heads, dim).unbind(1))
        if layout == "fused":
            widths = [heads * dim_v, heads * dim_v, heads * dim, heads * dim]
            u_v_q_k = self._normal(total_q, sum(widths)).split(widths, dim=1)
            v, q, k = (x.unflatten(1, (heads, -1)) for x in u_v_q_k[1:])
            return [q, k, v]
        raise ValueError(layout)

    def _rab(self) -> Tensor:
        case, size = self.case, self.max_k + self.case.rab_margin
        rab = self._normal(len(case.lengths), case.heads if case.rab == "heads" else 1, size, size)
        for b, (_, _, _, len_k) in enumerate(self.spans()):
            rab[b, :, len_k:] = torch.nan
            rab[b, :, :, len_k:] = torch.nan
        return rab

    def _table(self, entries: int) -> Tensor:
        case = self.case
        values = self._normal(case.heads, entries) if "heads" in case.bias else self._normal(entries)
        return values.to(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def _times(self, total_q: int, total_k: int) -> tuple[Tensor, Tensor]:
        """Of the queries and of the keys: a query's time is that of the next key. Wild outside the sequences."""
        kind, generator = self.case.times, self._generator

        def wild(rows: int) -> Tensor:
            return torch.randint(INT64_MIN, INT64_MAX, (rows,), generator=generator)

        query_times, key_times = wild(total_q), wild(total_k)
        for q0, len_q, k0, len_k in self.spans():
            count = max(len_q, len_k) + 1  # position -1, where there are more queries than keys, up to len_k
            gaps = (
                torch.randn(count, generator=generator).mul(3).add(6).exp().long()
            )  # many of a second, some of a month
            gaps[torch.rand(count, generator=generator) < 0.2] = 0
            times = 1_600_000_000 + gaps.cumsum(0)
            if kind == "unordered":
                times = times[torch.randperm(count, generator=generator)] - 1_600_500_000
            elif kind == "milliseconds":
                times = times * 1000 + torch.randint(0, 1000, (count,), generator=generator).sort().values
            elif kind == "small":
                times = torch.randint(-6, 6, (count,), generator=generator)
            elif kind == "equal":
                times = torch.full((count,), -7)
            elif kind == "extreme":
                ends = torch.tensor([INT64_MIN, INT64_MIN + 1, -1, 0, 1, INT64_MAX - 1, INT64_MAX])
                times = torch.where(
                    torch.rand(count, generator=generator) < 0.5,
                    ends[torch.randint(0, len(ends), (count,), generator=generator)],
                    wild(count) >> torch.randint(0, 63, (count,), generator=generator),
                )
            elif kind != "sorted":
                raise ValueError(kind)
            key_times[k0 : k0 + len_k] = times[:len_k]
            query_times[q0 : q0 + len_q] = times[count - len_q :] if len_q <= len_k else times[:len_q]
        return query_times.to(self.device), key_times.to(self.device)

    def _func(self, total_q: int) -> Tensor:
        """Bounds in and around [0, len_k]; some intervals overlap, some are empty or end before they begin."""
        case, extra = self.case, 3
        shape = (case.heads if case.bounds_per_head else 1, case.bounds, total_q + extra)
        func = torch.where(torch.rand(shape, generator=self._generator) < 0.5, INT32_MAX, -INT32_MAX).int()
        for q0, len_q, _, len_k in self.spans():
            bounds = torch.randint(-1, len_k + 3, (*shape[:2], len_q), generator=self._generator)
            tidy = torch.rand(len_q, generator=self._generator) < 0.7
            func[:, :, q0 : q0 + len_q] = torch.where(tidy, bounds.sort(1).values, bounds).int()
        return func.to(self.device)


def assert_accurate(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    eager: dict[str, Tensor],
    dtype: torch.dtype,
    factors: dict[str, float] | None = None,
) -> None:
    """Compares results with the fp64 reference, in half precision also with the error of eager PyTorch.

    Relative Frobenius norm of the whole tensor: half precision at most `factor` times eager's error or the unit
    roundoff, whichever is larger (a correctly rounded result always passes). Then row by row, with more room, so that
    a wrong row among many is found. Elements that are exactly 0 in every row of the reference (unused rows) must be 0.
    """
    unit = torch.finfo(dtype).eps / 2
    for name, reference_value in expected.items():
        value = actual[name]
        assert value.shape == reference_value.shape, name
        assert value.dtype == (torch.promote_types(dtype, torch.float32) if name in TABLES else dtype), name
        value, eager_value = value.double(), eager[name].double()
        if name in TABLES:  # entry by entry
            value, eager_value, reference_value = (x[..., None] for x in (value, eager_value, reference_value))
        assert value.isfinite().all(), f"{name}: {(~value.isfinite()).sum()} of {value.numel()} elements are not finite"
        row_scale = reference_value.norm(dim=-1, keepdim=True)
        assert (value[(row_scale == 0).expand_as(value)] == 0).all(), f"{name}: a row that keeps nothing is not 0"

        norm = reference_value.norm().item()
        error = (value - reference_value).norm().item()
        eager_error = (eager_value - reference_value).norm().item()
        half = dtype in (torch.bfloat16, torch.float16)
        factor = (factors or {}).get(name, 2 if name == "out" else 3)
        full = 2048 if name in TABLES else 64  # thousands of terms that largely cancel make up an entry of a table
        allowed = max(factor * eager_error, unit * norm) if half else full * unit * norm
        assert error <= allowed, (
            f"{name}: relative error {error / norm:.3g}, eager PyTorch's {eager_error / norm:.3g}, "
            f"allowed {allowed / norm:.3g}"
        )

        rows_error = (value - reference_value).norm(dim=-1, keepdim=True)
        rows_eager = (eager_value - reference_value).norm(dim=-1, keepdim=True)
        typical = norm / max(1, int((row_scale > 0).sum())) ** 0.5
        rows_allowed = 5 * rows_eager + unit * ((32 if half else 512) * row_scale + (4 if half else 64) * typical)
        worst = (rows_error - rows_allowed).flatten().argmax() if rows_error.numel() else None
        if worst is not None:
            where = torch.unravel_index(worst, rows_error.shape)
            assert (rows_error <= rows_allowed).all(), (
                f"{name}: row {[int(x) for x in where[:-1]]} is wrong: error {rows_error.flatten()[worst]:.3g}, "
                f"allowed {rows_allowed.flatten()[worst]:.3g}, norm {row_scale.flatten()[worst]:.3g}"
            )


SHORT = (100, 37, 64, 65, 1, 128, 130)
USED = (80, 0, 64, 1, 1, 127, 130)
CONTEXTS = (3, 0, 10, 1, 0, 128, 64)
TARGETS = (20, 37, 0, 5, 1, 0, 66)
MANY = ragged(200, 24, seed=3)

NAMED = [
    Case("causal"),
    Case("full", window=(-1, -1)),
    Case("regular", (128,) * 4),
    Case("all_equal_odd", (77,) * 5),
    Case("heavy_tailed", MANY, dim=32),
    Case("empty_sequences", (0, 50, 0, 0, 129, 0)),
    Case("only_empty_sequences", (0, 0, 0)),
    Case("empty_batch", ()),
    Case("one_token", (1,)),
    Case("one_token_each", (1,) * 9, window=(-1, -1)),
    Case("one_head", heads=1),
    Case("five_heads", SHORT, heads=5),
    Case("dim_8", SHORT, dim=8),
    Case("dim_24", SHORT, dim=24),
    Case("dim_40", SHORT, dim=40),
    Case("dim_72", SHORT, dim=72),
    Case("dim_128", SHORT, dim=128),
    Case("dim_200", SHORT, dim=200),
    Case("dim_256", SHORT, dim=256),
    Case("dim_v_smaller", SHORT, dim=64, dim_v=24),
    Case("dim_v_larger", SHORT, dim=32, dim_v=128),
    Case("dim_v_other_bucket", SHORT, dim=16, dim_v=256),
    Case("layout_fused", layout="fused"),
    Case("layout_fused_dim_v", layout="fused", dim=32, dim_v=64),
    Case("layout_packed", layout="packed"),
    Case("layout_padded", layout="padded"),
    Case("layout_transposed", layout="transposed"),
    Case("offsets_int64", offsets=torch.int64),
    Case("outside_rows", SHORT, outside=(5, 70)),
    Case("scaling", scaling=1000),
    Case("scaling_one", SHORT, scaling=1),
    Case("max_seqlen_larger", max_margin=333),
    Case("alpha_negative", SHORT, alpha=-0.2),
    Case("alpha_zero", SHORT, alpha=0.0),
    Case("window_0_0", window=(0, 0)),
    Case("window_0_left", window=(0, -1)),
    Case("window_left", window=(20, 0)),
    Case("window_right", window=(-1, 5)),
    Case("window_both", window=(64, 64)),
    Case("window_wide", window=(1000, 1000)),
    Case("window_2^29", SHORT, window=(2**29 - 1, 2**29 - 1)),
    Case("delta_q", (150, 200, 129, 64, 1), (20, 64, 128, 64, 1)),
    Case("delta_q_one_row", (150, 200, 129, 64, 0), (1, 1, 1, 1, 0)),
    Case("delta_q_no_rows", (150, 200, 1), (0, 1, 0)),
    Case("delta_q_no_keys", (0, 100, 0), (4, 100, 0), window=(-1, -1)),
    Case("delta_q_full", (150, 200, 129), (20, 64, 128), window=(-1, -1)),
    Case("delta_q_window", (150, 200, 129), (20, 64, 128), window=(30, 2)),
    Case("more_queries", (50, 1, 128, 0), (150, 100, 129, 30)),
    Case("more_queries_full", (50, 1, 128), (150, 100, 129), window=(-1, -1)),
    Case("more_queries_window", (50, 1, 128), (150, 100, 129), window=(10, 70)),
    Case("seqused", SHORT, used_q=USED, used_k=USED),
    Case("seqused_k", SHORT, used_k=(100, 37, 64, 65, 1, 128, 129), window=(-1, -1)),
    Case("seqused_q", SHORT, used_q=USED),
    Case("seqused_delta_q", SHORT, used_q=(10, 0, 64, 1, 0, 1, 5), used_k=USED, window=(40, 0)),
    Case("contexts", SHORT, contexts=CONTEXTS),
    Case("targets", SHORT, targets=TARGETS),
    Case("contexts_and_targets", SHORT, contexts=CONTEXTS, targets=TARGETS),
    Case("contexts_only", SHORT, contexts=SHORT, targets=(0,) * 7),
    Case("targets_only", SHORT, contexts=(0,) * 7, targets=SHORT),
    Case("no_contexts_no_targets", SHORT, contexts=(0,) * 7, targets=(0,) * 7),
    Case("target_groups", SHORT, contexts=CONTEXTS, targets=TARGETS, group=4),
    Case("target_group_of_all", SHORT, targets=TARGETS, group=10000),
    Case("target_groups_long", (300, 257, 513), contexts=(7, 130, 0), targets=(150, 60, 513), group=70),
    Case("target_dim_128", SHORT, dim=128, contexts=CONTEXTS, targets=TARGETS, group=3, offsets=torch.int64),
    Case("target_dim_v", SHORT, dim=40, dim_v=72, contexts=CONTEXTS, targets=TARGETS, group=2),
    Case("target_delta_q", (150, 200, 129), (20, 64, 128), contexts=(5, 150, 60), targets=(10, 30, 60), group=2),
    Case("target_more_queries", (50, 20, 128), (150, 100, 129), contexts=(5, 0, 60), targets=(10, 20, 60), group=2),
    Case("target_seqused", SHORT, used_q=USED, used_k=USED,
         contexts=(3, 0, 10, 1, 0, 7, 64), targets=(20, 0, 0, 0, 1, 120, 66)),
    Case("interval_1", SHORT, bounds=1),
    Case("interval_3", SHORT, bounds=3),
    Case("interval_5", SHORT, bounds=5, dim=32),
    Case("interval_7_dim_128", SHORT, bounds=7, dim=128),
    Case("interval_broadcast", bounds=3, bounds_per_head=False),
    Case("interval_delta_q", (150, 200, 129), (20, 64, 128), bounds=3),
    Case("interval_more_queries", (50, 1, 128), (150, 100, 129), bounds=3),
    Case("interval_seqused", SHORT, bounds=3, used_q=USED, used_k=USED, outside=(3, 9)),
    Case("rab", SHORT, rab="heads"),
    Case("rab_one", SHORT, rab="one"),
    Case("rab_full", SHORT, rab="heads", window=(-1, -1)),
    Case("rab_larger", SHORT, rab="heads", rab_margin=13, window=(40, 3)),
    Case("rab_delta_q", (150, 200, 129), (20, 64, 128), rab="one", window=(-1, -1)),
    Case("rab_seqused", SHORT, rab="heads", used_q=USED, used_k=USED),
    Case("rab_empty_sequences", (0, 50, 0, 129), rab="heads"),
    Case("rab_target", SHORT, rab="heads", contexts=CONTEXTS, targets=TARGETS, group=3),
    Case("rab_interval", SHORT, rab="one", bounds=5, dim=32),
    Case("rab_dim_256", (100, 37, 65), rab="heads", dim=256),
    Case("bias", SHORT, bias="position+time"),
    Case("bias_position", SHORT, bias="position"),
    Case("bias_position_heads", SHORT, bias="position+heads", heads=3, max_len=700),
    Case("bias_position_window", (300, 257), bias="position", window=(100, 20), max_len=60),
    Case("bias_position_full", SHORT, bias="position", window=(-1, -1), dim=128),
    Case("bias_position_target", SHORT, bias="position", contexts=CONTEXTS, targets=TARGETS, group=3),
    Case("bias_position_delta_q", (150, 200, 129), (20, 64, 128), bias="position+heads", dim=128),
    Case("bias_position_seqused", SHORT, bias="position", used_q=USED, used_k=USED, outside=(5, 70)),
    Case("bias_position_heavy_tailed", MANY, bias="position", dim=128),
    Case("bias_time", SHORT, bias="time"),
    Case("bias_heads", SHORT, bias="position+time+heads", heads=3),
    Case("bias_full", SHORT, bias="position+time", window=(-1, -1)),
    Case("bias_regular", (128,) * 4, bias="position+time", max_len=200),
    Case("bias_heavy_tailed", MANY, bias="position+time", dim=32),
    Case("bias_window", (300, 257), bias="position+time", window=(100, 20), max_len=400),
    Case("bias_one_token", (1, 1), bias="position+time"),
    Case("bias_empty_sequences", (0, 50, 0, 129), bias="position+time"),
    Case("bias_empty_batch", (), bias="position+time"),
    Case("bias_outside_rows", SHORT, bias="position+time", outside=(5, 70)),
    Case("bias_delta_q", (150, 200, 129), (20, 64, 128), bias="position+time+heads"),
    Case("bias_more_queries", (50, 1, 128, 0), (150, 100, 129, 30), bias="position+time"),
    Case("bias_seqused", SHORT, bias="position+time", used_q=USED, used_k=USED),
    Case("bias_target", SHORT, bias="position+time", contexts=CONTEXTS, targets=TARGETS, group=3),
    Case("bias_interval", SHORT, bias="position+time+heads", bounds=5),
    Case("bias_alpha_zero", SHORT, bias="position+time", alpha=0.0),
    Case("bias_dim_128", SHORT, bias="position+time", dim=128),
    Case("bias_dim_256", (100, 37, 65), bias="position+time+heads", dim=256),
    Case("bias_dim_v", SHORT, bias="position+time", dim=40, dim_v=72),
    Case("bias_tables_of_one", SHORT, bias="position+time", max_len=1, num_buckets=0),
    Case("bias_large_tables", SHORT, bias="position+time", max_len=1000, num_buckets=300),
    Case("bias_unordered", SHORT, bias="position+time", times="unordered"),
    Case("bias_milliseconds", SHORT, bias="position+time", times="milliseconds", num_buckets=128),
    Case("bias_small_times", SHORT, bias="time", times="small"),
    Case("bias_equal_times", SHORT, bias="time+heads", times="equal"),
    Case("bias_extreme_times", SHORT, bias="position+time", times="extreme", num_buckets=147),
]  # fmt: skip
NAMED_BY_NAME = {case.name: case for case in NAMED}


def kernel_grid() -> list[Case]:
    """One case for each kernel of the full set: every head dimension, mask and bias."""
    lengths = (200, 64, 129, 1, 0, 33)
    masks: dict[str, dict[str, Any]] = {
        "window": {"window": (100, 0)},
        "target": {"contexts": (5, 0, 64, 0, 0, 33), "targets": (70, 64, 1, 1, 0, 0), "group": 3},
        "interval": {"bounds": 3},
    }
    return [
        Case(f"grid_{mask}{name}", lengths, heads=3, dim=dim, rab=rab, bias=bias, **more)
        for dim in (32, 64, 128, 256)
        for mask, more in masks.items()
        for name, rab, bias in (("", "", ""), ("_rab_heads", "heads", ""), ("_bias", "", "position+time+heads"))
    ]


def random_case(seed: int, longest: int = 300) -> Case:
    """Anything that is legal, with sequences of at most `longest` keys."""
    choose = random.Random(seed)
    count = choose.randint(0, 6)
    dim, dim_v = (8 * choose.randint(1, choose.choice((4, 8, 16, 32))) for _ in range(2))
    lengths = tuple(choose.choice((0, 1, choose.randint(0, 40), choose.randint(0, longest))) for _ in range(count))
    case = Case(
        f"seed_{seed}", lengths, heads=choose.randint(1, 4), dim=dim, dim_v=choose.choice((None, dim_v)),
        alpha=choose.uniform(-0.3, 0.3), scaling=choose.choice((-1, 1, 77)),
        offsets=choose.choice((torch.int32, torch.int64)), layout=choose.choice(("plain", "padded", "transposed")),
        max_margin=choose.choice((0, 0, 1, 100)), outside=choose.choice(((0, 0), (0, 0), (1, 0), (3, 130))),
    )  # fmt: skip
    used_k = tuple(choose.randint(0, n) for n in lengths) if choose.random() < 0.3 else None
    keys = used_k or lengths
    if choose.random() < 0.3:
        lengths_q = tuple(choose.randint(0, n) for n in keys)
    elif choose.random() < 0.2:
        lengths_q = tuple(choose.randint(0, n + 50) for n in keys)
    else:
        lengths_q = lengths if used_k is None else keys
    case = replace(case, used_k=used_k, lengths_q=lengths_q)
    if choose.random() < 0.3:
        case = replace(case, used_q=tuple(choose.randint(0, n) for n in lengths_q))
    kind = choose.choice(("window", "target", "interval"))
    if kind == "window":
        left, right = (choose.choice((-1, 0, choose.randint(0, 5), choose.randint(0, longest))) for _ in range(2))
        case = replace(case, window=(left, right))
    elif kind == "target":
        contexts = tuple(choose.choice((0, choose.randint(0, n))) for n in keys)
        targets = tuple(choose.choice((0, choose.randint(0, n - c))) for n, c in zip(keys, contexts))
        group = choose.choice((1, 2, choose.randint(1, 90)))
        case = replace(case, contexts=contexts, targets=targets, group=group)
    else:
        case = replace(case, bounds=choose.choice((1, 3, 5, 9)), bounds_per_head=choose.random() < 0.5)
    queries = case.used_q or lengths_q
    if choose.random() < 0.3 and all(q <= k for q, k in zip(queries, keys)):
        case = replace(case, rab=choose.choice(("one", "heads")), rab_margin=choose.choice((0, 0, 5)))
    elif choose.random() < 0.4:
        case = replace(
            case,
            bias=choose.choice(("position", "time", "position+time")) + choose.choice(("", "+heads")),
            times=choose.choice(("sorted", "unordered", "milliseconds", "small", "extreme")),
            max_len=choose.choice((1, choose.randint(1, 300))), num_buckets=choose.choice((0, 40, 60, 128, 200)),
        )  # fmt: skip
    return case


def long_cases() -> list[Case]:
    """Lengths over many tiles: for the GPU."""
    lengths, heads = (2049, 1, 700, 1500), 2
    return [
        case
        for dim in (64, 128)
        for case in (
            Case("long_causal", lengths, heads=heads, dim=dim),
            Case("long_full", lengths, heads=heads, dim=dim, window=(-1, -1)),
            Case("long_window", lengths, heads=heads, dim=dim, window=(300, 50)),
            Case("long_delta_q", lengths, (5, 1, 512, 1499), heads=heads, dim=dim),
            Case(
                "long_target", lengths, heads=heads, dim=dim,
                contexts=(9, 0, 300, 7), targets=(1000, 1, 10, 300), group=5,
            ),
            Case("long_interval", lengths, heads=heads, dim=dim, bounds=5),
            Case("long_rab", (600, 1, 513), heads=heads, dim=dim, rab="one"),
            Case("long_bias", lengths, heads=heads, dim=dim, bias="position+time", max_len=1800),
            Case("long_bias_unordered", lengths, heads=heads, dim=dim, bias="position+time+heads", times="unordered"),
            Case("long_bias_milliseconds", lengths, heads=heads, dim=dim, bias="time", times="milliseconds"),
        )
    ]  # fmt: skip
