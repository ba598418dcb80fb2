"""The benchmarks' bookkeeping: the grid, what a row says, comparisons. Times come from a timer that makes them up."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import attention_providers
import bench_attention
import bench_jagged
import bench_similarity
import harness
import train_retrieval
from hstu_ext.data import synthetic_log
from hstu_ext.training import load_config

ROW_KEYS = [
    "op",
    "direction",
    "cell",
    "provider",
    "gpu",
    "driver",
    "cuda",
    "torch",
    "commit",
    "dirty",
    "dtype",
    "head_dim",
    "heads",
    "lengths",
    "rows",
    "mask",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "graph_ms",
    "tflops",
    "efficiency",
    "matmul_tflops",
    "copy_gbps",
    "extra_mib",
    "time",
]


class FakeTimer:
    """Calls once, then claims 1, 2 and 4 ms a call and 0.5 ms in a graph."""

    def context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def rates(self) -> harness.Rates:
        return harness.Rates(matmul_tflops=1.0, copy_gbps=1.0)

    def measure(self, call: Callable[[], object]) -> harness.Times:
        call()
        return harness.Times(1.0, 2.0, 4.0, graph=0.5)

    def host_overhead(self, call: Callable[[], object]) -> harness.Times:
        call()
        return harness.Times(0.01, 0.02, 0.04)

    def extra_mib(self, call: Callable[[], object]) -> float | None:
        return 0.0


def run(providers: list[str], cases: str = "d16:3xjag20", directions: tuple[str, ...] = ("fwd", "bwd")) -> list[dict]:
    batches = bench_attention.run(bench_attention.parse_cases(cases), providers, directions, "fp32", "cpu", FakeTimer())
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize(
    ("name", "rows"),
    [("u128", 32768), ("u200", 25600), ("u16384", 65536), ("jag1024", 60399), ("jag4096", 125854)],
)
def test_grid_has_the_recorded_row_counts(name: str, rows: int) -> None:
    lengths = bench_attention.Case(64, name).lengths()
    assert sum(lengths) == rows
    assert max(lengths) == lengths[0] == int(name.lstrip("ujag"))
    assert min(lengths) >= 1


def test_cases_are_parsed() -> None:
    parsed = bench_attention.parse_cases("d64:u128,u200,d64:u128,d8:32xjag200", ("u1",))
    names = [(case.head_dim, case.name) for case in parsed]
    assert names == [(64, "u128"), (32, "u200"), (64, "u200"), (128, "u200"), (256, "u200"), (8, "32xjag200")]
    assert len(bench_attention.parse_cases("")) == 4 * 11
    for wrong in ("64:u128", "d64:x3", "d64:u77"):
        with pytest.raises(ValueError, match="got"):
            bench_attention.parse_cases(wrong)


def test_work_of_a_problem_by_hand() -> None:
    problem = attention_providers.Problem((3, 1), heads=2, head_dim=8, dtype=torch.bfloat16, device="cpu")
    assert problem.kept_pairs == 6 + 1
    assert problem.flops("fwd") == 4 * 8 * 7 * 2
    assert problem.flops("bwd") == 10 * 8 * 7 * 2
    assert problem.nbytes("fwd") == 4 * (4 * 2 * 8) * 2
    assert problem.nbytes("bwd") == 7 * (4 * 2 * 8) * 2


def test_rows_say_what_was_measured() -> None:
    rows = run(["eager"])
    timed = [row for row in rows if row["direction"] in ("fwd", "bwd")]
    assert [row["direction"] for row in rows] == ["fwd", "bwd", "host_op", "host_autograd"]
    for row in timed:
        assert set(ROW_KEYS) <= set(row)
    forward = timed[0]
    problem = bench_attention.Case(16, "3xjag20").problem(torch.float32, "cpu")
    assert forward["rows"] == problem.rows == sum(problem.lengths)
    assert forward["tflops"] == pytest.approx(problem.flops("fwd") / 0.5e-3 / 1e12)
    roof_s = max(problem.flops("fwd") / 1e12, problem.nbytes("fwd") / 1e9)
    assert forward["efficiency"] == pytest.approx(roof_s / 0.5e-3)


def test_compiled_op_and_eager_agree_enough_to_be_timed() -> None:
    assert [row["provider"] for row in run(["hstu_ext", "eager"], directions=("fwd",))][:2] == ["hstu_ext", "eager"]


@pytest.mark.parametrize("op", bench_jagged.OPS)
def test_jagged_rows(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every provider gives the same rows, and is timed forward and backward, on a small batch, and for its overhead."""
    cases = bench_jagged.parse_cases("d4:5xjag20")
    rows = list(bench_jagged.run([op], cases, list(bench_jagged.PROVIDERS), "fp32", "cpu", FakeTimer()))
    assert len(rows) == len(bench_jagged.PROVIDERS) * 6
    assert {row["lengths"] for row in rows} == {"5xjag20", bench_jagged.SMALL}
    lengths = harness.draw_lengths("5xjag20")
    dense_is_written = {"to_dense": "fwd", "to_jagged": "bwd"}
    for row, direction in zip(rows, ("fwd", "bwd")):
        assert set(ROW_KEYS) - {"tflops"} | {"gbps"} <= set(row)
        assert (row["rows"], row["direction"]) == (sum(lengths), direction)
        moved = sum(lengths) + (5 * 20 if dense_is_written.get(op) == direction else sum(lengths))
        assert row["gbps"] == pytest.approx(moved * 4 * 4 / 0.5e-3 / 1e9)
        assert row["efficiency"] == pytest.approx(row["gbps"])
    bench_jagged.print_table(rows)
    assert "eager_index  1.00x" in capsys.readouterr().out


