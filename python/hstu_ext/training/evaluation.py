"""Ranking every user's held-out item among the whole catalogue, and two baselines to hold the result against."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hstu_ext._C import MissingKernelError
from hstu_ext.data import Batch, InteractionLog, SequenceBatches, Split
from hstu_ext.models import RetrievalGR
from hstu_ext.ops.similarity import topk_dot
from hstu_ext.training.config import EvaluationConfig
from hstu_ext.training.metrics import chance, ranks_of, summary


def rank_targets(
    query: Tensor, items: Tensor, targets: Tensor, seen: tuple[Tensor, Tensor] | None = None, depth: int = 1000
) -> Tensor:
    """The rank of each query's target by query . item, among all items but those seen.

    Args:
        query: [users, dim]; normalise both sides first for cosine similarity.
        items: [num_items, dim], dtype of query.
        targets: int64 [users].
        seen: items to leave out, int64 [total], with int64 offsets [users + 1]. A target is never left out.
        depth: items retrieved for a user, at most num_items of them.

    Returns:
        int64 [users]: 1 for the best item, ties to the lower index; 0 where depth items are all better.
    """
    if seen is not None:
        values, offsets = seen
        own_target = torch.repeat_interleave(targets, offsets.diff(), output_size=values.shape[0])
        seen = (torch.where(values == own_target, -1, values), offsets)
    _, indices = topk_dot(query, items, min(depth, items.shape[0]), seen)
    return ranks_of(indices, targets)


def model_inputs(model: RetrievalGR, batch: Batch, log: InteractionLog) -> dict[str, Any]:
    """The arguments of the model's methods for a batch of a log's users."""
    inputs: dict[str, Any] = {"items": batch.items, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    if model.actions is not None:
        inputs["actions"] = batch.actions
    if model.encoder.uses_times:
        inputs["times"] = batch.timestamps
    if model.contexts is not None:
        features = [log.user_features[name][batch.users] for name in model.contexts.names]
        inputs["contexts"] = torch.stack(features, dim=1)
    return inputs


def autocast_of(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What forward passes of training.precision run under."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def choose_device(key: str, name: str) -> torch.device:
    """The device that an option names; for auto the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"hstu_ext.config: {key} must be auto, cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"hstu_ext.config: {key} must be there, got {name!r} without a CUDA GPU")
    return device


def ranking_device(name: str, model_device: torch.device) -> torch.device:
    """Where topk_dot runs: for auto the model's device if topk_dot has a kernel for it in this build, else the CPU."""
    if name != "auto":
        return choose_device("evaluation.device", name)
    probe = torch.ones(1, 1, device=model_device)
    try:
        topk_dot(probe, probe, 1)
    except MissingKernelError:
        return torch.device("cpu")
    return model_device


class Evaluator:
    """Leave-one-out evaluation of a split: full catalogue, seen items removed, the normalisation of the model.

    Args:
        split: histories and the item that follows each, as hstu_ext.data.leave_one_out gives them.
        config: the K of the metrics, the depth of the ranking and the users at a time.
        max_len: events of a history that the model reads. All of a history counts as seen.
        device: that of the model. The ranking runs on config.device.
    """

    def __init__(
        self, split: Split, config: EvaluationConfig, max_len: int, device: torch.device | str = "cpu"
    ) -> None:
        self.split, self.config = split, config
        self.device = ranking_device(config.device, torch.device(device))
        self.log = split.history.to(device)
        self.batches = SequenceBatches(self.log, config.batch_size, max_len)
        self.seen = split.history.to(self.device)
        self.targets = split.targets.to(self.device)
        self.request_times = None if split.target_timestamps is None else split.target_timestamps.to(device)

    @torch.no_grad()
    def ranks(self, model: RetrievalGR, autocast: AbstractContextManager[Any] | None = None) -> Tensor:
        """int64 [users], on the device of the ranking: where the model puts each user's target."""
        was_training = model.training
        model.eval()
        ranks = torch.zeros_like(self.targets)
        with autocast or nullcontext():
            items = model.item_embeddings().float().to(self.device)
            for batch in self.batches:
                inputs = model_inputs(model, batch, self.log)
                if model.encoder.uses_times and self.request_times is not None:
                    inputs["request_times"] = self.request_times[batch.users]
                query = model.encode_query(**inputs).float().to(self.device)
                users = batch.users.to(self.device)
                ranks[users] = self._rank(users, query, items)
        model.train(was_training)
        return ranks

    def __call__(self, model: RetrievalGR, autocast: AbstractContextManager[Any] | None = None) -> dict[str, float]:
        """HR@K, NDCG@K, Recall@K and MRR of the model."""
        return summary(self.ranks(model, autocast).cpu(), self.config.ks)

    def baselines(self) -> dict[str, dict[str, float]]:
        """The same metrics of two orders that know nothing of the user.

        popularity: by descending number of events in the training data. random: what a random order has on average.
        """
        counts = self.split.train.popularity().to(self.device).float()[:, None]
        ranks = torch.zeros_like(self.targets)
        candidates = torch.zeros_like(self.targets)
        for users in torch.split(torch.arange(self.seen.num_users, device=self.device), self.config.batch_size):
            ranks[users] = self._rank(users, counts.new_ones((users.shape[0], 1)), counts)
            candidates[users] = counts.shape[0] - self._distinct_seen(users)
        depth = min(self.config.depth, counts.shape[0])
        return {
            "popularity": summary(ranks.cpu(), self.config.ks),
            "random": chance(candidates.cpu(), self.config.ks, depth),
        }

    def _rank(self, users: Tensor, query: Tensor, items: Tensor) -> Tensor:
        return rank_targets(query, items, self.targets[users], self._seen(users), self.config.depth)

    def _seen(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """The whole histories of users, packed: items and int64 offsets."""
        begin, end = self.seen.offsets[users], self.seen.offsets[users + 1]
        lengths = end - begin
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        total = int(offsets[-1])
        shift = torch.repeat_interleave(begin - offsets[:-1], lengths, output_size=total)
        return self.seen.items[torch.arange(total, device=users.device) + shift], offsets

    def _distinct_seen(self, users: Tensor) -> Tensor:
        """int64 [users]: different items in each history, the target not counted."""
        values, offsets = self._seen(users)
        row = torch.repeat_interleave(torch.arange(users.shape[0], device=users.device), offsets.diff())
        pairs = torch.unique(row * self.seen.num_items + values)
        row, item = pairs // self.seen.num_items, pairs % self.seen.num_items
        return torch.bincount(row[item != self.targets[users][row]], minlength=users.shape[0])
