"""hstu-ext data: download from a server of our own, info, convert."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hstu_ext.data import download, load
from hstu_ext.data.command import main


def archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as out:
        out.writestr("ml-1m/ratings.dat", "1::10::5::100\n1::20::3::200\n2::10::4::150\n")
        out.writestr("ml-1m/movies.dat", "10::Heat (1995)::Crime|Drama\n20::Big (1988)::Comedy\n")
    return content.getvalue()


class Handler(BaseHTTPRequestHandler):
    content = b""
    requests = 0

    def do_GET(self) -> None:
        Handler.requests += 1
        if self.path != "/ml-1m.zip":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(archive())))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves ml-1m.zip with the right checksum, and nothing else."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{running.server_address[1]}"
        Handler.content, Handler.requests = archive(), 0
        monkeypatch.setattr(download, "URL", url + "/{name}.zip")
        monkeypatch.setitem(download.DATASETS, "ml-1m", hashlib.md5(archive()).hexdigest())
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield url
        running.shutdown()
        thread.join()


def test_download_then_load(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made" / "here"
    assert main(["data", "download", "ml-1m", "--to", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder / 'ml-1m.zip'}\n"
    assert f"{server}/ml-1m.zip: " in err
    assert "checksum right" in err
    assert [path.name for path in folder.iterdir()] == ["ml-1m.zip"]
    assert load(folder / "ml-1m.zip").item_titles == ["Heat (1995)", "Big (1988)"]

    assert main(["data", "download", "ml-1m", "--to", str(folder)]) == 0
    assert "is there and whole" in capsys.readouterr().err
    assert Handler.requests == 1


def test_download_replaces_a_broken_archive(server: str, tmp_path: Path) -> None:
    (tmp_path / "ml-1m.zip").write_bytes(b"half of it")
    assert main(["data", "download", "ml-1m", "--to", str(tmp_path)]) == 0
    assert (tmp_path / "ml-1m.zip").read_bytes() == archive()


@pytest.mark.parametrize("content", [archive()[:-5] + b"12345", archive()[:-5]], ids=["changed", "cut off"])
def test_download_refuses_a_wrong_checksum(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    Handler.content = content
    assert main(["data", "download", "ml-1m", "--to", str(tmp_path)]) == 1
    found, expected = hashlib.md5(content).hexdigest(), download.DATASETS["ml-1m"]
    assert f"{server}/ml-1m.zip: expected MD5 {expected}, got {found}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_download_without_an_answer(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["data", "download", "ml-20m", "--to", str(tmp_path)]) == 1
    where = f"the file may be put at {tmp_path / 'ml-20m.zip'} by hand"
    assert capsys.readouterr().err == f"hstu_ext.data: {server}/ml-20m.zip: Not Found; {where}\n"
    monkeypatch.setattr(download, "URL", "http://127.0.0.1:9/{name}.zip")
    assert main(["data", "download", "ml-20m", "--to", str(tmp_path)]) == 1
    assert "http://127.0.0.1:9/ml-20m.zip: [Errno" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_download_knows_three_data_sets() -> None:
    assert download.URL.format(name="ml-1m") == "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    assert sorted(download.DATASETS) == ["ml-100k", "ml-1m", "ml-20m"]
    with pytest.raises(SystemExit):
        main(["data", "download", "ml-5m"])
    with pytest.raises(ValueError, match="download must be one of ml-100k, ml-1m, ml-20m, got 'ml-5m'"):
        download.download("ml-5m", Path())


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ml-1m.zip").write_bytes(archive())
    assert main(["data", "info", str(tmp_path / "ml-1m.zip")]) == 0
    assert capsys.readouterr().out == (
        "users          2\n"
        "items          2\n"
        "events         3\n"
        "density        75.0000%\n"
        "events a user  least 1, 25 % 1, median 1, 75 % 1, 95 % 1, 99 % 1, most 2\n"
        "times          1970-01-01 00:01:40 to 1970-01-01 00:03:20 UTC\n"
        "ratings        3 to 5, mean 4.000\n"
        "actions        3, 4, 5\n"
        "item features  genres (3), year (3)\n"
        "user features  none\n"
        "leave-one-out  3 training events, 0 users evaluated, 2 too short and only trained on, "
        "0 targets and 0 items without a training event\n"
        "most popular\n"
        "         2  Heat (1995)\n"
        "         1  Big (1988)\n"
    )
    assert main(["data", "info", "synthetic"]) == 0
    out = capsys.readouterr().out
    assert "users          2000\n" in out
    assert "times          none\n" in out
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp\n1,a,0\n1,b,{10**17}\n")
    assert main(["data", "info", str(tmp_path / "log.csv")]) == 0
    assert f"times          0 to {10**17}\n" in capsys.readouterr().out  # not seconds


def test_info_of_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(tmp_path / "none")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"hstu_ext.data: {tmp_path / 'none'}: expected 'synthetic', or a file or folder")


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.csv").write_text("when,who,what\n5,a,x\n5,a,x\n1,a,y\n")
    columns = ["--columns", "user=who,item=what,time=when", "--duplicates", "drop"]
    assert main(["data", "convert", str(tmp_path / "log.csv"), str(tmp_path / "out.csv"), *columns]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out.csv'}: 1 users, 2 events\n"
    assert (tmp_path / "out.csv").read_text() == 'user_id,sequence_item_ids,sequence_timestamps\na,"y,x","1,5"\n'
    assert main(["data", "convert", "synthetic", str(tmp_path / "out.txt")]) == 1
    assert "OUT must end in .csv or .csv.gz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "info", "x.csv", "--columns", "person=who"])
    assert "must be ROLE=NAME,... with roles user, item, time, rating, action" in capsys.readouterr().err