def test_a_slow_jagged_provider_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench_jagged.LONGEST_CALL, "cpu", 0.0)
    cases = bench_jagged.parse_cases("d4:5xjag20")
    rows = list(bench_jagged.run(["concat"], cases, list(bench_jagged.PROVIDERS), "fp32", "cpu", FakeTimer()))
    assert {row["provider"] for row in rows if row["direction"] in ("fwd", "bwd")} == {"hstu_ext"}
    assert "eager_views skipped at concat bwd d4 5xjag20" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("op", bench_jagged.OPS)
def test_jagged_rows_of_a_gpu(op: str) -> None:
    """The op and eager indexing agree, and both can be captured in a graph."""
    timer = harness.CudaTimer(budget_ms=2.0)
    cases = bench_jagged.parse_cases("d64:40xjag60")
    providers = ["hstu_ext", "eager_index"]
    rows = [
        row
        for case in cases
        for row in bench_jagged.measure(op, case, providers, "bf16", "cuda", timer, FakeTimer().rates())
    ]
    assert [(row["provider"], row["direction"]) for row in rows] == [(p, d) for p in providers for d in ("fwd", "bwd")]
    assert all(row["graph_ms"] > 0 and row["extra_mib"] >= 0 for row in rows)
    # A forward needs nothing but its result; offsets and the allocator's rounding are all there is beside it.
    assert rows[0]["extra_mib"] < 0.1


def test_jagged_cases_are_parsed() -> None:
    assert len(bench_jagged.parse_cases("")) == 6
    assert [case.lengths for case in bench_jagged.parse_cases("d64")] == list(bench_jagged.LENGTHS)
    with pytest.raises(ValueError, match="got 'u7'"):
        bench_jagged.parse_cases("u7")


def test_a_wrong_or_failing_provider_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(problem: attention_providers.Problem) -> attention_providers.Attention:
        right = attention_providers.eager(problem)
        return lambda q, k, v: right(q, k, v) * 1.1

    def failing(problem: attention_providers.Problem) -> attention_providers.Attention:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(attention_providers.PROVIDERS, "wrong", wrong)
    monkeypatch.setitem(attention_providers.PROVIDERS, "failing", failing)
    case = bench_attention.Case(16, "2xu8")
    problem = case.problem(torch.float32, "cpu")
    measured = bench_attention.measure_case(case, problem, ["eager", "wrong", "failing"], ["fwd"], "fp32", FakeTimer())
    assert [row["provider"] for row, _ in measured] == ["eager"]
    printed = capsys.readouterr().out
    assert "wrong wrong at d16 2xu8: finite True, off by 0.1" in printed
    assert "failing skipped at d16 2xu8: no such kernel" in printed


