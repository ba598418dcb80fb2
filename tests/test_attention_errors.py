"""Bad input to the attention op: one clear error each, and on the GPU never an access out of bounds."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attention_cases import NAMED_BY_NAME, SHORT, Case
from hstu_ext import RelativeBias, hstu_attn_qkvpacked_func, hstu_attn_varlen_func
from test_attention import attention, require_cells

LENGTHS = (5, 3)
TOTAL = sum(LENGTHS)


def good(**changes: Any) -> dict[str, Any]:
    """Arguments of a legal call: 2 sequences, 2 heads, dimension 16."""
    arguments: dict[str, Any] = {
        "q": torch.randn(TOTAL, 2, 16), "k": torch.randn(TOTAL, 2, 16), "v": torch.randn(TOTAL, 2, 16),
        "cu_seqlens_q": index(0, 5, 8), "cu_seqlens_k": index(0, 5, 8), "max_seqlen_q": 5, "max_seqlen_k": 5,
        "window_size": (-1, 0),
    }  # fmt: skip
    return arguments | changes


def index(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def qkv(*shape: int, **options: Any) -> dict[str, Tensor]:
    return {name: torch.randn(*shape, **options) for name in "qkv"}


class Bad(NamedTuple):
    text: str  # of the error, after "hstu_ext.attention: "
    error: type[Exception] | tuple[type[Exception], ...]
    changes: dict[str, Any]  # to the arguments of a good call


def bad_bias(text: str, error: type[Exception] = ValueError, **given: Any) -> Bad:
    """With a good bias by time of which something is changed."""
    times = {"query_times": TIMES, "key_times": TIMES}
    return Bad(text, error, {"bias": RelativeBias(**{"time_table": TIME, **times, **given})})


def bad(text: str, error: type[Exception] | tuple[type[Exception], ...] = ValueError, **changes: Any) -> Bad:
    return Bad(text, error, changes)


HEAD_DIM = "must have a head dimension that is a multiple of 8 from 8 to 256"
INDEX_TYPE = "must be torch.int32 or torch.int64"
TARGET_WINDOW = "window_size must be (-1, 0) where num_contexts or num_targets is given"
TARGETS = "num_contexts + num_targets must be within the sequence's"
FUNC_SHAPE = "func must be [1 or 2, an odd number, >= 8]"
POSITION, TIME = torch.zeros(9), torch.zeros(61)
TIMES = torch.arange(8)
RAB_SHAPE = "rab must be [2, 1 or 2, M, M] with M >= 5"

BAD: dict[str, Bad] = {
    # q, k, v
    "q_none": bad("q must be a tensor, got NoneType", TypeError, q=None),
    "q_list": bad("q must be a tensor, got list", TypeError, q=[[[1.0]]]),
    "q_rank_2": bad("q must be [total, heads, dim], got [3, 4]", q=torch.randn(3, 4)),
    "k_rank_4": bad("k must be [total, heads, dim], got [8, 1, 2, 16]", k=torch.randn(8, 1, 2, 16)),
    "v_rank_1": bad("v must be [total, heads, dim], got [8]", v=torch.randn(8)),
    "q_int": bad("q must be a floating point tensor, got torch.int32", q=torch.zeros(8, 2, 16, dtype=torch.int32)),
    "k_dtype": bad("k must be torch.float32 like q, got torch.float16", k=torch.randn(8, 2, 16).half()),
    "v_dtype": bad("v must be torch.float32 like q, got torch.float64", v=torch.randn(8, 2, 16).double()),
    "k_heads": bad("k must be [8, 2, 16], got [8, 3, 16]", k=torch.randn(8, 3, 16)),
    "k_dim": bad("k must be [8, 2, 16], got [8, 2, 24]", k=torch.randn(8, 2, 24)),
    "v_heads": bad("v must be [8, 2, 16], got [8, 1, 16]", v=torch.randn(8, 1, 16)),
    "v_rows": bad("v must be [8, 2, 16], got [7, 2, 16]", v=torch.randn(7, 2, 16)),
    "dim_12": bad(f"q {HEAD_DIM}, got [8, 2, 12]", **qkv(8, 2, 12)),
    "dim_264": bad(f"q {HEAD_DIM}, got [8, 2, 264]", **qkv(8, 2, 264)),
    "dim_0": bad(f"q {HEAD_DIM}, got [8, 2, 0]", **qkv(8, 2, 0)),
    "dim_v_20": bad(f"v {HEAD_DIM}, got [8, 2, 20]", v=torch.randn(8, 2, 20)),
    "q_last_stride": bad(
        "q must be contiguous in its last dimension, got a stride of 2", q=torch.randn(8, 16, 2).transpose(1, 2)
    ),
    # offsets
    "offsets_none": bad("cu_seqlens_q must be ", (TypeError, ValueError), cu_seqlens_q=None),
    "offsets_float": bad(f"cu_seqlens_q {INDEX_TYPE}, got torch.float32", cu_seqlens_q=torch.tensor([0.0, 5, 8])),
    "offsets_int16": bad(
        "cu_seqlens_k must be ", (TypeError, ValueError), cu_seqlens_k=index(0, 5, 8, dtype=torch.int16)
    ),
    "offsets_rank": bad("cu_seqlens_q must be [batch + 1], got [1, 3]", cu_seqlens_q=index(0, 5, 8)[None]),
    "offsets_empty": bad("cu_seqlens_q must be [batch + 1], got [0]", cu_seqlens_q=index()),
    "offsets_count": bad("cu_seqlens_k must be [3], got [2]", cu_seqlens_k=index(0, 8)),
    "offsets_stride": bad(
        "cu_seqlens_q must be contiguous, got a stride of 2", cu_seqlens_q=index(0, 9, 5, 9, 8, 9)[::2]
    ),
    "offsets_decrease": bad(
        "cu_seqlens_q must start at 0 or more and never decrease, got 5 and 4 for sequence 1",
        cu_seqlens_q=index(0, 5, 4),
    ),
    "offsets_negative": bad(
        "cu_seqlens_k must start at 0 or more and never decrease, got -1 and 3 for sequence 0",
        cu_seqlens_k=index(-1, 3, 8),
    ),
    "offsets_beyond": bad("cu_seqlens_k must end within the 8 rows, got 9 for sequence 1", cu_seqlens_k=index(0, 5, 9)),
    "offsets_huge": bad(
        "cu_seqlens_q must end within the 8 rows, got 4611686018427387904 for sequence 1",
        cu_seqlens_q=index(0, 5, 2**62, dtype=torch.int64),
    ),
    "offsets_minimum": bad(
        "cu_seqlens_q must start at 0 or more", cu_seqlens_q=index(-(2**63), 2**63 - 1, 8, dtype=torch.int64)
    ),
    # lengths
    "max_seqlen_q_small": bad(
        "max_seqlen_q must be at least every sequence's length, got 4 and a length of 5 for sequence 0", max_seqlen_q=4
    ),
    "max_seqlen_k_small": bad(
        "max_seqlen_k must be at least every sequence's length, got 0 and a length of 5 for sequence 0", max_seqlen_k=0
    ),
    "max_seqlen_negative": bad("max_seqlen_q must be 0 to ", max_seqlen_q=-1),
    "max_seqlen_2^29": bad("max_seqlen_k must be 0 to 536870911, got 536870912", max_seqlen_k=2**29),
    "max_seqlen_2^70": bad("max_seqlen_k must be ", (ValueError, TypeError, OverflowError), max_seqlen_k=2**70),
    "max_seqlen_float": bad("max_seqlen_q must be ", TypeError, max_seqlen_q=5.5),
    "max_seqlen_text": bad("max_seqlen_q must be ", TypeError, max_seqlen_q="5"),
    "seqused_count": bad("seqused_q must be [2], got [1]", seqused_q=index(5)),
    "seqused_long": bad(
        "seqused_k must be 0 to the sequence's length, got 4 and a length of 3 for sequence 1", seqused_k=index(5, 4)
    ),
    "seqused_negative": bad(
        "seqused_q must be 0 to the sequence's length, got -1 and a length of 5 for sequence 0", seqused_q=index(-1, 3)
    ),
    "seqused_float": bad(f"seqused_q {INDEX_TYPE}, got torch.float32", seqused_q=torch.ones(2)),
    "scaling_0": bad("scaling_seqlen must be -1 or positive, got 0", scaling_seqlen=0),
    "scaling_-2": bad("scaling_seqlen must be -1 or positive, got -2", scaling_seqlen=-2),
    "alpha_text": bad("alpha must be ", TypeError, alpha="1"),
    # masks
    "window_-2": bad("window_size must be two lengths, or -1 for no limit, got (-2, 0)", window_size=(-2, 0)),
    "window_2^29": bad(
        "window_size must be two lengths, or -1 for no limit, got (0, 536870912)", window_size=(0, 2**29)
    ),
    "contexts_full": bad(f"{TARGET_WINDOW}, got (-1, -1)", num_contexts=index(1, 1), window_size=(-1, -1)),
    "targets_window": bad(f"{TARGET_WINDOW}, got (3, 0)", num_targets=index(1, 1), window_size=(3, 0)),
    "contexts_count": bad("num_contexts must be [2], got [1]", num_contexts=index(1)),
    "targets_rank": bad("num_targets must be [2], got [1, 2]", num_targets=index(1, 1)[None]),
    "targets_float": bad(f"num_targets {INDEX_TYPE}, got torch.float32", num_targets=torch.ones(2)),
    "too_many_contexts": bad(f"{TARGETS} 3 keys, got 4 + 0 for sequence 1", num_contexts=index(5, 4)),
    "too_many_together": bad(
        f"{TARGETS} 5 keys, got 3 + 3 for sequence 0", num_contexts=index(3, 0), num_targets=index(3, 0)
    ),
    "targets_beyond_seqused": bad(
        f"{TARGETS} 2 keys, got 0 + 3 for sequence 0", num_targets=index(3, 0), seqused_k=index(2, 3)
    ),
    "targets_negative": bad(f"{TARGETS} 5 keys, got 0 + -1 for sequence 0", num_targets=index(-1, 0)),
    "contexts_overflow": bad(
        f"{TARGETS} 5 keys",
        num_contexts=index(2**62, 0, dtype=torch.int64),
        num_targets=index(2**62, 0, dtype=torch.int64),
    ),
    "group_0": bad("target_group_size must be 1 to 536870911, got 0", num_targets=index(1, 1), target_group_size=0),
    "group_negative": bad("target_group_size must be 1 to 536870911, got -3", target_group_size=-3),
    # func
    "func_even": bad(f"{FUNC_SHAPE}, got [2, 2, 8]", func=torch.zeros(2, 2, 8).int(), window_size=(-1, -1)),
    "func_none": bad(f"{FUNC_SHAPE}, got [2, 0, 8]", func=torch.zeros(2, 0, 8).int(), window_size=(-1, -1)),
    "func_heads": bad(f"{FUNC_SHAPE}, got [3, 1, 8]", func=torch.zeros(3, 1, 8).int(), window_size=(-1, -1)),
    "func_short": bad(f"{FUNC_SHAPE}, got [1, 1, 7]", func=torch.zeros(1, 1, 7).int(), window_size=(-1, -1)),
    "func_rank": bad(f"{FUNC_SHAPE}, got [1, 8]", func=torch.zeros(1, 8).int(), window_size=(-1, -1)),
    "func_int64": bad(
        "func must be torch.int32, got torch.int64", func=torch.zeros(1, 1, 8).long(), window_size=(-1, -1)
    ),
    "func_stride": bad(
        "func must be contiguous in its last dimension, got a stride of 2",
        func=torch.zeros(1, 1, 16).int()[..., ::2],
        window_size=(-1, -1),
    ),
    "func_window": bad(
        "window_size must be (-1, -1) where func is given, got (-1, 0)", func=torch.zeros(1, 1, 8).int()
    ),
    "func_targets": bad(
        "func must be None where num_contexts or num_targets is given, got both",
        func=torch.zeros(1, 1, 8).int(),
        num_targets=index(1, 1),
        window_size=(-1, -1),
    ),
    # rab
    "drab_without_rab": bad("rab must be given where has_drab is set, got None", has_drab=True),
    "rab_rank": bad(f"{RAB_SHAPE}, got [2, 5, 5]", rab=torch.zeros(2, 5, 5)),
    "rab_batch": bad(f"{RAB_SHAPE}, got [1, 2, 5, 5]", rab=torch.zeros(1, 2, 5, 5)),
    "rab_heads": bad(f"{RAB_SHAPE}, got [2, 3, 5, 5]", rab=torch.zeros(2, 3, 5, 5)),
    "rab_small": bad(f"{RAB_SHAPE}, got [2, 1, 4, 4]", rab=torch.zeros(2, 1, 4, 4)),
    "rab_oblong": bad(f"{RAB_SHAPE}, got [2, 1, 5, 6]", rab=torch.zeros(2, 1, 5, 6)),
    "rab_dtype": bad("rab must be torch.float32 like q, got torch.float16", rab=torch.zeros(2, 1, 5, 5).half()),
    "rab_stride": bad(
        "rab must be contiguous in its last dimension, got a stride of 2", rab=torch.zeros(2, 1, 5, 10)[..., ::2]
    ),
    "rab_more_queries": bad(
        "rab must come with no more queries than keys, got 5 and 4 for sequence 0",
        rab=torch.zeros(2, 1, 5, 5),
        cu_seqlens_k=index(0, 4, 8),
    ),
    # bias
    "bias_tensor": bad("bias must be a hstu_ext.RelativeBias, got Tensor", TypeError, bias=torch.zeros(9)),
    "bias_empty": bad("bias must have a position_table or a time_table, got neither", bias=RelativeBias()),
    "bias_and_rab": bad(
        "rab must be None where bias is given, got both", bias=RelativeBias(POSITION), rab=torch.zeros(2, 1, 5, 5)
    ),
    "position_even": bad_bias(
        "position_table must have 2 * max_len - 1 entries, an odd number, got 10", position_table=torch.zeros(10)
    ),
    "position_empty": bad_bias(
        "position_table must be [entries] or [2, entries], got [0]", position_table=torch.zeros(0)
    ),
    "position_heads": bad_bias(
        "position_table must be [entries] or [2, entries], got [3, 9]", position_table=torch.zeros(3, 9)
    ),
    "position_rank": bad_bias(
        "position_table must be [entries] or [2, entries], got [1, 2, 9]", position_table=torch.zeros(1, 2, 9)
    ),
    "position_half": bad_bias(
        "position_table must be torch.float32 where q is torch.float32, got torch.float16",
        position_table=torch.zeros(9).half(),
    ),
    "position_int": bad_bias(
        "position_table must be torch.float32 where q is torch.float32, got torch.int64",
        position_table=torch.zeros(9).long(),
    ),
    "position_stride": bad_bias(
        "position_table must be contiguous in its last dimension, got a stride of 2",
        position_table=torch.zeros(18)[::2],
    ),
    "position_list": bad_bias("position_table must be ", TypeError, position_table=[0.0]),
    "time_scalar": bad_bias("time_table must be [entries] or [2, entries], got []", time_table=torch.zeros(())),
    "time_heads": bad_bias("time_table must be [entries] or [2, entries], got [1, 61]", time_table=torch.zeros(1, 61)),
    "time_double": bad_bias(
        "time_table must be torch.float32 where q is torch.float32, got torch.float64", time_table=TIME.double()
    ),
    "query_times_missing": bad_bias("query_times must be given with time_table, got None", query_times=None),
    "key_times_missing": bad_bias("key_times must be given with time_table, got None", key_times=None),
    "query_times_int32": bad_bias("query_times must be torch.int64, got torch.int32", query_times=TIMES.int()),
    "key_times_float": bad_bias("key_times must be torch.int64, got torch.float64", key_times=TIMES.double()),
    "query_times_short": bad_bias("query_times must be [8], got [7]", query_times=TIMES[:7]),
    "key_times_rank": bad_bias("key_times must be [8], got [8, 1]", key_times=TIMES[:, None]),
    "key_times_stride": bad_bias("key_times must be contiguous, got a stride of 2", key_times=torch.arange(16)[::2]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    text, error, changes = BAD[name]
    with pytest.raises(error, match=r"^hstu_ext.attention: " + re.escape(text)):
        hstu_attn_varlen_func(**good(**changes))


def test_good_input() -> None:
    """What the bad calls are changed from is legal."""
    assert hstu_attn_varlen_func(**good()).isfinite().all()


def test_positional_order_of_the_signature() -> None:
    """As in NVIDIA's recsys-examples, for existing calls."""
    arguments = good(num_contexts=index(1, 0), num_targets=index(2, 1), target_group_size=2)
    order = list(inspect.signature(hstu_attn_varlen_func).parameters)[:11]
    assert order[:7] == ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert order[7:] == ["num_contexts", "num_targets", "target_group_size", "window_size"]
    positional = [arguments[name] for name in order]
    expected = hstu_attn_varlen_func(**arguments, alpha=0.5)
    assert torch.equal(hstu_attn_varlen_func(*positional, 0.5, None, False), expected)


