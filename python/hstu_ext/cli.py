"""hstu-ext: train, evaluate, query and export retrieval models from the command line."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import hstu_ext
from hstu_ext.data import InteractionLog, Split, command, leave_one_out, load
from hstu_ext.models import Catalogue, RetrievalGR
from hstu_ext.training.checkpoint import find_checkpoint, load_model
from hstu_ext.training.config import Config, load_config, reference
from hstu_ext.training.evaluation import Evaluator, autocast_of, choose_device
from hstu_ext.training.export import export
from hstu_ext.training.metrics_log import table
from hstu_ext.training.trainer import Trainer


class UsageError(ValueError):
    """Arguments that do not fit the model or its data."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; errors of the user's making are one line on stderr."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return run(options) or 0
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError, hstu_ext.MissingKernelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-ext", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hstu_ext {hstu_ext.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model", description="Trains a model and writes a run.")
    train.add_argument("config", nargs="?", type=Path, help="TOML file; not needed with --resume")
    train.add_argument("--output", type=Path, metavar="RUN", help="directory of the run (runs/NAME OF THE FILE)")
    train.add_argument("--resume", action="store_true", help="go on from the latest checkpoint of --output")
    _add_common(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate", help="rank the held-out items", description="Ranks every user's held-out item."
    )
    evaluate.add_argument("model", type=Path, metavar="RUN", help="a run or a checkpoint")
    evaluate.add_argument("--json", action="store_true", help="print the numbers as JSON")
    _add_common(evaluate)
    evaluate.set_defaults(run=_evaluate)

    recommend = commands.add_parser(
        "recommend",
        help="recommend items",
        description="Prints what a model recommends after some items, or to a user of its data.",
    )
    recommend.add_argument("model", type=Path, metavar="RUN", help="a run, a checkpoint or an export")
    history = recommend.add_mutually_exclusive_group(required=True)
    history.add_argument("--items", nargs="+", metavar="ID", help="item ids of the data, oldest first")
    history.add_argument("--titles", nargs="+", metavar="TITLE", help="titles or unmistakable parts of them")
    history.add_argument("--user", metavar="ID", help="a user of the data that the model was trained on")
    recommend.add_argument("--actions", nargs="+", metavar="NAME", help="of each item, for a model with actions")
    recommend.add_argument("--times", nargs="+", type=int, metavar="T", help="of each item, for a model with times")
    recommend.add_argument("-k", type=int, default=10, help="items to recommend (10)")
    recommend.add_argument("--include-seen", action="store_true", help="recommend seen items as well")
    _add_common(recommend)
    recommend.set_defaults(run=_recommend)

    exporting = commands.add_parser(
        "export",
        help="write item vectors and the query encoder",
        description="Writes items.npy, items.faiss, item_ids.json and the query encoder.",
    )
    exporting.add_argument("model", type=Path, metavar="RUN", help="a run or a checkpoint")
    exporting.add_argument("--output", type=Path, required=True, metavar="DIR")
    exporting.add_argument("--faiss", choices=("auto", "on", "off"), default="auto", help="auto: where it is installed")
    exporting.set_defaults(run=_export)

    command.add_parser(commands)

    info = commands.add_parser("info", help="describe the installation, or a model", description="Describes the build.")
    info.add_argument("model", nargs="?", type=Path, metavar="RUN", help="a run or a checkpoint to describe")
    info.add_argument("--options", action="store_true", help="list every option of the configuration")
    info.set_defaults(run=_info)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override an option; may be repeated"
    )


def _train(options: argparse.Namespace) -> None:
    run: Path | None = options.output
    source: Path | None = options.config
    if options.resume:
        if run is None:
            raise UsageError("hstu_ext.train: --output must be given with --resume")
        source = source or find_checkpoint(run) / "config.toml"
    if source is None:
        raise UsageError("hstu_ext.train: a configuration must be given, such as configs/synthetic/hstu.toml")
    run = run or Path("runs") / source.stem
    config = load_config(source, options.set)
    trainer = Trainer(config, _load_data(config), run)
    trainer.fit(resume=options.resume)


def _evaluate(options: argparse.Namespace) -> None:
    model, config, catalogue = _load_model(options)
    device = choose_device("training.device", config.training.device)
    split = _split(config, catalogue)
    evaluator = Evaluator(split, config.evaluation, config.model.max_len, device)
    autocast = autocast_of(config.training.precision, device)
    results = {config.model.encoder: evaluator(model.to(device), autocast), **evaluator.baselines()}
    if options.json:
        print(json.dumps(results, indent=2))
        return
    columns = list(next(iter(results.values())))
    print(f"{split.targets.numel()} users, {catalogue.num_items} items, {config.data.holdout}")
    print(table(columns, [(name, list(values.values())) for name, values in results.items()]))


