"""Configurations: what is read, and what bad ones are told."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hstu_ext.training import Config, ConfigError, load_config
from hstu_ext.training.config import reference

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*/*.toml"))


def test_defaults_and_overrides(tmp_path: Path) -> None:
    assert load_config() == Config()
    path = tmp_path / "a.toml"
    path.write_text('[model]\nnum_layers = 3\ncontexts = ["age"]\n[training]\nlearning_rate = 1\n', encoding="utf-8")
    config = load_config(path, ["model.num_layers=8", "loss.kind=full", "data.options.seed=4", "evaluation.ks=[5, 20]"])
    assert config.model.num_layers == 8
    assert config.model.contexts == ("age",)
    assert config.loss.kind == "full"
    assert config.data.options == {"seed": 4}
    assert config.evaluation.ks == (5, 20)
    assert config.training.learning_rate == 1.0
    assert isinstance(config.training.learning_rate, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.num_layers = 2  # type: ignore[misc]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configurations_are_read(path: Path) -> None:
    config = load_config(path)
    assert config.data.source == "synthetic" or config.data.source.endswith(path.parent.name)


def test_every_shipped_configuration_is_there() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in SHIPPED}
    assert {"ml-1m/sasrec", "ml-1m/hstu", "ml-1m/hstu-large", "ml-1m/best"} <= names
    assert {"ml-100k/hstu", "synthetic/hstu"} <= names


def test_a_configuration_survives_its_own_toml(tmp_path: Path) -> None:
    source = 'a "quoted"\\path\nü'
    config = Config.from_dict(
        {
            "data": {"source": source, "options": {"seed": 3, "odd key": "x"}},
            "model": {"contexts": ["age", "sex"], "eps": 1e-9},
            "training": {"betas": [0.5, 0.75], "compile": "off", "tf32": True},
        }
    )
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(path) == config


BAD = {
    "section": ({"modle": {}}, "hstu_ext.config: modle must be one of data, model, loss, training, evaluation, output"),
    "table": ({"model": 3}, "hstu_ext.config: model must be a table, got 3 (int)"),
    "key": ({"loss": {"temprature": 1.0}}, "hstu_ext.config: loss.temprature is not an option; loss has kind, num_neg"),
    "int": ({"model": {"num_layers": 2.5}}, "model.num_layers must be an integer of at least 1, got 2.5 (float)"),
    "bool": ({"model": {"num_layers": True}}, "model.num_layers must be an integer of at least 1, got True (bool)"),
    "text": ({"model": {"dim": "64"}}, "model.dim must be an integer of at least 1, got '64' (str)"),
    "low": ({"training": {"batch_size": 0}}, "training.batch_size must be an integer of at least 1, got 0 (int)"),
    "zero": ({"loss": {"temperature": 0}}, "loss.temperature must be a number above 0, got 0.0 (float)"),
    "high": ({"model": {"dropout": 1.0}}, "model.dropout must be a number of at least 0 and below 1, got 1.0 (float)"),
    "nan": ({"training": {"clip_norm": float("nan")}}, "training.clip_norm must be a number of at least 0, got nan"),
    "choice": ({"model": {"encoder": "gru"}}, "model.encoder must be one of hstu, sasrec, got 'gru' (str)"),
    "flag": ({"training": {"tf32": 1}}, "training.tf32 must be true or false, got 1 (int)"),
    "list": ({"evaluation": {"ks": 10}}, "evaluation.ks must be a list of integers, each of at least 1, got 10 (int)"),
    "element": ({"evaluation": {"ks": [10, 0]}}, "evaluation.ks must be a list of integers, each of at least 1, got 0"),
    "none": ({"evaluation": {"ks": []}}, "evaluation.ks must be a list of at least one integer, got []"),
    "names": ({"model": {"contexts": [1]}}, "model.contexts must be a list of texts, got 1 (int)"),
    "betas": (
        {"training": {"betas": [0.9]}},
        "training.betas must be a list of 2 numbers, each of at least 0 and below 1",
    ),
    "options": ({"data": {"options": 1}}, "data.options must be a table, got 1 (int)"),
    "graphs": (
        {"loss": {"kind": "in_batch"}, "training": {"cuda_graphs": "on"}},
        "loss.kind must be sampled or full for training.cuda_graphs = on, got in_batch",
    ),
    "graphs of parts": (
        {"training": {"cuda_graphs": "on", "accumulation": 4}},
        "training.accumulation must be 1 for training.cuda_graphs = on, got 4",
    ),
    "accumulation": (
        {"training": {"batch_size": 10, "accumulation": 3}},
        "training.batch_size must be a multiple of training.accumulation (3), got 10",
    ),
    "bias": (
        {"model": {"bias": "time", "encoder": "sasrec"}},
        "model.bias must be none for model.encoder = sasrec, got 'time'",
    ),
    "threshold": (
        {"loss": {"similarity_threshold": 0.9}},
        "loss.similarity_threshold must be 0 for loss.kind = sampled, got 0.9",
    ),
    "same sequence": (
        {"loss": {"kind": "full", "mask_same_sequence": True}},
        "loss.mask_same_sequence must be false for loss.kind = full, got true",
    ),
    "depth": (
        {"evaluation": {"depth": 20}},
        "evaluation.depth must be at least the largest of evaluation.ks (50), got 20",
    ),
}


@pytest.mark.parametrize(("values", "text"), BAD.values(), ids=BAD)
def test_bad_configurations(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        Config.from_dict(values)


def test_bad_files_and_overrides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml must be a readable file: No such file"):
        load_config(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken.toml must be TOML: "):
        load_config(broken)
    for override in ("num_layers=3", "model.dim", ".dim=3", "model.=3"):
        with pytest.raises(ConfigError, match=r"an override must be section.key=value, got"):
            load_config(None, [override])
    with pytest.raises(ConfigError, match=r"model.dim must be an integer of at least 1, got 'wide' \(str\)"):
        load_config(None, ["model.dim=wide"])


def test_reference_lists_every_option() -> None:
    listed = {key: (default, help) for key, default, help in reference()}
    values = Config().to_dict()
    assert list(listed) == [f"{section}.{key}" for section, options in values.items() for key in options]
    for key, (default, help) in listed.items():
        section, name = key.split(".")
        assert values[section][name] == default
        assert len(help) > 5
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for key, (_, help) in listed.items():
        assert f"| `{key}` |" in page, f"docs/training.md has no row for {key}"
        assert help in page, f"docs/training.md has another text for {key} than {help!r}"
