"""The command line, from a configuration to recommendations and an index."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_ext import topk_dot
from hstu_ext.cli import main
from hstu_ext.training import load_model

pytest.importorskip("safetensors")
np = pytest.importorskip("numpy")

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "data.options.num_users": 60,
    "data.options.num_items": 100,
    "data.options.max_len": 40,
    "model.dim": 16,
    "model.num_heads": 1,
    "model.head_dim": 16,
    "model.max_len": 40,
    "training.batch_size": 16,
    "training.epochs": 2,
    "training.device": "cpu",
    "evaluation.depth": 100,
}


def overrides(**more: Any) -> list[str]:
    return [word for key, value in {**SMALL, **more}.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def quiet(**more: Any) -> list[str]:
    return overrides(**{"output.report": False, "output.tensorboard": "off", **more})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on synthetic data."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", str(ROOT / "configs" / "synthetic" / "hstu.toml"), "--output", str(path), *quiet()]) == 0
    return path


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command that fails prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 1
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    (line,) = found.err.strip().splitlines()
    return line


def test_train_resume_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    parts = tmp_path / "parts"
    config = str(ROOT / "configs" / "synthetic" / "hstu.toml")
    assert main(["train", config, "--output", str(parts), *quiet(**{"training.epochs": 1})]) == 0
    assert main(["train", "--resume", "--output", str(parts), "--set", "training.epochs=2"]) == 0
    printed = capsys.readouterr().out
    assert "resumed after step 4" in printed
    for ours, theirs in zip(load_model(parts)[0].parameters(), load_model(run)[0].parameters()):
        assert torch.equal(ours, theirs)

    assert main(["evaluate", str(parts), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["hstu", "popularity", "random"]
    last = json.loads((parts / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert found["hstu"] == pytest.approx({name: last[name] for name in found["hstu"]})

    assert main(["evaluate", str(parts), "--set", "evaluation.ks=[3]", "--set", "data.holdout=validation"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "60 users, 100 items, validation"
    assert printed.splitlines()[1].split() == ["HR@3", "NDCG@3", "Recall@3", "MRR"]
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["hstu", "popularity", "random"]


def recommended(printed: str) -> list[str]:
    return [line.split()[2] for line in printed.splitlines()[1:]]


def test_recommend(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    model, _, catalogue = load_model(run)
    capsys.readouterr()
    assert main(["recommend", str(run), "--items", "7", "42", "3", "-k", "5"]) == 0
    by_id = capsys.readouterr().out
    expected = [str(item) for item in model.recommend([[7, 42, 3]], 5)[1][0].tolist()]
    assert recommended(by_id) == expected
    assert by_id.splitlines()[0] == "after item 7, item 42, item 3"
    assert re.fullmatch(rf" +1\. +-?0\.\d{{4}} +{expected[0]}  item {expected[0]}", by_id.splitlines()[1])

    assert main(["recommend", str(run), "--titles", "item 7", "ITEM 42", "item 3", "-k", "5"]) == 0
    assert capsys.readouterr().out == by_id

    assert main(["recommend", str(run), "--user", "5", "-k", "100"]) == 0
    assert main(["recommend", str(run), "--user", "5", "-k", "100", "--include-seen"]) == 0
    printed = capsys.readouterr().out
    first, second = ("after" + part for part in printed.split("after")[1:])
    assert len(recommended(first)) < len(recommended(second)) == catalogue.num_items
    seen = set(recommended(second)) - set(recommended(first))
    assert {f"item {item}" for item in seen} >= set(first.splitlines()[0].removeprefix("after ").split(", "))


def test_export_gives_the_same_items_as_topk(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    faiss = pytest.importorskip("faiss")
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--faiss", "on"]) == 0
    written = {Path(line).name for line in capsys.readouterr().out.split()}
    assert written == {"items.npy", "item_ids.json", "query_encoder", "items.faiss"}
    vectors = np.load(tmp_path / "out" / "items.npy")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose((vectors**2).sum(1), 1.0, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "item_ids.json").read_text(encoding="utf-8"))[17] == "17"

    encoder, _, _ = load_model(tmp_path / "out" / "query_encoder")
    items = torch.randint(100, (64,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        query = encoder.encode_query(items, torch.tensor([0, 4, 30, 31, 64], dtype=torch.int32), 33)
    index = faiss.read_index(str(tmp_path / "out" / "items.faiss"))
    distances, found = index.search(query.numpy(), 20)
    values, indices = topk_dot(query, torch.from_numpy(vectors), 20)
    assert indices.tolist() == found.tolist()
    torch.testing.assert_close(values, torch.from_numpy(distances), rtol=1e-5, atol=1e-6)


def test_export_without_an_index(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(run), "--output", str(tmp_path)]) == 0
    assert not (tmp_path / "items.faiss").exists()
    line = failure(capsys, "export", str(run), "--output", str(tmp_path), "--faiss", "on")
    assert line.endswith("hstu_ext.export: faiss must be installed for an index: pip install 'hstu_ext[faiss]'")


def test_info(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    assert main(["info"]) == 0
    assert re.search(rf"torch +{re.escape(torch.__version__)}", capsys.readouterr().out)
    assert main(["info", str(run)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"items +1600 parameters", printed)
    assert "num_heads = 1" in printed
    assert main(["info", "--options"]) == 0
    assert "model.num_layers = 2\n    layers (of at least 1)\n" in capsys.readouterr().out


def test_data_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", "synthetic"]) == 0
    assert "2000" in capsys.readouterr().out.replace(",", "")


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    config = str(ROOT / "configs" / "synthetic" / "hstu.toml")
    new = str(tmp_path / "new")
    cases = {
        ("train",): "a configuration must be given",
        ("train", "--resume"): "--output must be given with --resume",
        ("train", str(tmp_path / "no.toml")): "must be a readable file",
        ("train", config, "--set", "model.depth=3"): "model.depth is not an option",
        ("train", config, "--output", new, "--set", "data.source=/nowhere"): "/nowhere",
        ("train", config, "--output", str(run), *quiet()): "must be a new directory, or resumed, got a run",
        ("train", "--resume", "--output", new): "must be a run or a checkpoint, found no model there",
        ("evaluate", new): "must be a run or a checkpoint, found no model there",
        ("evaluate", str(run), "--set", "model.dim=32"): "model and loss must be those of the checkpoint",
        (
            "evaluate",
            str(run),
            "--set",
            "data.options.num_items=200",
        ): "the data must have the 100 items that",
        ("recommend", str(run), "--items", "100"): "must be one of the 100 ids of the data, got '100'",
        ("recommend", str(run), "--titles", "item 9"): None,
        (
            "recommend",
            str(run),
            "--titles",
            "tem 9",
        ): "must fit one title, got several titles: item 9; item 90",
        ("recommend", str(run), "--titles", "film 12"): "must fit one title, got no title: item 12",
        ("recommend", str(run), "--user", "nobody"): "'nobody'",
        ("recommend", str(run), "--items", "1", "-k", "0"): "k must be",
    }
    for arguments, text in cases.items():
        if text is None:
            assert main(list(arguments)) == 0
            continue
        assert text in failure(capsys, *arguments), arguments
    with pytest.raises(SystemExit):
        main(["recommend", str(run), "--items", "1", "--user", "1"])


def test_actions_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["user_id,item_id,timestamp,action"]
    rows += [f"{user},{(user * 3 + n) % 11},{n},{('view', 'buy')[n % 2]}" for user in range(12) for n in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = {"data.source": str(tmp_path / "log.csv"), "model.actions": "interleave", "evaluation.ks": [1]}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    config = tmp_path / "c.toml"
    config.write_text("[model]\ndim = 8\nhead_dim = 8\nmax_len = 8\n[training]\nepochs = 1\ndevice = 'cpu'\n")
    run = str(tmp_path / "run")
    assert main(["train", str(config), "--output", run, *words, "--set", "output.report=false"]) == 0
    text = failure(capsys, "recommend", run, "--items", "1", "2", "--actions", "view")
    assert "--actions must be 2 of buy, view, one for each item, got view" in text.replace("view, buy", "buy, view")
    assert main(["recommend", run, "--items", "1", "2", "--actions", "view", "buy"]) == 0
    assert main(["recommend", run, "--user", "3"]) == 0
    text = failure(capsys, "recommend", run, "--titles", "1", "--actions", "view")
    assert text.endswith("hstu_ext.recommend: --items must be given for data without titles, got --titles")


def test_times_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["user_id,item_id,timestamp"]
    rows += [f"{user},{(user * 3 + n) % 11},{1000 * n * n}" for user in range(12) for n in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = {"data.source": str(tmp_path / "log.csv"), "model.bias": "time+position", "evaluation.ks": [1]}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    config = tmp_path / "c.toml"
    config.write_text("[model]\ndim = 8\nhead_dim = 8\nmax_len = 8\n[training]\nepochs = 1\ndevice = 'cpu'\n")
    run = str(tmp_path / "run")
    assert main(["train", str(config), "--output", run, *words, "--set", "output.report=false"]) == 0
    text = failure(capsys, "recommend", run, "--items", "1", "2", "--times", "5")
    assert text.endswith("hstu_ext.recommend: --times must be 2 integers, one for each item, got 5")
    assert main(["recommend", run, "--items", "1", "2", "--times", "5", "900"]) == 0
    first = capsys.readouterr().out
    assert main(["recommend", run, "--items", "1", "2", "--times", "5", "90000000"]) == 0
    assert capsys.readouterr().out != first
    assert main(["recommend", run, "--user", "3"]) == 0


def test_evaluate_has_the_precision_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    config = str(ROOT / "configs" / "synthetic" / "hstu.toml")
    assert main(["train", config, "--output", run, *quiet(**{"training.precision": "bf16"})]) == 0
    capsys.readouterr()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    found = []
    for precision in ("bf16", "fp32"):
        assert main(["evaluate", run, "--json", "--set", f"training.precision={precision}"]) == 0
        found.append(json.loads(capsys.readouterr().out)["hstu"])
    assert found[0] == {name: last[name] for name in found[0]}
    assert found[0] != found[1]


def test_the_command_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hstu_ext.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"hstu_ext \d+\.\d+\.\d+\n", done.stdout)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'hstu-ext = "hstu_ext.cli:main"' in project


@pytest.mark.plain_allocations
@pytest.mark.skipif("HSTU_EXT_DATA" not in os.environ, reason="HSTU_EXT_DATA is not set")
def test_movielens_100k_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (Path(os.environ["HSTU_EXT_DATA"]) / "ml-100k").exists():
        pytest.skip("HSTU_EXT_DATA has no ml-100k")
    run = tmp_path / "run"
    config = str(ROOT / "configs" / "ml-100k" / "hstu.toml")
    short = ["training.epochs=6", "training.device=cpu", "output.report=false", "evaluation.every=0"]
    words = [word for each in short for word in ("--set", each)]
    assert main(["train", config, "--output", str(run), *words]) == 0
    assert main(["evaluate", str(run), "--json"]) == 0
    printed = capsys.readouterr().out
    results = json.loads(printed[printed.index("{") :])
    assert results["hstu"]["HR@10"] > 1.5 * results["popularity"]["HR@10"]
    assert results["popularity"]["HR@10"] > 5 * results["random"]["HR@10"]
    assert main(["recommend", str(run), "--titles", "Star Wars (1977)", "Empire Strikes Back", "-k", "20"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("after Star Wars (1977), Empire Strikes Back, The (1980)")
    assert len(printed.splitlines()) == 21
    assert not any("Star Wars (1977)" in line or "Empire Strikes" in line for line in printed.splitlines()[1:])
    assert main(["recommend", str(run), "--user", "1"]) == 0
