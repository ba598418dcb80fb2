"""The training loop: what it learns, that it goes on where it stopped, and what it writes."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_ext.data import InteractionLog, synthetic_log
from hstu_ext.models import RetrievalGR
from hstu_ext.training import CheckpointError, Config, Trainer, load_model
from hstu_ext.training.metrics_log import ProgressBar
from hstu_ext.training.trainer import learning_rate

pytest.importorskip("safetensors")

SMALL = {
    "model": {"dim": 16, "num_heads": 2, "head_dim": 8, "ffn_dim": 16, "max_len": 30},
    "loss": {"num_negatives": 16},
    "training": {"epochs": 2, "batch_size": 8, "device": "cpu"},
    "evaluation": {"ks": [1, 10], "depth": 100},
    "output": {"log_every": 3, "report": False, "tensorboard": "off"},
}


def config_of(**sections: dict[str, Any]) -> Config:
    """The small configuration with these options in the place of its own."""
    return Config.from_dict({name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}})


def small_log(users: int = 40) -> InteractionLog:
    """With actions and features of users and items."""
    log = synthetic_log(users, 80, min_len=3, max_len=40, seed=2)
    generator = torch.Generator().manual_seed(0)
    return replace(
        log,
        actions=torch.randint(2, log.items.shape, generator=generator),
        action_names=("view", "buy"),
        timestamps=torch.randint(1000, log.items.shape, generator=generator).cumsum(0),
        item_features={"kind": torch.randint(4, (80,), generator=generator)},
        user_features={"age": torch.randint(1, 5, (users,), generator=generator)},
        user_feature_sizes={"age": 5},
    )


def trainer_of(config: Config, output: Path | None = None, log: InteractionLog | None = None) -> Trainer:
    return Trainer(config, log or small_log(), output, write=None)


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "events_per_second")} for line in lines]


def assert_same_model(one: RetrievalGR, other: RetrievalGR) -> None:
    for (name, ours), theirs in zip(one.state_dict().items(), other.state_dict().values()):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", ["sampled", "in_batch", "full"])
@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
def test_a_tiny_log_is_learned_by_heart(encoder: str, kind: str) -> None:
    """Every sequence has a copy with one event more, so that its held-out event is among those trained on."""
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randperm(60, generator=generator)[:length].tolist() for length in (9, 6, 10, 7)]
    copies = [[*sequence, sequence[0]] for sequence in sequences]
    log = InteractionLog.from_sequences(sequences + copies, 60)
    config = config_of(
        model={"encoder": encoder, "dim": 32, "dropout": 0.0, "max_len": 12},
        loss={"kind": kind},
        training={"epochs": 80, "learning_rate": 0.01},
        evaluation={"every": 0},
    )
    trainer = trainer_of(config, log=log)
    trainer.fit()
    ranks = trainer.evaluator.ranks(trainer.model)
    assert ranks[:4].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"encoder": "sasrec"}},
        {"model": {"contexts": ["age"], "actions": "interleave", "item_features": ["kind"]}},
        {"training": {"accumulation": 2, "warmup_steps": 3, "schedule": "cosine", "clip_norm": 0.5}},
        {"loss": {"kind": "in_batch", "log_q": True, "mask_same_sequence": True}},
        {"training": {"recompute": True, "precision": "bf16"}},
        {"model": {"bias": "time+position", "actions": "interleave"}, "training": {"recompute": True}},
    ],
    ids=["hstu", "sasrec", "features", "schedule", "in-batch", "bf16", "times"],
)
def test_a_resumed_run_is_the_uninterrupted_one(sections: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(**sections)
    whole = trainer_of(config, tmp_path / "whole")
    whole.fit()

    class Interrupted(Exception):
        pass

    first = trainer_of(config, tmp_path / "parts")
    evaluate = first.evaluate

    def interrupt() -> dict[str, float]:
        if first.epoch == 2:
            raise Interrupted
        return evaluate()

    first.evaluate = interrupt  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        first.fit()
    torch.manual_seed(99)
    second = trainer_of(config, tmp_path / "parts")
    results = second.fit(resume=True)
    assert_same_model(whole.model, second.model)
    assert [{**each, "seconds": 0} for each in results] == [{**each, "seconds": 0} for each in whole.results]
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")


def test_a_run_is_resumed_within_an_epoch(tmp_path: Path) -> None:
    config = config_of(output={"checkpoint_steps": 4})
    whole = trainer_of(config, tmp_path / "whole")
    whole.fit()

    class Interrupted(Exception):
        pass

    first = trainer_of(config, tmp_path / "parts")
    train_step = first._train_step

    def interrupt(batches: list[Any]) -> None:
        if first.step == 9:
            raise Interrupted
        train_step(batches)

    first._train_step = interrupt  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        first.fit()
    assert [each.name for each in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-00000008"]
    second = trainer_of(config, tmp_path / "parts")
    second.fit(resume=True)
    assert_same_model(whole.model, second.model)
    assert [each["loss"] for each in second.results] == [each["loss"] for each in whole.results]
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")


def test_more_epochs_after_the_end(tmp_path: Path) -> None:
    whole = trainer_of(config_of(training={"epochs": 3}), tmp_path / "whole")
    whole.fit()
    trainer_of(config_of(training={"epochs": 1}), tmp_path / "parts").fit()
    more = trainer_of(config_of(training={"epochs": 3}), tmp_path / "parts")
    assert len(more.fit(resume=True)) == 3
    assert_same_model(whole.model, more.model)


def test_the_same_seed_gives_the_same_run_and_another_another() -> None:
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed * 7)
        losses.append([each["loss"] for each in trainer_of(config_of(training={"seed": seed})).fit()])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_accumulated_micro_batches_are_one_batch() -> None:
    """With the full softmax and no dropout, positions weigh the same wherever the batch is cut."""
    models = []
    for accumulation in (1, 4):
        config = config_of(
            model={"dropout": 0.0},
            loss={"kind": "full"},
            training={"accumulation": accumulation, "batch_size": 40, "epochs": 3, "clip_norm": 1.0},
        )
        log = small_log()
        trainer = Trainer(config, log, model=None, write=None)
        trainer.model.double()
        models.append((trainer, trainer.fit()))
    (one, results), (four, other_results) = models
    assert one.step == four.step == 3
    for (name, ours), theirs in zip(one.model.state_dict().items(), four.model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    for ours, theirs in zip(results, other_results):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)


@pytest.mark.plain_allocations
def test_compiled_training_is_eager_training() -> None:
    torch._dynamo.reset()
    losses = []
    for compile in ("off", "on"):
        config = config_of(model={"dropout": 0.0}, loss={"kind": "full"}, training={"compile": compile, "epochs": 1})
        losses.append([each["loss"] for each in trainer_of(config, log=small_log(24)).fit()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_training_does_better_than_popularity() -> None:
    log = synthetic_log(400, 200, max_len=60, seed=1)
    config = config_of(
        model={"dim": 32, "head_dim": 16, "max_len": 60},
        loss={"num_negatives": 64},
        training={"epochs": 12, "batch_size": 32, "learning_rate": 5e-3},
        evaluation={"every": 0},
    )
    trainer = trainer_of(config, log=log)
    results = trainer.fit()
    assert results[-1]["HR@10"] > 2.5 * trainer.baselines["popularity"]["HR@10"]
    assert trainer.baselines["popularity"]["HR@10"] > trainer.baselines["random"]["HR@10"]
    assert results[-1]["loss"] < 0.8 * results[0]["loss"]
    assert "HR@10" not in results[0]


def test_the_query_of_an_evaluation_has_the_time_of_its_target() -> None:
    log = small_log()
    trainer = trainer_of(config_of(model={"bias": "time", "max_len": 40}), log=log)
    asked: list[torch.Tensor] = []
    encode_query = trainer.model.encode_query

    def watch(**inputs: Any) -> torch.Tensor:
        assert torch.equal(inputs["times"], trainer.evaluator.log.timestamps)
        asked.append(inputs["request_times"])
        return encode_query(**inputs)

    trainer.model.encode_query = watch  # type: ignore[method-assign]
    trainer.evaluate()
    assert log.timestamps is not None
    assert torch.equal(torch.cat(asked), log.timestamps[log.offsets[1:] - 1])


def test_learning_rate_by_hand() -> None:
    training = config_of(training={"learning_rate": 1.0, "warmup_steps": 4}).training
    assert [learning_rate(training, step, 12) for step in (0, 1, 3, 4, 11)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = replace(training, schedule="cosine")
    assert [learning_rate(cosine, step, 12) for step in (3, 4, 8)] == pytest.approx([1.0, 1.0, 0.5])
    assert learning_rate(cosine, 11, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_what_a_run_writes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    config = config_of(output={"report": True, "tensorboard": "on"})
    trainer = trainer_of(config, run)
    results = trainer.fit()
    assert sorted(each.name for each in run.iterdir()) == [
        "checkpoints",
        "config.toml",
        "curves.png",
        "metrics.jsonl",
        "report.md",
        "tensorboard",
    ]
    lines = lines_of(run)
    assert [line["event"] for line in lines] == ["popularity", "random", "train", "epoch", "train", "train", "epoch"]
    assert [line["step"] for line in lines] == [0, 0, 3, 5, 6, 9, 10]
    assert lines[-1]["HR@10"] == results[-1]["HR@10"]
    assert lines[2]["learning_rate"] == 1e-3
    report = (run / "report.md").read_text(encoding="utf-8")
    assert f"| popularity | {trainer.baselines['popularity']['HR@1']:.4f} |" in report
    assert f"| hstu, epoch 2 | {results[-1]['HR@1']:.4f} |" in report
    assert "![loss and HR@10 by epoch](curves.png)" in report
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    accumulator = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    hits = [(each.step, each.value) for each in accumulator.Scalars("epoch/HR@10")]
    assert hits == [(5, pytest.approx(results[0]["HR@10"])), (10, pytest.approx(results[1]["HR@10"]))]
    assert len(accumulator.Scalars("train/loss")) == 3

    model, loaded, catalogue = load_model(run)
    assert loaded == config
    assert_same_model(model, trainer.model)
    assert list(catalogue.item_ids) == list(trainer.catalogue.item_ids)
    assert catalogue.item_titles == trainer.catalogue.item_titles
    assert torch.equal(catalogue.counts, trainer.catalogue.counts)
    assert not model.training


def test_a_table_row_for_every_epoch() -> None:
    written: list[str] = []
    Trainer(config_of(), small_log(), write=written.append).fit()
    text = "\n".join(written)
    for pattern in (
        r"40 users, 80 items, \d+ training events; \d+ parameters on cpu",
        r"popularity +0\.\d{4}",
        r"random ",
    ):
        assert re.search(pattern, text)
    header = next(line for line in text.splitlines() if "HR@10" in line)
    assert header.split() == ["loss", "HR@1", "HR@10", "NDCG@1", "NDCG@10", "MRR", "seconds"]
    rows = [line.split() for line in text.splitlines() if line.startswith("epoch")]
    assert [row[:2] for row in rows] == [["epoch", "1"], ["epoch", "2"]]
    assert all(len(row) == 2 + 7 for row in rows)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu_ext.training.metrics_log.time.perf_counter", itertools.count().__next__)
    terminal = Terminal()
    bar = ProgressBar("epoch 1", 4, terminal, width=8)
    for done in (1, 2, 4):
        bar.update(done, "loss 2.5")
    bar.close()
    lines = [line.removesuffix("\033[K") for line in terminal.getvalue().split("\r")[1:]]
    assert lines == [
        "epoch 1  25% [##......] 1/4    1.0 it/s  loss 2.5",
        "epoch 1  50% [####....] 2/4    1.0 it/s  loss 2.5",
        "epoch 1 100% [########] 4/4    1.3 it/s  loss 2.5",
        "",
    ]
    plain = io.StringIO()
    bar = ProgressBar("epoch 1", 4, plain)
    bar.update(4)
    bar.close()
    assert plain.getvalue() == ""


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_what_fp32_products_of_a_gpu_may_use(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start(resume: bool) -> None:
        raise Started

    trainer = trainer_of(config_of(training={"tf32": tf32}))
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(trainer, "_start", start)
    before = torch.get_float32_matmul_precision()
    try:
        with pytest.raises(Started):
            trainer.fit()
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_a_trainer_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    trainer_of(config_of(), run).fit()
    with pytest.raises(FileExistsError, match=r"run must be a new directory, or resumed, got a run"):
        trainer_of(config_of(), run).fit()
    with pytest.raises(CheckpointError, match=r"elsewhere must be a run or a checkpoint, found no model there"):
        trainer_of(config_of(), tmp_path / "elsewhere").fit(resume=True)
    with pytest.raises(CheckpointError, match=r"(?s)must hold this model: .*size mismatch"):
        trainer_of(config_of(model={"dim": 24}), run).fit(resume=True)
    with pytest.raises(ValueError, match=r"training.device must be auto, cpu or cuda, got 'abacus'"):
        trainer_of(config_of(training={"device": "abacus"}))
    with pytest.raises(ValueError, match=r"training.device must be cuda for training.cuda_graphs = on, got cpu"):
        trainer_of(config_of(training={"cuda_graphs": "on"}))
    with pytest.raises(ValueError, match=r"model.contexts must be among the data's \(age\), got 'name'"):
        trainer_of(config_of(model={"contexts": ["name"]}))
    broken = trainer_of(config_of())
    broken.model.items.embedding.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"the loss must be finite, got nan before step 3"):
        broken.fit()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"matplotlib must be installed for the report.*output.report=false"):
        trainer_of(config_of(output={"report": True}), tmp_path / "new")


def test_broken_checkpoints(tmp_path: Path) -> None:
    trainer_of(config_of(training={"epochs": 1}), tmp_path).fit()
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    # What an interrupted save leaves behind is no checkpoint.
    (tmp_path / "checkpoints" / "step-00000099.unfinished").mkdir()
    load_model(tmp_path)
    catalogue = checkpoint / "catalogue.json"
    text = catalogue.read_text(encoding="utf-8")
    catalogue.write_text(text.replace('"format": 1', '"format": 7'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"must be of format 1, got 7"):
        load_model(checkpoint)
    catalogue.write_text(text[:-5], encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"catalogue.json must be a readable JSON file"):
        load_model(checkpoint)
    catalogue.write_text(text, encoding="utf-8")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"model.safetensors must be a safetensors file"):
        load_model(checkpoint)


@pytest.mark.parametrize("kind", ["sampled", "full"])
def test_a_step_on_padded_rows_is_a_step(kind: str) -> None:
    """What a CUDA graph captures, run without one: batches in a fixed number of rows, absent users among them."""
    models = []
    for padded in (False, True):
        config = config_of(
            model={"dropout": 0.0, "head_dim": 10, "contexts": ["age"]},
            loss={"kind": kind},
            training={"batch_size": 16},
        )
        trainer = trainer_of(config)
        trainer.model.double()
        if kind == "sampled":
            trainer.model.criterion.sampler.forward = lambda positives: positives[:, None] % 7 + torch.arange(5) * 11
        for chosen in trainer.batches.chosen():
            users = torch.nn.functional.pad(chosen.users, (0, 16 - chosen.users.numel()), value=-1)
            batch = trainer.batches.padded(users, 16 * 30) if padded else trainer.batches._cut(chosen)
            trainer._train_step([batch])
        models.append(trainer)
    exact, padded = models
    assert exact.step == padded.step == 3
    for ours, theirs in zip(padded.model.parameters(), exact.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(padded._loss_sums, exact._loss_sums, rtol=1e-12, atol=0)


GRAPHS = {
    "hstu": {},
    "odd heads": {"model": {"num_heads": 1, "head_dim": 50}},
    "bias": {"model": {"bias": "position"}},
    "times": {"model": {"bias": "time+position", "contexts": ["age"]}},
    "sasrec": {"model": {"encoder": "sasrec"}},
    "features": {"model": {"contexts": ["age"], "actions": "interleave", "item_features": ["kind"]}},
    "full": {"loss": {"kind": "full", "log_q": True}, "training": {"precision": "bf16"}},
    "schedule": {"training": {"warmup_steps": 3, "schedule": "cosine", "clip_norm": 0.5, "weight_decay": 0.1}},
    "last": {"loss": {"supervision": "last"}},
}


@pytest.mark.gpu
@pytest.mark.plain_allocations
@pytest.mark.parametrize("sections", GRAPHS.values(), ids=GRAPHS)
def test_captured_steps_are_the_steps(sections: dict[str, Any]) -> None:
    """With dropout and sampled negatives: the same random numbers, the last and smaller batch included."""
    found = []
    for graphs in ("off", "on"):
        training = {"cuda_graphs": graphs, "device": "cuda", "compile": "off", "epochs": 3, "batch_size": 32}
        config = config_of(
            **{**sections, "training": {**training, **sections.get("training", {})}},
            evaluation={"every": 0},
            output={"log_every": 1},
        )
        trainer = trainer_of(config, log=small_log(150))
        losses = []
        rows = trainer._captured._rows_apart if trainer._captured else 30
        for epoch in range(3):
            trainer.batches.set_epoch(epoch)
            for chosen in trainer.batches.chosen():
                if trainer._captured:
                    trainer._set_learning_rate()
                    trainer._captured(chosen)
                    trainer._count_step()
                else:  # the same shapes give the same random numbers
                    users = torch.nn.functional.pad(chosen.users, (0, 32 - chosen.users.numel()), value=-1)
                    trainer._train_step([trainer.batches.padded(users, -(-chosen.total // rows) * rows)])
                losses.append(trainer._read_loss(1))
        found.append((losses, trainer, torch.cuda.get_rng_state()))
    (eager, one, state), (captured, other, captured_state) = found
    assert other._captured is not None
    assert len(other._captured._graphs) > 1
    assert captured == pytest.approx(eager, rel=2e-3)
    assert captured[0] == pytest.approx(eager[0], rel=1e-5)
    assert torch.equal(state, captured_state)
    for (name, ours), theirs in zip(other.model.state_dict().items(), one.model.state_dict().values()):
        assert (ours - theirs).norm() <= 0.01 * theirs.norm(), name


@pytest.mark.gpu
@pytest.mark.plain_allocations
def test_captured_training_is_resumed(tmp_path: Path) -> None:
    """By a new trainer, and by one that has graphs of where the optimizer's state was."""
    config = config_of(training={"device": "cuda", "epochs": 3}, model={"dropout": 0.3})
    whole = [each["loss"] for each in trainer_of(config, tmp_path / "whole").fit()]
    first = trainer_of(config, tmp_path / "parts")
    evaluate = first.evaluate

    def interrupt() -> dict[str, float]:
        if first.epoch == 2:
            raise KeyboardInterrupt
        return evaluate()

    first.evaluate = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    shutil.copytree(tmp_path / "parts", tmp_path / "copy")
    torch.manual_seed(99)
    new = trainer_of(config, tmp_path / "copy")
    first.evaluate = evaluate  # type: ignore[method-assign]
    for trainer in (first, new):
        assert [each["loss"] for each in trainer.fit(resume=True)] == pytest.approx(whole, rel=1e-3)
        assert trainer._captured is not None
        assert trainer._captured._graphs