def test_rows_survive_the_file_and_compare_with_their_base(tmp_path: Path) -> None:
    rows = run(["eager"])
    path = tmp_path / "rows.jsonl"
    harness.append_rows(path, rows)
    slower = [json.loads(json.dumps(row)) | {"p50_ms": 4.0, "graph_ms": 1.0} for row in rows[:2]]
    harness.append_rows(path, slower)
    base = harness.read_rows(path)
    assert len(base) == len(rows) + 2
    ratios = [ratio for _, ratio in harness.compare(base, rows)]
    assert ratios == [2.0, 2.0, 1.0, 1.0]
    assert harness.geometric_mean(ratios) == pytest.approx(2**0.5)


def test_recorded_peers_stand_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "peers.csv"
    path.write_text(
        "head_dim,lengths,peer,fwd_graph_ms,bwd_graph_ms\n16,2xu8,other,1.0,\n16,2xu8,third,1.0,2.0\n16,2xu9,third,1.0,1.0\n"
    )
    rows = run(["eager"], "d16:2xu8")
    peers = bench_attention.recorded_peers(harness.read_peers(path), rows, "eager")
    assert peers == {
        ("other", "fwd", 16, "2xu8"): 1.0,
        ("third", "fwd", 16, "2xu8"): 1.0,
        ("third", "bwd", 16, "2xu8"): 2.0,
    }
    bench_attention.print_table(rows, "eager", peers)
    printed = capsys.readouterr().out
    assert "2.00     -     -" in printed
    assert "2.00  4.00  3.00" in printed
    assert "third both: their time / ours, geometric mean 3.000, least 3.000, 1 cases" in printed


def test_peers_of_another_gpu_are_compared_by_efficiency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "peers.csv"
    path.write_text(
        "head_dim,lengths,peer,fwd_graph_ms,fwd_efficiency,device\n"
        "16,2xu8,here,1.0,0.5,card\n16,2xu8,there,1.0,0.5,other card\n"
        "16,2xu8,nowhere,1.0,0.25,\n16,2xu8,times,1.0,,other card\n"
    )
    rows = [row | {"gpu": "card", "efficiency": 0.75} for row in run(["eager"], "d16:2xu8")]
    peers = bench_attention.recorded_peers(harness.read_peers(path), rows, "eager")
    ratios = {name: ms / 0.5 for (name, _, _, _), ms in peers.items()}  # every call takes 0.5 ms
    assert ratios == {"here": 2.0, "there": 1.5, "nowhere": 3.0}
    printed = capsys.readouterr().out
    assert "there: recorded on other card, so the ratios are our efficiency over theirs, not times" in printed
    assert "nowhere: recorded on a GPU not told" in printed
    assert "here: recorded on card" not in printed


def test_rows_of_a_run_serve_as_recorded_peers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [row | {"gpu": "card"} for row in run(["eager"], "d16:2xu8")]
    harness.append_rows(path, [row | {"provider": "peer", "graph_ms": 1.0} for row in rows] + rows)
    peers = bench_attention.recorded_peers(harness.read_peers(path), rows, "eager")
    assert peers == {("peer", direction, 16, "2xu8"): 1.0 for direction in ("fwd", "bwd")}


def test_similarity_cases_agree_with_eager_and_make_rows() -> None:
    rates, common = FakeTimer().rates(), harness.machine("cpu")
    names = set()
    for case in bench_similarity.cases(torch.float32, scale=200):
        ours, eager = bench_similarity.measure(case, "fp32", rates, FakeTimer(), common)
        assert [ours["provider"], eager["provider"]] == ["hstu_ext", "eager"]
        assert set(ROW_KEYS) <= set(ours)
        assert ours["efficiency"] > 0
        names.add(case.op)
    assert names == {"l2norm", "topk_dot", "sampled_softmax_loss", "l2norm_dot", "in_batch_softmax_loss"}


