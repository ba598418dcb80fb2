"""Writes the kernel instances of a build: one small .cu file per cell of the manifest and one dispatch table.

generate.py --list --set ci            print the names of a set's cells
generate.py --count                    print how many cells each set has
generate.py --out DIR --set default    write the files into DIR and print their paths
generate.py --check [--out DIR]        verify the manifest, and that DIR holds exactly what would be written

--families sm80 leaves the cells of the other families out.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
SETS = ("ci", "default", "full")  # each holds the ones before it
LEGAL: dict[str, tuple[str | int, ...]] = {
    "op": ("attn",),
    "direction": ("fwd", "bwd"),
    "arch": ("sm80", "sm90"),
    "dtype": ("bf16", "fp16"),
    "head_dim": (32, 64, 128, 256),
    "mask": ("window", "target", "interval"),
    "bias": ("none", "rab", "relative"),
}
# What sm90 has; sm80 serves the rest, on Hopper too.
SM90_MASKS, SM90_BIASES = ("window", "target"), ("none", "relative")
SM90_RELATIVE: dict[str, tuple[int, ...]] = {"fwd": (64, 128), "bwd": (64, 128)}  # head dimensions
ELEMENTS = {"bf16": "bf16", "fp16": "fp16"}
DTYPES = {"bf16": "DType::kBFloat16", "fp16": "DType::kFloat16"}


class ManifestError(ValueError):
    """The manifest names something that cannot be built."""


@dataclass(frozen=True)
class Cell:
    """One compiled kernel. Its name is the file name, the symbol, the test id and the benchmark key."""

    op: str
    direction: str
    arch: str
    dtype: str
    head_dim: int
    mask: str
    bias: str

    @property
    def name(self) -> str:
        suffix = "" if self.bias == "none" else f"_{self.bias}"
        return f"{self.op}_{self.direction}_{self.arch}_{self.dtype}_d{self.head_dim}_{self.mask}{suffix}"

    @property
    def file_name(self) -> str:
        return f"{self.name}.cu"

    @property
    def params(self) -> str:
        return "Params" if self.direction == "fwd" else "BackwardParams"

    @property
    def source(self) -> str:
        """The text of the instance."""
        header = "forward" if self.direction == "fwd" else "backward"
        element = ELEMENTS[self.dtype]
        return _template("attention.cu.in").substitute(
            arch=self.arch,
            header=header,
            symbol=self.name,
            params=self.params,
            run=f"run_{header}",
            element=element,
            head_dim=self.head_dim,
            mask=f"{self.mask.capitalize()}Mask",
            bias={"none": "NoBias", "rab": f"RabBias<{element}>", "relative": "RelativeBias<float>"}[self.bias],
        )

    @property
    def declaration(self) -> str:
        return f"void {self.name}(const {self.params}& p, void* stream);"

    @property
    def row(self) -> str:
        """This cell in the dispatch table, as hstu::attention::Cell."""
        forward, backward = (self.name, "nullptr") if self.direction == "fwd" else ("nullptr", self.name)
        return (
            f'        {{"{self.name}", Arch::k{self.arch.capitalize()}, {DTYPES[self.dtype]}, {self.head_dim}, '
            f"MaskKind::k{self.mask.capitalize()}, BiasKind::k{self.bias.capitalize()}, {forward}, {backward}}},"
        )


def _template(name: str) -> Template:
    return Template((HERE / "templates" / name).read_text(encoding="utf-8"))


def _cells_of_entry(entry: dict[str, Any]) -> Iterator[Cell]:
    names = [field.name for field in fields(Cell)]
    if sorted(entry) != sorted(names):
        raise ManifestError(f"an entry must have exactly the keys {names}, got {sorted(entry)}")
    lists = [entry[name] if isinstance(entry[name], list) else [entry[name]] for name in names]
    for name, values in zip(names, lists):
        for value in values:
            if value not in LEGAL[name]:
                raise ManifestError(f"{name} must be one of {LEGAL[name]}, got {value!r}")
    for values in itertools.product(*lists):
        cell = Cell(*values)
        if cell.arch == "sm90" and (cell.mask not in SM90_MASKS or cell.bias not in SM90_BIASES):
            raise ManifestError(f"sm90 has the masks {SM90_MASKS} and the biases {SM90_BIASES}, got {cell.name}")
        if cell.arch == "sm90" and cell.bias == "relative" and cell.head_dim not in SM90_RELATIVE[cell.direction]:
            dims = SM90_RELATIVE[cell.direction]
            raise ManifestError(f"sm90 has a relative {cell.direction} for the head dimensions {dims}, got {cell.name}")
        yield cell


def load(manifest: Path = HERE / "manifest.toml") -> dict[str, list[Cell]]:
    """The cells of every set, in manifest order. Raises ManifestError."""
    with manifest.open("rb") as file:
        content = tomllib.load(file)
    if unknown := set(content) - set(SETS):
        raise ManifestError(f"sets must be among {SETS}, got {sorted(unknown)}")
    sets: dict[str, list[Cell]] = {}
    cells: dict[Cell, None] = {}
    for name in SETS:
        own = [cell for entry in content.get(name, []) for cell in _cells_of_entry(entry)]
        if twice := {cell.name for cell in own if own.count(cell) > 1}:
            raise ManifestError(f"set {name} lists cells twice: {sorted(twice)}")
        cells.update(dict.fromkeys(own))
        sets[name] = list(cells)
    return sets


def render(cells: list[Cell]) -> dict[str, str]:
    """File name -> text of everything that a build of these cells compiles."""
    files = {cell.file_name: cell.source for cell in cells}
    files["dispatch.cpp"] = _template("dispatch.cpp.in").substitute(
        declarations="\n".join(cell.declaration for cell in cells), rows="\n".join(cell.row for cell in cells)
    )
    return files


def write(files: dict[str, str], out: Path) -> None:
    """Writes what differs, so that an unchanged file is not compiled again."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = out / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def differences(files: dict[str, str], out: Path) -> list[str]:
    """What in `out` is not as write() would leave it."""
    present = {path.name for path in out.glob("*.c*")}
    found = [f"missing: {name}" for name in files if name not in present]
    found += [f"not in the manifest's set: {name}" for name in sorted(present - set(files))]
    found += [
        f"out of date: {name}"
        for name, text in files.items()
        if name in present and (out / name).read_text(encoding="utf-8") != text
    ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=HERE / "manifest.toml")
    parser.add_argument("--set", choices=SETS, default="default", help="which cells (default: %(default)s)")
    parser.add_argument("--families", nargs="+", choices=LEGAL["arch"], default=LEGAL["arch"], help="default: all")
    parser.add_argument("--out", type=Path, help="directory of the generated files")
    parser.add_argument("--list", action="store_true", help="print the cells of the set")
    parser.add_argument("--count", action="store_true", help="print the number of cells of every set")
    parser.add_argument("--check", action="store_true", help="verify the manifest and, with --out, the directory")
    args = parser.parse_args()

    try:
        sets = load(args.manifest)
    except (ManifestError, tomllib.TOMLDecodeError) as error:
        print(f"{args.manifest}: {error}", file=sys.stderr)
        return 1
    sets = {name: [cell for cell in cells if cell.arch in args.families] for name, cells in sets.items()}
    cells = sets[args.set]
    if args.list:
        print("\n".join(cell.name for cell in cells))
    if args.count:
        print("\n".join(f"{name} {len(members)}" for name, members in sets.items()))
    if args.check:
        found = differences(render(cells), args.out) if args.out else []
        print("\n".join(found), file=sys.stderr, end="\n" if found else "")
        return 1 if found else 0
    if args.out:
        files = render(cells)
        write(files, args.out)
        print("\n".join(str(args.out / name) for name in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