@pytest.mark.gpu
def test_what_is_captured() -> None:
    for sections, captured in (
        ({}, True),
        ({"model": {"encoder": "sasrec"}}, True),
        ({"loss": {"kind": "in_batch"}}, False),
        ({"training": {"accumulation": 2}}, False),
        ({"training": {"recompute": True}}, False),
        ({"training": {"cuda_graphs": "off"}}, False),
    ):
        training = {"device": "cuda", **sections.get("training", {})}
        trainer = trainer_of(config_of(**{**sections, "training": training}))
        assert (trainer._captured is not None) == captured, sections


@pytest.mark.gpu
@pytest.mark.plain_allocations
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_a_gpu(precision: str, tmp_path: Path) -> None:
    log = synthetic_log(400, 200, max_len=60, seed=1)
    config = config_of(
        model={"dim": 32, "head_dim": 16, "max_len": 60},
        loss={"num_negatives": 64},
        training={
            "epochs": 12,
            "batch_size": 32,
            "learning_rate": 5e-3,
            "device": "cuda",
            "precision": precision,
            "compile": "off",
        },
        evaluation={"every": 0},
    )
    trainer = trainer_of(config, tmp_path / "run", log)
    results = trainer.fit()
    assert results[-1]["HR@10"] > 2.5 * trainer.baselines["popularity"]["HR@10"]
    assert_same_model(load_model(tmp_path / "run", "cuda")[0], trainer.model)
