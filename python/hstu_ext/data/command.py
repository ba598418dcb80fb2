"""hstu-ext data: download, describe and convert data sets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hstu_ext.data.describe import describe
from hstu_ext.data.download import DATASETS, download
from hstu_ext.data.errors import DataError
from hstu_ext.data.events import Duplicates
from hstu_ext.data.files import expand
from hstu_ext.data.interactions import ROLES
from hstu_ext.data.load import load
from hstu_ext.data.sequences import write_sequences


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds `data` to the subparsers of a command; `run` takes what they parse."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "data",
        help="download, describe and convert data sets",
        description="Downloads, describes and converts data sets.",
    )
    actions = parser.add_subparsers(dest="data_action", required=True, metavar="ACTION")

    fetch = actions.add_parser("download", help="fetch an official MovieLens archive and check it")
    fetch.add_argument("name", choices=sorted(DATASETS))
    fetch.add_argument("--to", type=Path, default=Path("data"), metavar="DIR", help="folder for NAME.zip (data)")

    info = actions.add_parser("info", help="print what is in a data set")
    _add_source(info)

    convert = actions.add_parser("convert", help="write a data set as a CSV of sequences")
    _add_source(convert)
    convert.add_argument("output", metavar="OUT", help="a path that ends in .csv or .csv.gz")
    parser.set_defaults(run=run)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="PATH", help="synthetic, or a file, folder or archive")
    parser.add_argument(
        "--columns",
        type=_columns,
        metavar="ROLE=NAME,...",
        help=f"columns of a file with one event a row, such as user=uid,item=sku; roles are {', '.join(ROLES)}",
    )
    parser.add_argument("--duplicates", choices=("keep", "drop"), default="keep")


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(role in ROLES and name for role, _, name in pairs):
        raise argparse.ArgumentTypeError(f"must be ROLE=NAME,... with roles {', '.join(ROLES)}, got {text!r}")
    return {role: name for role, _, name in pairs}


def run(args: argparse.Namespace) -> int:
    """Does what was asked and returns the exit code; an error goes to stderr."""
    try:
        if args.data_action == "download":
            print(download(args.name, args.to))
        elif args.data_action == "info":
            print(describe(_load(args)))
        else:
            _convert(args)
    except (DataError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _load(args: argparse.Namespace) -> Any:
    duplicates: Duplicates = args.duplicates
    return load(args.source, columns=args.columns, duplicates=duplicates)


def _convert(args: argparse.Namespace) -> None:
    output = expand(args.output)
    if not output.name.endswith((".csv", ".csv.gz")):
        raise DataError(f"hstu_ext.data: OUT must end in .csv or .csv.gz, got {args.output!r}")
    log = _load(args)
    write_sequences(log, output)
    print(f"{output}: {log.num_users} users, {len(log)} events")


def main(argv: Sequence[str] | None = None) -> int:
    """The data command on its own: main(["data", "info", "synthetic"])."""
    parser = argparse.ArgumentParser(prog="hstu-ext")
    add_parser(parser.add_subparsers(required=True, metavar="COMMAND"))
    return run(parser.parse_args(argv))
