"""What a run is told, as TOML: frozen dataclasses whose defaults say the types.

Every option is declared once, below, with its default, its help and its limits. A key that is not declared and a value
of another type are errors that name the key, what was expected and what came.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A configuration that cannot be read, with the key, what it must be and what came."""


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help and limits: choices, at_least, above, at_most, below; length of a list."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class DataConfig:
    source: str = option("synthetic", "name of a data set, or a path, as `hstu-ext data` lists them")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "what is handed to the loader besides, by name"}
    )
    holdout: str = option(
        "test",
        "test trains on all events but each user's last, which is the target; validation leaves the last one out "
        "altogether and takes the one before as target",
        choices=("test", "validation"),
    )


@dataclass(frozen=True)
class ModelConfig:
    encoder: str = option("hstu", "the layers", choices=("hstu", "sasrec"))
    dim: int = option(64, "width of embeddings and states", at_least=1)
    num_layers: int = option(2, "layers", at_least=1)
    num_heads: int = option(2, "heads of the attention", at_least=1)
    head_dim: int = option(32, "width of a head's q, k and v", at_least=1, at_most=256)
    ffn_dim: int = option(64, "width of sasrec's feed-forward network", at_least=1)
    max_len: int = option(200, "events of a user that are read, the latest", at_least=1)
    dropout: float = option(0.2, "of embeddings and layers", at_least=0.0, below=1.0)
    attention_alpha: float = option(0.0, "hstu's factor of q . k; 0 is head_dim^-0.5", at_least=0.0)
    bias: str = option(
        "none",
        "hstu's scores get learned terms of the distance of two tokens and of the time between them",
        choices=("none", "position", "time", "time+position"),
    )
    actions: str = option(
        "none", "interleave makes a token of every event's action, after its item", choices=("none", "interleave")
    )
    contexts: tuple[str, ...] = option((), "user features that become tokens before the events, by name")
    item_features: tuple[str, ...] = option((), "side features of the item tower, by name")
    feature_dim: int = option(16, "width of the embedding of an item's category", at_least=1)
    eps: float = option(1e-6, "least norm that an embedding is divided by", above=0.0)


@dataclass(frozen=True)
class LossConfig:
    kind: str = option(
        "sampled",
        "negatives: uniform over the catalogue, the other items of the batch, or all items",
        choices=("sampled", "in_batch", "full"),
    )
    num_negatives: int = option(128, "of every position, for sampled", at_least=1)
    temperature: float = option(0.05, "similarities are divided by it", above=0.0)
    log_q: bool = option(False, "take log frequency^log_q_exponent off the logits")
    log_q_exponent: float = option(0.75, "the exponent", at_least=0.0)
    similarity_threshold: float = option(
        0.0, "for in_batch: an item closer to the positive than this is no negative; 0 for no limit", at_least=0.0
    )
    mask_same_sequence: bool = option(
        False, "for in_batch: the other items of a position's own sequence are no negatives as such"
    )
    supervision: str = option("all", "position i predicts item i + 1: all, or the last", choices=("all", "last"))


@dataclass(frozen=True)
class TrainingConfig:
    epochs: int = option(20, "passes over the users", at_least=0)
    batch_size: int = option(128, "users of a step, over all its micro-batches", at_least=1)
    accumulation: int = option(1, "micro-batches of a step", at_least=1)
    learning_rate: float = option(1e-3, "of AdamW, at its highest", above=0.0)
    betas: tuple[float, float] = option((0.9, 0.98), "of AdamW", at_least=0.0, below=1.0, length=2)
    weight_decay: float = option(0.0, "of AdamW", at_least=0.0)
    window: str = option(
        "latest",
        "of users with more than model.max_len events: the latest, or in every epoch as many from a random place on",
        choices=("latest", "random"),
    )
    warmup_steps: int = option(0, "steps over which the learning rate rises", at_least=0)
    schedule: str = option(
        "constant", "the learning rate after that, down to 0 for cosine", choices=("constant", "cosine")
    )
    clip_norm: float = option(0.0, "most norm of the gradients; 0 for no limit", at_least=0.0)
    device: str = option("auto", "auto is cuda where there is a GPU, else cpu")
    precision: str = option("fp32", "bf16 is autocast, with fp32 parameters", choices=("fp32", "bf16"))
    tf32: bool = option(False, "let fp32 matrix products of a GPU round to TF32")
    cuda_graphs: str = option(
        "auto",
        "launch a step as one CUDA graph; not for in_batch, accumulation and recompute; auto is on where it can be",
        choices=("auto", "on", "off"),
    )
    compile: str = option(
        "auto", "torch.compile of the loss; auto is on for a GPU without CUDA graphs", choices=("auto", "on", "off")
    )
    recompute: bool = option(False, "run each layer again in the backward instead of keeping its activations")
    seed: int = option(0, "of parameters, batches, dropout and negatives", at_least=0)


