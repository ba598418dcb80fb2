"""The training loop: batches in, checkpoints, metrics and a report out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_ext.data import Batch, InteractionLog, SequenceBatches, leave_one_out
from hstu_ext.models import Catalogue, RetrievalGR
from hstu_ext.training.captured_step import CapturedStep
from hstu_ext.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from hstu_ext.training.config import Config, TrainingConfig
from hstu_ext.training.evaluation import Evaluator, autocast_of, choose_device, model_inputs
from hstu_ext.training.metrics_log import MetricsLog, ProgressBar, table
from hstu_ext.training.report import check_report, write_report

EPOCH, LINE = 0, 1  # places of the two sums of losses


class Trainer:
    """Trains a RetrievalGR on all events of a log but the held-out ones, and evaluates it on those.

        log = load("ml-100k")
        trainer = Trainer(load_config("configs/ml-100k/hstu.toml"), log, output="runs/first")
        results = trainer.fit()

    Results are the same bit for bit on a CPU with the same number of threads, also over an interruption.

    Args:
        config: of the run.
        log: the whole of the data.
        output: directory of the run, for checkpoints, metrics and the report; None for none of them.
        model: what to train; None builds the configuration's from its seed.
        write: what prints a line; None prints nothing.

    Raises:
        ValueError: configuration and data do not fit together.
        FileExistsError: the directory already holds a run (fit(resume=True) goes on with it).
        ImportError: an option needs a package that is not installed.
    """

    def __init__(
        self,
        config: Config,
        log: InteractionLog,
        output: str | Path | None = None,
        *,
        model: RetrievalGR | None = None,
        write: Callable[[str], None] | None = print,
    ) -> None:
        training = config.training
        self.config, self.run = config, None if output is None else Path(output)
        self.device = choose_device("training.device", training.device)
        self._write: Callable[[str], None] = write or (lambda line: None)
        if self.run is not None and config.output.report:
            check_report()
        split = leave_one_out(log, holdout=config.data.holdout)  # type: ignore[arg-type]
        self.catalogue = Catalogue.from_log(split.train)
        torch.manual_seed(training.seed)
        self.model = (model or RetrievalGR.from_config(config, self.catalogue)).to(self.device)
        self.evaluator = Evaluator(split, config.evaluation, config.model.max_len, self.device)
        self.train_log = split.train.to(self.device)
        self.batches = SequenceBatches(
            self.train_log,
            training.batch_size // training.accumulation,
            config.model.max_len,
            shuffle=True,
            seed=training.seed,
            min_len=2,
            random_windows=training.window == "random",
        )
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=torch.tensor(training.learning_rate, device=self.device) if on_gpu else training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
        )
        self._captured = self._make_captured_step()
        compiled = training.compile == "on" or (training.compile == "auto" and on_gpu and self._captured is None)
        self._loss: Callable[..., Tensor] = (
            torch.compile(self.model.loss, dynamic=True) if compiled else self.model.loss
        )
        self.steps_per_epoch = math.ceil(len(self.batches) / training.accumulation)
        self.epoch, self.step = 0, 0
        self.results: list[dict[str, float]] = []
        self.baselines: dict[str, dict[str, float]] = {}
        # Sums of the steps' losses, of this epoch and since the last line, and the steps that each has.
        self._loss_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._summed_steps = [0, 0]

    def autocast(self) -> AbstractContextManager[Any]:
        """What forward passes run under."""
        return autocast_of(self.config.training.precision, self.device)

    def fit(self, resume: bool = False) -> list[dict[str, float]]:
        """Trains to the configured number of epochs.

        Args:
            resume: go on from the latest checkpoint of the run.

        Returns:
            For every epoch: epoch, step, loss, seconds and, where it was evaluated, HR@K, NDCG@K, Recall@K and MRR.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.config.training.tf32 else "highest")
        metrics = self._start(resume)
        try:
            while self.epoch < self.config.training.epochs:
                self._train_epoch(metrics)
        finally:
            metrics.close()
        if self.run is not None and self.config.output.report:
            report = write_report(self.run, self.config, self.catalogue, self.results, self.baselines)
            self._write(f"\nreport: {report}")
        return self.results

    def evaluate(self) -> dict[str, float]:
        """HR@K, NDCG@K, Recall@K and MRR of the model as it is."""
        return self.evaluator(self.model, self.autocast())

    def _start(self, resume: bool) -> MetricsLog:
        self.baselines = self.evaluator.baselines()
        resumed_from = None
        if self.run is not None:
            if resume:
                self._resume(find_checkpoint(self.run))
                resumed_from = self.step
            elif (self.run / "checkpoints").exists():
                raise FileExistsError(f"hstu_ext.training: {self.run} must be a new directory, or resumed, got a run")
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / "config.toml").write_text(self.config.to_toml(), encoding="utf-8")
        metrics = MetricsLog(self.run, self.config.output.tensorboard, resumed_from)
        parameters = sum(each.numel() for each in self.model.parameters())
        self._write(
            f"{self.train_log.num_users} users, {self.catalogue.num_items} items, {self.train_log.items.numel()} "
            f"training events; {parameters} parameters on {self.device}, ranking on {self.evaluator.device}"
        )
        self._write(table(self._columns(), [(name, self._cells(each)) for name, each in self.baselines.items()]))
        if resumed_from is None:
            for name, values in self.baselines.items():
                metrics.write(name, 0, values)
        else:
            self._write(f"resumed after step {resumed_from}")
            for result in self.results:
                self._write_row(result)
        return metrics

    def _train_epoch(self, metrics: MetricsLog) -> None:
        options, training = self.config.output, self.config.training
        begin, line_begin, events = time.perf_counter(), time.perf_counter(), 0
        self.model.train()
        self.batches.set_epoch(self.epoch)
        bar = ProgressBar(f"epoch {self.epoch + 1}", self.steps_per_epoch)
        text = ""
        for trained in self._steps():
            events += trained
            if options.log_every and self.step % options.log_every == 0:
                loss = self._read_loss(LINE)
                speed = events / (time.perf_counter() - line_begin)
                line_begin, events = time.perf_counter(), 0
                text = f"loss {loss:.4f}"
                rate = learning_rate(training, self.step - 1, training.epochs * self.steps_per_epoch)
                metrics.write("train", self.step, {"loss": loss, "learning_rate": rate, "events_per_second": speed})
            bar.update(self.step - self.epoch * self.steps_per_epoch, text)
            if options.checkpoint_steps and self.step % options.checkpoint_steps == 0:
                self._save()
        bar.close()
        self.epoch += 1
        last = self.epoch == training.epochs
        result: dict[str, float] = {"epoch": self.epoch, "step": self.step, "loss": self._read_loss(EPOCH)}
        result["seconds"] = round(time.perf_counter() - begin, 3)
        every = self.config.evaluation.every
        if last or (every and self.epoch % every == 0):
            result.update(self.evaluate())
        self.results.append(result)
        metrics.write("epoch", self.step, result)
        self._write_row(result)
        if last or (options.checkpoint_every and self.epoch % options.checkpoint_every == 0):
            self._save()

    def _make_captured_step(self) -> CapturedStep | None:
        """Where the configuration wants CUDA graphs and everything can be in one."""
        training, model = self.config.training, self.model
        if training.cuda_graphs == "off" or (training.cuda_graphs == "auto" and self.device.type != "cuda"):
            return None
        obstacles = [
            (self.device.type == "cuda", "training.device must be cuda", self.device.type),
            (training.accumulation == 1, "training.accumulation must be 1", training.accumulation),
            (not model.encoder.recompute, "training.recompute must be false", "true"),
            (getattr(model.encoder, "capturable", False), "the encoder must be capturable", type(model.encoder)),
            (getattr(model.criterion, "capturable", False), "the loss must be capturable", type(model.criterion)),
        ]
        for holds, expected, got in obstacles:
            if not holds and training.cuda_graphs == "on":
                raise ValueError(f"hstu_ext.config: {expected} for training.cuda_graphs = on, got {got}")
        if not all(holds for holds, _, _ in obstacles):
            return None
        return CapturedStep(lambda batch: self._update([batch]), self._gradients, self.optimizer, self.batches)

    def _steps(self) -> Iterator[int]:
        """Trains the rest of the epoch; the events of every step as it is done."""
        if self._captured is None:
            for micro_batches in _grouped(self.batches, self.config.training.accumulation):
                self._train_step(micro_batches)
                yield sum(batch.items.numel() for batch in micro_batches)
            return
        for chosen in self.batches.chosen():
            self._set_learning_rate()
            self._captured(chosen)
            self._count_step()
            yield chosen.total

    def _train_step(self, micro_batches: list[Batch]) -> None:
        """One step of the optimizer, its launches one by one."""
        self._set_learning_rate()
        self._update(micro_batches)
        self._count_step()

    def _set_learning_rate(self) -> None:
        training = self.config.training
        rate = learning_rate(training, self.step, training.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _count_step(self) -> None:
        self.step += 1
        self._summed_steps = [steps + 1 for steps in self._summed_steps]

    def _gradients(self, batch: Batch, factor: Tensor | None = None) -> Tensor:
        """Adds the gradients of a batch's loss, times factor where that is given; returns the loss, as multiplied."""
        with self.autocast():
            loss = self._loss(**model_inputs(self.model, batch, self.train_log))
        if factor is not None:
            loss = loss * factor
        torch.autograd.backward(loss)
        return loss.detach()

    def _update(self, micro_batches: list[Batch]) -> None:
        """New parameters from the mean loss over all positions of the micro-batches. Reads nothing back."""
        training = self.config.training
        self.optimizer.zero_grad(set_to_none=True)
        counts, losses = [], []
        for batch in micro_batches:
            if len(micro_batches) > 1:
                counts.append(self.model.num_predictions(batch.cu_seqlens))
            losses.append(self._gradients(batch, counts[-1] if counts else None))
        parameters = [each for each in self.model.parameters() if each.grad is not None]
        mean = losses[0]
        if len(micro_batches) > 1:
            total = torch.stack(counts).sum().clamp(min=1)
            mean = torch.stack(losses).sum() / total
            for each in parameters:
                assert each.grad is not None
                each.grad.div_(total)
        if training.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, training.clip_norm)
        self.optimizer.step()
        self._loss_sums += mean

    def _read_loss(self, which: int) -> float:
        """The mean loss of the epoch or since the last line, whose sum begins again at 0. Waits for the device."""
        loss = float(self._loss_sums[which]) / max(self._summed_steps[which], 1)
        self._loss_sums[which], self._summed_steps[which] = 0, 0
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"hstu_ext.training: the loss must be finite, got {loss} before step {self.step}; a lower "
                "training.learning_rate or training.clip_norm may help"
            )
        return loss

    def _save(self) -> None:
        if self.run is None:
            return
        progress = {
            "epoch": self.epoch,
            "step": self.step,
            "batches": self.batches.state_dict(),
            "summed_steps": self._summed_steps,
            "results": self.results,
        }
        tensors = {"loss_sums": self._loss_sums}
        save_checkpoint(self.run, self.step, self.model, self.config, self.catalogue, self.optimizer, progress, tensors)

    def _resume(self, directory: Path) -> None:
        progress, tensors = load_checkpoint(directory, self.model, self.optimizer)
        if self._captured is not None:
            self._captured.clear()
        self.epoch, self.step, self.results = progress["epoch"], progress["step"], progress["results"]
        self.batches.load_state_dict(progress["batches"])
        self._loss_sums.copy_(tensors["loss_sums"])
        self._summed_steps = progress["summed_steps"]

    def _columns(self) -> list[str]:
        ks = self.config.evaluation.ks
        return ["loss", *(f"HR@{k}" for k in ks), *(f"NDCG@{k}" for k in ks), "MRR", "seconds"]

    def _cells(self, values: dict[str, float]) -> list[float | None]:
        return [values.get(name) for name in self._columns()]

    def _write_row(self, result: dict[str, float]) -> None:
        width = max(map(len, self.baselines))
        row = (f"epoch {result['epoch']}".ljust(width), self._cells(result))
        self._write(table(self._columns(), [row]).split("\n")[1])


def learning_rate(training: TrainingConfig, step: int, steps: int) -> float:
    """The learning rate of a step, from 0: a linear rise, then constant or half a cosine down to 0."""
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches; the last one may be shorter."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