def test_bad_packed_input() -> None:
    offsets = index(0, 8)
    for shape in ((8, 2, 16), (8, 2, 2, 16), (8, 3, 2, 16, 1)):
        with pytest.raises(ValueError, match=re.escape(f"qkv must be [total, 3, heads, dim], got {list(shape)}")):
            hstu_attn_qkvpacked_func(torch.randn(shape), offsets, 8)
    with pytest.raises(TypeError, match=r"hstu_ext.attention: qkv must be a tensor, got list"):
        hstu_attn_qkvpacked_func([1.0], offsets, 8)  # type: ignore[arg-type]


def test_errors_are_the_same_when_gradients_are_wanted() -> None:
    arguments = good(cu_seqlens_q=index(0, 5, 4))
    arguments["q"].requires_grad_()
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0 or more and never decrease"):
        hstu_attn_varlen_func(**arguments)


def test_an_error_leaves_nothing_behind() -> None:
    """A failed call does not change what the next one gives."""
    arguments = good()
    expected = hstu_attn_varlen_func(**arguments)
    for _, error, changes in BAD.values():
        with pytest.raises(error):
            hstu_attn_varlen_func(**good(**changes))
    assert torch.equal(hstu_attn_varlen_func(**arguments), expected)


# GPU


def on_gpu(arguments: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    def move(x: Any, dtype: torch.dtype = dtype) -> Any:
        if isinstance(x, RelativeBias):
            return RelativeBias(**{name: move(value, torch.float32) for name, value in vars(x).items()})
        if not isinstance(x, Tensor):
            return x
        moved = torch.empty_strided(
            x.shape, x.stride(), dtype=dtype if x.is_floating_point() else x.dtype, device="cuda"
        )
        return moved.copy_(x)

    return {name: move(x) for name, x in arguments.items()}


ON_THE_HOST_ONLY = re.compile("for sequence|contexts \\+ num_targets must be within|must start at 0 or more")


@pytest.mark.gpu
@pytest.mark.parametrize("name", BAD)
def test_bad_input_on_gpu(name: str) -> None:
    """The same errors, except for what index tensors hold and for dtypes."""
    text, error, changes = BAD[name]
    if ON_THE_HOST_ONLY.search(text) or "torch.float" in text or "floating point" in text:
        pytest.skip("not checked on a GPU, or of another dtype there")
    with pytest.raises(error, match=r"^hstu_ext.attention: " + re.escape(text)):
        hstu_attn_varlen_func(**on_gpu(good(**changes)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k", "v", "cu_seqlens_q", "cu_seqlens_k", "num_targets", "seqused_q", "rab"])
def test_device_mix(name: str) -> None:
    extra = {"num_targets": index(1, 1), "seqused_q": index(5, 3), "rab": torch.zeros(2, 1, 5, 5)}
    arguments = on_gpu(good(**({name: extra[name]} if name in extra else {})))
    arguments[name] = arguments[name].cpu()
    text = f"hstu_ext.attention: {name} must be on cuda:{torch.cuda.current_device()} like q, got cpu"
    with pytest.raises(ValueError, match=re.escape(text)):
        hstu_attn_varlen_func(**arguments)
    everything_else = {key: x.cpu() if isinstance(x, Tensor) else x for key, x in arguments.items()}
    everything_else[name] = everything_else[name].cuda()
    if name not in "kv":
        with pytest.raises(ValueError, match=re.escape(f"{name} must be on cpu like q, got cuda:")):
            hstu_attn_varlen_func(**everything_else)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_without_gpu_kernels(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=re.escape(f"q must be torch.float16 or torch.bfloat16 on a GPU, got {dtype}")):
        hstu_attn_varlen_func(**on_gpu(good(), dtype))


INT64_LIMITS = (-(2**63), 2**63 - 1)
GARBAGE: dict[str, tuple[int, ...]] = {
    "negative": (-100, -50, -1, -7, -2000000, -3, -1, -1),
    "decreasing": (494, 400, 300, 200, 100, 50, 10, 0),
    "beyond": (0, 100, 1000, 2000, 100000, 2**31 - 1, 2**31 - 1, 2**31 - 1),
    "jumping": (0, 2**31 - 1, -(2**31), 494, -5, 600, 3, 495),
    "all_of_it": (0, 10**6, 0, 10**6, 0, 10**6, 0, 10**6),
}


def garbage_cases() -> list[Any]:
    kinds: dict[str, Callable[..., Case]] = {
        "window": lambda **kw: Case("garbage", SHORT, window=(40, 0), **kw),
        "target": lambda **kw: Case("garbage", SHORT, contexts=(1,) * 7, targets=(1,) * 7, group=2, **kw),
        "interval": lambda **kw: Case("garbage", SHORT, bounds=3, **kw),
    }
    return [
        pytest.param(kind(**more, offsets=offsets), id="_".join([name, *more]) + f"-{offsets}".replace("torch.", ""))
        for name, kind in kinds.items()
        for more in ({}, {"rab": "heads"}, {"bias": "position+time"})
        for offsets in (torch.int32, torch.int64)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("case", garbage_cases())
def test_garbage_in_index_tensors(case: Case, deterministic: bool) -> None:
    """Whatever index tensors hold, nothing faults and nothing outside the buffers changes (the guards see to that)."""
    require_cells(case, "cuda", torch.bfloat16, "fwd", "bwd")
    good_problem = NAMED_BY_NAME["causal"].problem("cuda", torch.bfloat16)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "both", "num_contexts", "num_targets", "seqused_q", "seqused_k"):
        for values in GARBAGE.values():
            problem = case.problem("cuda", torch.bfloat16)
            if problem.rab is not None:
                problem.rab.nan_to_num_()
            arguments = problem.arguments()
            limits = INT64_LIMITS if case.offsets == torch.int64 else (-(2**31), 2**31 - 1)
            wild = torch.tensor([min(max(x, limits[0]), limits[1]) for x in values], device="cuda").to(case.offsets)
            if case.offsets == torch.int64:
                wild[1], wild[4] = INT64_LIMITS
            if name == "both":
                arguments["cu_seqlens_q"] = arguments["cu_seqlens_k"] = wild
            elif name.startswith("cu"):
                arguments[name] = wild
            elif not (name.startswith("num") and case.mask != "target"):
                arguments[name] = wild[:-1].contiguous()
            inputs = {key: x.detach().requires_grad_() for key, x in problem.inputs().items()}
            given = problem.grouped(inputs)
            copies = {key: x.detach().clone() for key, x in inputs.items()}
            out = attention(**given, **arguments, deterministic=deterministic)
            torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
            torch.cuda.synchronize()
            for key, x in inputs.items():
                assert torch.equal(x.detach(), copies[key]), f"{key} was written to"
    # The GPU still works.
    assert good_problem.run(attention)["out"].isfinite().all()


@pytest.mark.gpu
def test_garbage_in_func() -> None:
    case = Case("garbage", SHORT, bounds=5)
    require_cells(case, "cuda", torch.bfloat16, "fwd", "bwd")
    problem = case.problem("cuda", torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(5):
        problem.func.random_(-(2**31), 2**31 - 1, generator=generator)
        for value in problem.run(attention).values():
            assert value.isfinite().all()