def test_a_wrong_similarity_op_is_not_timed() -> None:
    case = next(bench_similarity.cases(torch.float32, "l2norm:", scale=200))
    wrong = dataclasses.replace(case, ours=lambda x: 1.1 * case.eager(x))
    with pytest.raises(AssertionError, match=r"off by 0\.1 from eager"):
        list(bench_similarity.measure(wrong, "fp32", FakeTimer().rates(), FakeTimer(), harness.machine("cpu")))


def test_quantiles_interpolate() -> None:
    assert harness.quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert harness.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_cpu_timer_measures() -> None:
    timer = harness.CpuTimer(budget_ms=5.0)
    times = timer.measure(lambda: torch.zeros(1000).sum())
    assert 0.0 < times.p20 <= times.p50 <= times.p80 < 1000.0
    assert times.graph is None
    assert times.best == times.p50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_timer_measures_a_captured_backward() -> None:
    timer = harness.CudaTimer(budget_ms=5.0)
    with timer.context():
        x = torch.randn(256, 256, device="cuda", requires_grad=True)
        y = x @ x
    call = bench_attention.backward_call(y, (x,), torch.ones_like(y))
    times = timer.measure(call)
    assert times.graph is not None
    assert 0.0 < times.graph <= times.p80
    z = x.detach()
    assert timer.extra_mib(lambda: (z + z) @ z) >= 0.25


def test_trials_are_overrides_a_line(tmp_path: Path) -> None:
    path = tmp_path / "trials.txt"
    path.write_text("# what was tried\nmodel.dim=16 loss.kind=full  # wide\n\nmodel.dim=8\n", encoding="utf-8")
    assert train_retrieval.read_trials(path) == [["model.dim=16", "loss.kind=full"], ["model.dim=8"]]


def test_trials_are_summed_up_over_their_seeds() -> None:
    rows = [
        {"overrides": [], "HR@10": 0.5, "NDCG@10": 0.25},
        {"overrides": ["model.bias=time"], "HR@10": 0.1, "NDCG@10": 0.05},
        {"overrides": ["model.bias=time"], "HR@10": 0.3, "NDCG@10": 0.05},
        {"overrides": [], "error": "the loss must be finite"},
    ]
    assert train_retrieval.table(rows).splitlines()[2:] == [
        "| none | 1 | 0.5000 | 0.2500 |",
        "| model.bias=time | 2 | 0.2000 ± 0.1414 | 0.0500 ± 0.0000 |",
    ]
    trials = train_retrieval.read_trials(harness.ROOT / "benchmarks" / "trials" / "bias.txt")
    config = harness.ROOT / "configs" / "ml-100k" / "hstu.toml"
    found = [load_config(config, overrides).model.bias for overrides in trials]
    assert found == ["none", "position", "time", "time+position"]


@pytest.mark.plain_allocations
def test_a_run_of_training_is_a_row() -> None:
    log = synthetic_log(60, 50, min_len=4, max_len=12, seed=1)
    overrides = ["training.epochs=2", "evaluation.every=1", "training.device=cpu", "model.dim=16", "model.head_dim=8"]
    config = str(harness.ROOT / "configs" / "synthetic" / "hstu.toml")
    rows = {v: train_retrieval.run(config, overrides, 3, v, log) for v in (True, False)}
    assert [row["holdout"] for row in rows.values()] == ["validation", "test"]
    for row in rows.values():
        assert (row["config"], row["seed"], row["epochs"]) == (config, 3, 2)
        assert 0 <= row["NDCG@10"] <= row["HR@10"] <= row["HR@50"] <= 1
        assert row["best_NDCG@10"] >= row["NDCG@10"]
        assert row["best_epoch"] in (1, 2)
        assert row["seconds"] > 0 < row["step_ms"]