def _recommend(options: argparse.Namespace) -> None:
    model, config, catalogue = _load_model(options)
    actions: list[int] | None = None
    times: list[int] | None = None
    contexts = [0] * (0 if model.contexts is None else len(model.contexts.names))  # 0 is an unknown value
    if options.user is not None:
        log = _matching(_load_data(config), catalogue).user(options.user)
        history = log.items.tolist()
        if model.actions is not None and log.actions is not None:
            actions = log.actions.tolist()
        if model.encoder.uses_times and log.timestamps is not None:
            times = log.timestamps.tolist()
        if model.contexts is not None:
            contexts = [int(log.user_features[name][0]) for name in model.contexts.names]
    elif options.items is not None:
        history = [_item_by_id(catalogue, each) for each in options.items]
    else:
        history = [_item_by_title(catalogue, each) for each in options.titles]
    if model.actions is not None and actions is None:
        actions = _actions_by_name(catalogue, options.actions, len(history))
    if model.encoder.uses_times and times is None:
        times = options.times
        if times is None or len(times) != len(history):
            raise UsageError(
                f"hstu_ext.recommend: --times must be {len(history)} integers, one for each item, "
                f"got {' '.join(map(str, times)) if times else 'none'}"
            )
    scores, items = model.recommend(
        [history],
        min(options.k, catalogue.num_items),
        actions=None if actions is None else [actions],
        contexts=[contexts] if contexts else None,
        times=None if times is None else [times],
        exclude_seen=not options.include_seen,
    )
    print("after " + ", ".join(catalogue.title(item) for item in history[-5:]))
    for place, (score, item) in enumerate(zip(scores[0].tolist(), items[0].tolist()), start=1):
        if item >= 0:
            print(f"{place:>4}. {score:7.4f}  {catalogue.item_ids[item]:>8}  {catalogue.title(item)}")


def _export(options: argparse.Namespace) -> None:
    model, config, catalogue = load_model(options.model)
    for path in export(options.output, model, config, catalogue, options.faiss):
        print(path)


def _info(options: argparse.Namespace) -> None:
    if options.options:
        for key, default, help in reference():
            print(f"{key} = {json.dumps(default)}\n    {help}")
        return
    if options.model is not None:
        model, config, catalogue = load_model(options.model)
        for name, module in model.named_children():
            print(f"{name:<16}{sum(each.numel() for each in module.parameters()):>12} parameters")
        print(
            f"{catalogue.num_items} items, {int(catalogue.counts.sum())} training events\n\n{config.to_toml()}", end=""
        )
        return
    for name, value in hstu_ext.build_info().items():
        print(f"{name:<14}{', '.join(value) if isinstance(value, list) else value}")
    print(f"{'GPU kernels':<14}{len(hstu_ext.cells())}")
    print(f"{'torch':<14}{torch.__version__}")
    print(f"{'GPU':<14}{torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    for package in ("safetensors", "matplotlib", "tensorboard", "faiss-cpu", "pyarrow"):
        print(f"{package:<14}{_version(package)}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _load_data(config: Config) -> InteractionLog:
    return load(config.data.source, **config.data.options)


def _load_model(options: argparse.Namespace) -> tuple[RetrievalGR, Config, Catalogue]:
    """The model of --set's configuration, which may change everything but the model itself."""
    config = load_config(find_checkpoint(options.model) / "config.toml", options.set)
    model, trained, catalogue = load_model(options.model)
    if (config.model, config.loss) != (trained.model, trained.loss):
        raise UsageError("hstu_ext.config: model and loss must be those of the checkpoint, got an override of them")
    return model, config, catalogue


def _split(config: Config, catalogue: Catalogue) -> Split:
    return leave_one_out(_matching(_load_data(config), catalogue), holdout=config.data.holdout)  # type: ignore[arg-type]


def _matching(log: InteractionLog, catalogue: Catalogue) -> InteractionLog:
    """The log, if its items are those that the model was trained on."""
    if list(log.item_ids) != list(catalogue.item_ids):
        raise UsageError(
            f"hstu_ext.data: the data must have the {catalogue.num_items} items that the model was trained on, "
            f"got {log.num_items} that are not the same"
        )
    return log


def _item_by_id(catalogue: Catalogue, item_id: str) -> int:
    try:
        return list(catalogue.item_ids).index(item_id)
    except ValueError:
        raise UsageError(
            f"hstu_ext.recommend: an item must be one of the {catalogue.num_items} ids of the data, got {item_id!r}"
        ) from None


def _item_by_title(catalogue: Catalogue, title: str) -> int:
    """The item of this title, without regard to case, or else the only one that has it in its title."""
    if catalogue.item_titles is None:
        raise UsageError("hstu_ext.recommend: --items must be given for data without titles, got --titles")
    titles = [each.casefold() for each in catalogue.item_titles]
    wanted = title.casefold()
    found = [item for item, each in enumerate(titles) if each == wanted]
    found = found or [item for item, each in enumerate(titles) if wanted in each]
    if len(found) == 1:
        return found[0]
    close = found[:5] or [titles.index(each) for each in difflib.get_close_matches(wanted, titles, 5, 0.4)]
    hint = "; ".join(catalogue.title(item) for item in close) or "nothing like it"
    count = "several titles" if found else "no title"
    raise UsageError(f"hstu_ext.recommend: {title!r} must fit one title, got {count}: {hint}")


def _actions_by_name(catalogue: Catalogue, names: Sequence[str] | None, count: int) -> list[int]:
    known = list(catalogue.action_names)
    if names is None or len(names) != count or any(name not in known for name in names):
        raise UsageError(
            f"hstu_ext.recommend: --actions must be {count} of {', '.join(known)}, one for each item, "
            f"got {' '.join(names) if names else 'none'}"
        )
    return [known.index(name) for name in names]


if __name__ == "__main__":
    sys.exit(main())
