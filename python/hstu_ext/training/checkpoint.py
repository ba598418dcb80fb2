"""Checkpoints: everything that a run needs to go on, and a model to be used again, without pickle.

<run>/checkpoints/step-00000500/
    model.safetensors       parameters and buffers
    config.toml             the configuration
    catalogue.json          item ids and titles, sizes of what is embedded
    catalogue.safetensors   events of every item in the training data, side features
    training.json           epoch, step, the batch iterator, the results so far
    training.safetensors    state of the optimizer and of the random generators
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_ext.models import Catalogue, RetrievalGR
from hstu_ext.training.config import Config, load_config

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, or not of this model."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors of any device as one safetensors file."""
    _safetensors().save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU."""
    try:
        tensors: dict[str, Tensor] = _safetensors().load_file(str(path))
    except Exception as error:
        raise CheckpointError(f"hstu_ext.checkpoint: {path} must be a safetensors file: {error}") from None
    return tensors


def save_model(directory: Path, model: RetrievalGR, config: Config, catalogue: Catalogue) -> None:
    """Writes what load_model reads into a directory that exists."""
    save_tensors(model.state_dict(), directory / "model.safetensors")
    (directory / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    described = {
        "format": FORMAT,
        "item_ids": list(catalogue.item_ids),
        "item_titles": None if catalogue.item_titles is None else list(catalogue.item_titles),
        "user_feature_sizes": catalogue.user_feature_sizes,
        "action_names": list(catalogue.action_names),
        "has_times": catalogue.has_times,
    }
    (directory / "catalogue.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    features = {f"features.{name}": values for name, values in catalogue.item_features.items()}
    save_tensors({"counts": catalogue.counts, **features}, directory / "catalogue.safetensors")


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[RetrievalGR, Config, Catalogue]:
    """The model of a checkpoint, of the latest one of a run, or of an export, in eval mode.

    Raises:
        CheckpointError: there is none at this path, or it cannot be read.
        ImportError: safetensors is not installed.
    """
    directory = find_checkpoint(path)
    config = load_config(directory / "config.toml")
    described = _read_json(directory / "catalogue.json")
    if described.get("format") != FORMAT:
        raise CheckpointError(
            f"hstu_ext.checkpoint: {directory} must be of format {FORMAT}, got {described.get('format')}"
        )
    tensors = load_tensors(directory / "catalogue.safetensors")
    prefix = "features."
    catalogue = Catalogue(
        described["item_ids"],
        tensors["counts"],
        described["item_titles"],
        {name[len(prefix) :]: values for name, values in tensors.items() if name.startswith(prefix)},
        described["user_feature_sizes"],
        described["action_names"],
        described.get("has_times", False),
    )
    model = RetrievalGR.from_config(config, catalogue)
    load_parameters(model, directory)
    return model.to(device).eval(), config, catalogue


def load_parameters(model: RetrievalGR, directory: Path) -> None:
    """Parameters and buffers of a checkpoint into a model of the same shape."""
    try:
        model.load_state_dict(load_tensors(directory / "model.safetensors"))
    except RuntimeError as error:
        raise CheckpointError(f"hstu_ext.checkpoint: {directory} must hold this model: {error}") from None


def save_checkpoint(
    run: Path,
    step: int,
    model: RetrievalGR,
    config: Config,
    catalogue: Catalogue,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Writes a checkpoint next to the earlier ones and then removes those: at any moment one is whole.

    Args:
        run: the directory of the run.
        step: steps done.
        progress: what JSON can hold, for load_checkpoint.
        tensors: the same for tensors.
    """
    directory = run / "checkpoints" / f"step-{step:08d}"
    unfinished = directory.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_model(unfinished, model, config, catalogue)
    (unfinished / "training.json").write_text(json.dumps(progress, ensure_ascii=False), encoding="utf-8")
    state = {f"tensors.{name}": value for name, value in tensors.items()}
    state["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            state[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    save_tensors(state, unfinished / "training.safetensors")
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)
    for other in _checkpoints(run):
        if other != directory:
            shutil.rmtree(other)
    return directory


def load_checkpoint(
    directory: Path, model: RetrievalGR, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Puts model, optimizer and random generators where a checkpoint left them; returns its progress and tensors."""
    load_parameters(model, directory)
    state = load_tensors(directory / "training.safetensors")
    moments: dict[int, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        kind, _, name = key.partition(".")
        if kind == "optimizer":
            index, _, name = name.partition(".")
            moments.setdefault(int(index), {})[name] = value
        elif kind == "tensors":
            tensors[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng.cuda"])
    return _read_json(directory / "training.json"), tensors


def find_checkpoint(path: str | Path) -> Path:
    """The directory itself where it holds a model, else the latest checkpoint of the run.

    Raises:
        CheckpointError: neither.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file():
        return path
    found = _checkpoints(path)
    if not found:
        raise CheckpointError(f"hstu_ext.checkpoint: {path} must be a run or a checkpoint, found no model there")
    return found[-1]


def _checkpoints(run: Path) -> list[Path]:
    directories = (run / "checkpoints").glob("step-*")
    return sorted(each for each in directories if re.fullmatch(r"step-\d+", each.name) and each.is_dir())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"hstu_ext.checkpoint: {path} must be a readable JSON file: {error}") from None
    return values


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "hstu_ext.checkpoint: safetensors must be installed to read and write checkpoints: "
            "pip install 'hstu_ext[train]'"
        ) from None
    return safetensors.torch
