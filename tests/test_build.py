"""What was built and installed: its links, its contents, and that a build leaves the source tree alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import hstu_ext
from hstu_ext import _C

ROOT = Path(__file__).resolve().parents[1]


HAS_BACKEND = importlib.util.find_spec("scikit_build_core") is not None  # else pip fetches it for each build


def run(code: str, python: str | Path = sys.executable, **environment: str) -> str:
    result = subprocess.run(
        [python, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_links_no_torch_and_no_cuda_library() -> None:
    libraries = subprocess.run(["ldd", _C.__file__], check=True, capture_output=True, text=True).stdout
    assert "libc.so" in libraries
    assert not re.findall(r"lib(?:torch|c10|cuda|cudart|nvrtc)\S*", libraries)


@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="needs nm of Linux")
def test_exports_its_init_function_alone() -> None:
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", _C.__file__]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[0] for line in symbols] == ["PyInit__C"]


def test_the_compiled_module_imports_without_torch() -> None:
    code = f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("hstu_ext._C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info()["version"])
"""
    assert run(code).strip() == hstu_ext.__version__


def test_torch_is_loaded_before_the_compiled_module() -> None:
    loaded = run("import sys; from hstu_ext import hstu_attn_varlen_func; print(*sys.modules)").split()
    assert loaded.index("torch._C") < loaded.index("hstu_ext._C")


def test_runs_without_a_gpu_in_sight() -> None:
    code = """
import torch, hstu_ext
q = torch.ones(2, 1, 8)
offsets = torch.tensor([0, 2])
print(hstu_ext.hstu_attn_varlen_func(q, q, q, offsets, offsets, 2, 2).isfinite().all().item())
"""
    assert run(code, CUDA_VISIBLE_DEVICES="").strip() == "True"


def test_build_info() -> None:
    info = hstu_ext.build_info()
    assert info["version"] == hstu_ext.__version__ == importlib.metadata.version("hstu_ext")
    assert re.search(r"\d+\.\d+", info["compiler"])
    assert "baseline" in info["cpu_variants"]
    assert info["cpu_variant"] in info["cpu_variants"]
    if info["cuda"]:
        assert info["archs"]
        assert info["set"] in ("ci", "default", "full")
        assert info["cutlass"]
    else:
        assert (info["archs"], info["set"], info["cutlass"]) == ([], "", "")
    assert bool(info["cuda"]) == bool(hstu_ext.cells())


def source_files() -> dict[str, int]:
    """Every file of the source tree with its time; directories of tools and of the build are not the build's doing."""
    skip = {".git", ".venv", "build", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis"}
    files = {}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in skip]
        files.update({str(Path(folder, name)): Path(folder, name).stat().st_mtime_ns for name in names})
    return files


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from it (CPU part)."""
    out = tmp_path_factory.mktemp("dist")
    before = source_files()
    isolation = ["--no-isolation", "--skip-dependency-check"] if HAS_BACKEND else []
    subprocess.run(
        [sys.executable, "-m", "build", *isolation, "-C", "cmake.define.HSTU_EXT_CUDA=off", "--outdir", out, ROOT],
        check=True,
    )
    assert source_files() == before
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_sdist_has_what_a_build_needs_and_no_more(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
    assert {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "tools/codegen/manifest.toml"} <= set(names)
    assert {name.partition("/")[0] for name in names if "/" in name} == {
        *("cmake", "csrc", "python", "third_party", "tools")
    }
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.mark.slow
def test_wheel_has_the_package_and_the_module_only(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = wheel.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "hstu_ext",
        f"hstu_ext-{hstu_ext.__version__}.dist-info",
    }
    package = [name for name in names if name.startswith("hstu_ext/")]
    assert len([name for name in package if name.endswith(".so")]) == 1
    assert {Path(name).suffix for name in package} == {".py", ".pyi", ".so", ".typed"}
    assert {"hstu_ext/py.typed", "hstu_ext/_C.pyi", "hstu_ext/ops/attention.py"} <= set(package)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install(kind: str, archives: tuple[Path, Path], tmp_path: Path) -> None:
    """Into an environment of its own, which sees the packages of this one but not its hstu_ext."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    what = ["-e", ROOT, "-C", "cmake.define.HSTU_EXT_CUDA=off"] if kind == "editable" else [archives[1]]
    isolation = ["--no-build-isolation"] if HAS_BACKEND else []
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--ignore-installed", *isolation, *what], check=True)
    place, module = run("import hstu_ext; print(hstu_ext.__file__); print(hstu_ext._C.__file__)", python).split()
    assert Path(module).is_relative_to(site)
    assert Path(place).is_relative_to(ROOT if kind == "editable" else site)