@dataclass(frozen=True)
class EvaluationConfig:
    ks: tuple[int, ...] = option((1, 10, 50), "the K of HR@K and NDCG@K", at_least=1)
    depth: int = option(1000, "items that are retrieved for a user; MRR counts nothing past it", at_least=1)
    batch_size: int = option(256, "users at a time", at_least=1)
    device: str = option(
        "auto",
        "where items are ranked; auto is the model's device if topk_dot has a kernel for it, else cpu",
        choices=("auto", "cpu", "cuda"),
    )
    every: int = option(1, "epochs between evaluations; the last epoch always is; 0 for that one alone", at_least=0)


@dataclass(frozen=True)
class OutputConfig:
    log_every: int = option(50, "steps between lines of metrics.jsonl; 0 for epochs alone", at_least=0)
    checkpoint_every: int = option(1, "epochs between checkpoints; the last epoch always is one", at_least=0)
    checkpoint_steps: int = option(0, "steps between checkpoints within an epoch; 0 for none", at_least=0)
    tensorboard: str = option("auto", "auto writes where it is installed", choices=("auto", "on", "off"))
    report: bool = option(True, "write curves.png and report.md at the end; needs matplotlib")


@dataclass(frozen=True)
class Config:
    """A run: where its data come from, the model, the loss, how it trains, how it is evaluated, what is written."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """The defaults with these values, {"model": {"dim": 32}}, in their place."""
        sections = {section.name: section.default_factory for section in dataclasses.fields(Config)}
        read: dict[str, Any] = {}
        for name, given in values.items():
            if name not in sections:
                raise ConfigError(f"hstu_ext.config: {name} must be one of {', '.join(sections)}")
            if not isinstance(given, Mapping):
                raise ConfigError(f"hstu_ext.config: {name} must be a table, got {_shown(given)}")
            read[name] = _read_section(name, sections[name], given)  # type: ignore[arg-type]
        config = Config(**read)
        _check_together(config)
        return config

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """A file from which load_config reads this configuration."""
        lines: list[str] = []
        for name, section in self.to_dict().items():
            lines += ["", f"[{name}]"]
            tables = {key: value for key, value in section.items() if isinstance(value, dict)}
            lines += [f"{key} = {_toml(value)}" for key, value in section.items() if key not in tables]
            for key, table in tables.items():
                lines += ["", f"[{name}.{key}]"] + [
                    f"{_toml(inner)} = {_toml(value)}" for inner, value in table.items()
                ]
        return "\n".join(lines[1:]) + "\n"


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and then overrides of the form "model.num_layers=8".

    Args:
        path: None for the defaults.
        overrides: the value is read as TOML, and as a string where it is none.

    Raises:
        ConfigError: the file is missing or no TOML, or an option is not as declared.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"hstu_ext.config: {path} must be a readable file: {error.strerror}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"hstu_ext.config: {path} must be TOML: {error}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        *tables, name = key.strip().split(".")
        if not equals or not tables or not all(tables) or not name:
            raise ConfigError(f"hstu_ext.config: an override must be section.key=value, got {override!r}")
        target = values
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise ConfigError(f"hstu_ext.config: {table} must be a table for the override {override!r}")
        target[name] = _value(text.strip())
    return Config.from_dict(values)


def reference() -> Iterator[tuple[str, Any, str]]:
    """Key, default and help of every option, in order, with the limits in words."""
    for section in dataclasses.fields(Config):
        for each in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            default = _default(each)
            limits = _limits(each.metadata)
            yield f"{section.name}.{each.name}", default, each.metadata["help"] + (f" ({limits})" if limits else "")


def _default(field: dataclasses.Field[Any]) -> Any:
    return {} if field.default is dataclasses.MISSING else field.default


def _read_section(section: str, kind: type, given: Mapping[str, Any]) -> Any:
    fields = {each.name: each for each in dataclasses.fields(kind)}
    read: dict[str, Any] = {}
    for key, value in given.items():
        if key not in fields:
            raise ConfigError(f"hstu_ext.config: {section}.{key} is not an option; {section} has {', '.join(fields)}")
        read[key] = _read(f"{section}.{key}", fields[key], value)
    return kind(**read)


def _read(key: str, field: dataclasses.Field[Any], value: Any) -> Any:
    default = _default(field)
    expected = _expected(field, default)
    if isinstance(default, tuple):
        # The type of elements is that of the default's, and text where the default has none.
        element = default[0] if default else ""
        if not isinstance(value, (list, tuple)) or len(value) != field.metadata.get("length", len(value)):
            raise ConfigError(f"hstu_ext.config: {key} must be {expected}, got {_shown(value)}")
        return tuple(_read_scalar(key, expected, element, field.metadata, each) for each in value)
    return _read_scalar(key, expected, default, field.metadata, value)


def _read_scalar(key: str, expected: str, default: Any, metadata: Mapping[str, Any], value: Any) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    inside = type(value) is type(default)
    inside = inside and value in metadata.get("choices", (value,))
    if inside and isinstance(value, (int, float)):
        inside = (
            math.isfinite(value)
            and value >= metadata.get("at_least", value)
            and value <= metadata.get("at_most", value)
            and ("above" not in metadata or value > metadata["above"])
            and ("below" not in metadata or value < metadata["below"])
        )
    if not inside:
        raise ConfigError(f"hstu_ext.config: {key} must be {expected}, got {_shown(value)}")
    return value


_NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a table"}


def _expected(field: dataclasses.Field[Any], default: Any) -> str:
    limits = _limits(field.metadata)
    if isinstance(default, tuple):
        noun = {int: "integers", float: "numbers", str: "texts"}[type(default[0]) if default else str]
        count = f"{field.metadata['length']} " if "length" in field.metadata else ""
        return f"a list of {count}{noun}" + (f", each {limits}" if limits else "")
    if "choices" in field.metadata:
        return limits
    return _NOUNS[type(default)] + (f" {limits}" if limits else "")


def _limits(metadata: Mapping[str, Any]) -> str:
    if "choices" in metadata:
        return "one of " + ", ".join(metadata["choices"])
    words = {"at_least": "of at least", "above": "above", "at_most": "at most", "below": "below"}
    return " and ".join(f"{text} {metadata[name]:g}" for name, text in words.items() if name in metadata)


def _check_together(config: Config) -> None:
    """What depends on two options."""
    training, loss = config.training, config.loss
    if config.model.bias != "none" and config.model.encoder != "hstu":
        raise ConfigError(
            f"hstu_ext.config: model.bias must be none for model.encoder = {config.model.encoder}, "
            f"got {config.model.bias!r}"
        )
    for key, off, given in (
        ("similarity_threshold", "0", loss.similarity_threshold),
        ("mask_same_sequence", "false", loss.mask_same_sequence),
    ):
        if given and loss.kind != "in_batch":
            raise ConfigError(
                f"hstu_ext.config: loss.{key} must be {off} for loss.kind = {loss.kind}, got {json.dumps(given)}"
            )
    if training.cuda_graphs == "on":
        for key, wanted, got in (
            ("loss.kind", "sampled or full", "in_batch" if config.loss.kind == "in_batch" else None),
            ("training.accumulation", "1", training.accumulation if training.accumulation > 1 else None),
            ("training.recompute", "false", "true" if training.recompute else None),
        ):
            if got is not None:
                raise ConfigError(f"hstu_ext.config: {key} must be {wanted} for training.cuda_graphs = on, got {got}")
    if training.batch_size % training.accumulation:
        raise ConfigError(
            f"hstu_ext.config: training.batch_size must be a multiple of training.accumulation "
            f"({training.accumulation}), got {training.batch_size}"
        )
    if not config.evaluation.ks:
        raise ConfigError("hstu_ext.config: evaluation.ks must be a list of at least one integer, got []")
    if config.evaluation.depth < max(config.evaluation.ks):
        raise ConfigError(
            f"hstu_ext.config: evaluation.depth must be at least the largest of evaluation.ks "
            f"({max(config.evaluation.ks)}), got {config.evaluation.depth}"
        )


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _toml(value: Any) -> str:
    """JSON text of a string, number, boolean or list of them is TOML as well."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
