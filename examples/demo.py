"""Trains a small HSTU retrieval model on a synthetic log, evaluates it, recommends, and draws its curves.

    python examples/demo.py [--epochs 15] [--output out/demo] [--set SECTION.KEY=VALUE]

It is `hstu-ext train configs/synthetic/hstu.toml` and `hstu-ext recommend` from Python.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from hstu_ext.data import load
from hstu_ext.training import Trainer, load_config, load_model

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "synthetic" / "hstu.toml"
USER, K = 0, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="made anew")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override an option")
    options = parser.parse_args()

    config = load_config(CONFIG, [f"training.epochs={options.epochs}", *options.set])
    log = load(config.data.source, **config.data.options)
    shutil.rmtree(options.output, ignore_errors=True)
    trainer = Trainer(config, log, options.output)
    results = trainer.fit()

    model, _, catalogue = load_model(options.output)
    *history, next_item = log.user(USER).items.tolist()
    scores, items = model.recommend([history], K)
    print(f"\nuser {USER}, after {', '.join(catalogue.title(item) for item in history[-5:])}:")
    for place, (score, item) in enumerate(zip(scores[0].tolist(), items[0].tolist()), start=1):
        hit = "  <- what came next" if item == next_item else ""
        print(f"{place:>4}. {score:.4f}  {catalogue.title(item)}{hit}")

    ours, popular = results[-1]["HR@10"], trainer.baselines["popularity"]["HR@10"]
    print(f"\nHR@10 {ours:.3f}, popularity {popular:.3f}. Curves: {options.output}/curves.png. Next:")
    for command in ("evaluate", "recommend --titles 'item 3' 'item 42'", "export --output out/export"):
        verb, *rest = command.split(" ", 1)
        print(f"    hstu-ext {verb} {options.output} {' '.join(rest)}".rstrip())


if __name__ == "__main__":
    main()
