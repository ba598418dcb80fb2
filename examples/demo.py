"""Trains a small HSTU retrieval model on a synthetic interaction log and shows that it finds the planted structure.

    python examples/demo.py [--epochs 15] [--device cpu] [--picture out/demo.png]

Prints HR@10 and NDCG@10 (leave-one-out, full catalogue, seen items removed) beside two baselines, recommends for one
user, and writes the curves as a picture.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from hstu_ext.data import InteractionLog, synthetic_log
from hstu_ext.models import RetrievalGR
from hstu_ext.training import hit_rate, ndcg, ranks_of

BATCH = 64  # users
K = 10


def train_epoch(model: RetrievalGR, log: InteractionLog, optimizer: torch.optim.Optimizer) -> float:
    model.train()
    losses = []
    for users in torch.randperm(log.num_users, device=log.items.device).split(BATCH):
        batch = log.select(users)
        loss = model.loss(batch.items, batch.cu_seqlens, batch.max_seqlen)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


@torch.no_grad()
def model_ranks(model: RetrievalGR, log: InteractionLog, targets: torch.Tensor) -> torch.Tensor:
    model.eval()
    ranks = []
    for users in torch.arange(log.num_users, device=log.items.device).split(4 * BATCH):
        batch = log.select(users)
        scores = model.next_item_scores(batch.items, batch.cu_seqlens, batch.max_seqlen)
        ranks.append(ranks_of(scores, targets[users], seen=batch))
    return torch.cat(ranks)


def baseline_ranks(log: InteractionLog, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    popularity = torch.bincount(log.items, minlength=log.num_items).float()
    random = torch.rand(log.num_users, log.num_items, generator=torch.Generator().manual_seed(0))
    return {
        "random": ranks_of(random.to(log.items.device), targets, seen=log),
        "popularity": ranks_of(popularity.expand(log.num_users, -1), targets, seen=log),
    }


@torch.no_grad()
def print_recommendations(model: RetrievalGR, log: InteractionLog, targets: torch.Tensor, user: int) -> None:
    model.eval()
    history = log.select(torch.tensor([user], device=log.items.device))
    scores = model.next_item_scores(history.items, history.cu_seqlens, history.max_seqlen)[0]
    scores[history.items] = -torch.inf
    best = scores.topk(K)
    print(f"\nuser {user}: last events {history.items[-5:].tolist()}, the next one was {int(targets[user])}")
    for place, (item, score) in enumerate(zip(best.indices.tolist(), best.values.tolist()), start=1):
        print(f"  {place:>2}. item {item:>4}  {score:.3f}" + ("  <- the next event" if item == targets[user] else ""))


def draw(losses: list[float], hits: list[float], popularity: float, target: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    epochs = range(1, len(losses) + 1)
    left.plot(epochs, losses, marker="o")
    left.set_ylabel("training loss")
    right.plot(epochs, hits, marker="o", label="RetrievalGR")
    right.axhline(popularity, color="gray", linestyle="--", label="popularity")
    right.set_ylabel(f"HR@{K}")
    right.set_ylim(bottom=0)
    right.legend()
    for panel in (left, right):
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, default=Path("out/demo.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    log, targets = synthetic_log().leave_last_out()
    log, targets = log.to(options.device), targets.to(options.device)
    print(
        f"{log.num_users} users, {log.num_items} items, {log.items.numel()} events, "
        f"lengths {int(log.lengths.min())} to {log.max_seqlen}"
    )
    baselines = baseline_ranks(log, targets)
    model = RetrievalGR(log.num_items, max_len=log.max_seqlen).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)

    losses, hits = [], []
    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        losses.append(train_epoch(model, log, optimizer))
        ranks = model_ranks(model, log, targets)
        hits.append(hit_rate(ranks, K))
        print(f"epoch {epoch:>2}: loss {losses[-1]:.3f}, HR@{K} {hits[-1]:.3f}, {time.perf_counter() - start:.0f} s")

    print(f"\n{'':>12} {f'HR@{K}':>7} {f'NDCG@{K}':>8}")
    for name, found in (baselines | {"RetrievalGR": ranks}).items():
        print(f"{name:>12} {hit_rate(found, K):7.3f} {ndcg(found, K):8.3f}")
    print_recommendations(model, log, targets, user=0)
    draw(losses, hits, hit_rate(baselines["popularity"], K), options.picture)
    print(f"\ncurves: {options.picture}")


if __name__ == "__main__":
    main()
