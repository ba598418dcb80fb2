"""The end of a run in a picture and a page."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hstu_ext.models import Catalogue
from hstu_ext.training.config import Config


def check_report() -> None:
    """Raises ImportError where the report could not be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "hstu_ext.training: matplotlib must be installed for the report: pip install 'hstu_ext[train]', or set "
            "output.report=false"
        )


def write_report(
    run: Path,
    config: Config,
    catalogue: Catalogue,
    results: Sequence[dict[str, float]],
    baselines: dict[str, dict[str, float]],
) -> Path:
    """Writes curves.png and report.md into the directory of the run and returns the page's path."""
    evaluated = [result for result in results if "MRR" in result]
    k = 10 if 10 in config.evaluation.ks else config.evaluation.ks[-1]
    _draw(run / "curves.png", results, evaluated, baselines["popularity"][f"HR@{k}"], k)

    columns = [*(f"HR@{k}" for k in config.evaluation.ks), *(f"NDCG@{k}" for k in config.evaluation.ks), "MRR"]
    rows = [(f"{config.model.encoder}, epoch {evaluated[-1]['epoch']}", evaluated[-1])] if evaluated else []
    rows += list(baselines.items())
    seconds = sum(result["seconds"] for result in results)
    lines = [
        f"# {run.name}",
        "",
        f"{config.data.source}: {catalogue.num_items} items, {int(catalogue.counts.sum())} training events. "
        f"{len(results)} epochs in {seconds:.0f} s. Held-out events ({config.data.holdout}) are ranked among the full "
        "catalogue, seen items removed.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {name} | " + " | ".join(f"{values[column]:.4f}" for column in columns) + " |" for name, values in rows),
        "",
        f"![loss and HR@{k} by epoch](curves.png)",
        "",
        "## Configuration",
        "",
        *("    " + line if line else "" for line in config.to_toml().splitlines()),
    ]
    page = run / "report.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _draw(
    path: Path,
    results: Sequence[dict[str, float]],
    evaluated: Sequence[dict[str, float]],
    popularity: float,
    k: int,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([result["epoch"] for result in results], [result["loss"] for result in results], marker=".")
    left.set_ylabel("training loss")
    epochs = [result["epoch"] for result in evaluated]
    right.plot(epochs, [result[f"HR@{k}"] for result in evaluated], marker=".", label="model")
    right.axhline(popularity, color="gray", linestyle="--", label="popularity")
    right.set_ylabel(f"HR@{k}")
    right.set_ylim(bottom=0)
    right.legend()
    for panel in (left, right):
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
