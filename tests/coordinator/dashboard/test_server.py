"""The real server, asked over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import coordinator
from coordinator.dashboard import app
from coordinator.dashboard.address import Place, may_be_called, open_place
from coordinator.dashboard.beside import beside
from coordinator.dashboard.feed import Feed
from coordinator.dashboard.snapshot import run_snapshot
from coordinator.dashboard.watched import Watched
from coordinator.running import index
from node.clikit import run_cli
from node.errors import UserError
from tests.coordinator.running.made import make_run
from tests.coordinator.view.synthetic import step_metrics, write_run
from tests.fixtures.runs import ENTRY

TOKEN = "a-token-of-the-test"


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: str


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.headers.items()), answer.read().decode())

    def stream(self, path: str) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))


@contextlib.contextmanager
def serving(*folders: Path, token: str = "") -> Iterator[Client]:
    opened = socket.create_server(("127.0.0.1", 0))
    port = opened.getsockname()[1]
    with beside(Place(opened, "127.0.0.1", token), folders):
        yield Client(port)
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "adapters", total=40, evaluate=20)
    return tmp_path / "adapters"


def test_the_page_and_all_that_it_needs_come_from_here(folder: Path) -> None:
    with serving(folder) as client:
        page = client.ask("/")
        assert page.status == 200
        assert "<script>" not in page.body
        assert "style=" not in page.body
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in page.headers
        for name in ("chart.js", "dashboard.js", "report.css", "dashboard.css"):
            assert f'"/assets/{name}"' in page.body
            found = client.ask(f"/assets/{name}")
            assert found.status == 200
            assert "@import" not in found.body
            assert "url(http" not in found.body
        assert "Chart.js v4" in client.ask("/assets/chart.js").body
        assert client.ask("/assets/chart.js", Accept_Encoding="identity").status == 200


def test_what_is_shown_is_what_stands_in_the_files(folder: Path) -> None:
    with serving(folder) as client:
        found = json.loads(client.ask("/data/0").body)
    assert (found["title"], found["status"], found["step"], found["total"]) == ("adapters", "done", 40, 40)
    loss = next(chart for chart in found["charts"] if chart["key"] == "loss")
    assert loss["last"] == 40
    assert [mark["x"] for mark in loss["marks"]] == [25]
    assert "worker ended by signal 9" in found["parts"]["events"]


def test_the_time_is_told_of_the_moment_and_not_of_the_snapshot(folder: Path) -> None:
    with serving(folder) as client:
        told = [time.time()]
        for path in ("/data/0", "/data/0"):
            told += [json.loads(client.ask(path).body)["now"], time.time()]
        told += [next(client.stream("/stream/0"))["now"], time.time()]
    assert told == sorted(told)


def test_a_quiet_stream_tells_the_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ALIVE_EVERY_SECONDS", 0.0)

    async def told() -> list[str]:
        run = Watched(folder, "adapters")
        stream = app._events(Feed([run], lambda: run_snapshot(run), asyncio.Lock()), asyncio.Event())
        return [await anext(stream), await anext(stream)]

    before = time.time()
    snapshot, clock = asyncio.run(told())
    assert json.loads(snapshot.removeprefix("data: "))["step"] == 40
    event, data, *_ = clock.split("\n")
    assert event == "event: clock"
    assert before <= json.loads(data.removeprefix("data: "))["now"] <= time.time()


def test_a_stream_tells_of_new_steps_and_then_of_the_end(folder: Path) -> None:
    with serving(folder) as client:
        stream = client.stream("/stream/0")
        assert next(stream)["step"] == 40
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step_metrics(41)) + "\n")
        assert next(stream)["step"] == 41
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": 1.79e9, "kind": "resumed", "message": "resumed", "level": "info"}) + "\n")
        assert next(stream)["status"] == "running"
        stream.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_is_for_reading_only(folder: Path, method: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with serving(folder) as client:
        for path in ("/", "/data/0", "/stream/0"):
            assert client.ask(path, method).status == 405
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "path", ["/data/1", "/run/../0", "/assets/../app.py", "/assets/%2e%2e%2fapp.py", "/metrics.jsonl", "/data/all"]
)
def test_other_paths_lead_nowhere(folder: Path, path: str) -> None:
    with serving(folder) as client:
        assert client.ask(path).status == 404


def test_a_foreign_name_that_points_here_is_refused(folder: Path) -> None:
    with serving(folder) as client:
        for host in ("evil.example", f"evil.example:{client.port}", "localhost.evil.example", "10.0.0.1", ""):
            assert client.ask("/data/0", Host=host).status in (400, 421), host
        for host in (f"localhost:{client.port}", "127.0.0.1", "[::1]:9000"):
            assert client.ask("/data/0", Host=host).status == 200, host


def test_behind_a_token_nothing_is_told_without_it(folder: Path) -> None:
    with serving(folder, token=TOKEN) as client:
        for path in ("/", "/data/0", "/stream/0", "/assets/chart.js", "/nothing"):
            for headers in ({}, {"Cookie": f"tandem-{client.port}=wrong"}, {"Cookie": "tandem-1=" + TOKEN}):
                assert client.ask(path, **headers).status == 401
            assert client.ask(f"{path}?token=wrong").status == 403
            assert client.ask(f"{path}?token=").status == 403
            assert client.ask(f"{path}?token={TOKEN}&token=wrong").status == 403
        entered = client.ask(f"/run/0?token={TOKEN}&a=b")
        assert entered.status == 303
        assert entered.headers["location"] == "/run/0?a=b"
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        shown = {"Cookie": cookie.partition(";")[0]}
        assert client.ask("/", **shown).status == 200
        assert json.loads(client.ask("/data/0", **shown).body)["step"] == 40
        assert client.ask("/", Host="evil.example", **shown).status == 421
        assert client.ask(f"//evil.example?token={TOKEN}").headers["location"] == "/evil.example"


def test_which_names_are_ours() -> None:
    own = socket.gethostname()
    assert may_be_called("10.0.0.7:21700", "0.0.0.0", loopback=False)
    assert may_be_called(f"{own}:21700", "0.0.0.0", loopback=False)
    assert may_be_called("studio.lan", "Studio.lan", loopback=False)
    assert not may_be_called("evil.example:21700", "0.0.0.0", loopback=False)
    assert not may_be_called(own if own != "localhost" else "x", "127.0.0.1", loopback=True)


def test_only_off_loopback_there_is_a_token_and_a_new_one_each_time() -> None:
    places = [open_place(host, 0) for host in (None, "localhost", "0.0.0.0", "0.0.0.0")]
    for place in places:
        place.socket.close()
    tokens = [place.token for place in places]
    assert tokens[:2] == ["", ""]
    assert tokens[2] != tokens[3]
    assert min(map(len, tokens[2:])) >= 32


def test_a_taken_port_is_a_clear_mistake_and_the_usual_one_gives_way() -> None:
    with open_place(None, 0).socket as taken:
        with pytest.raises(UserError, match=r"--dashboard-port [0-9]+ is taken; choose another"):
            open_place(None, taken.getsockname()[1])
    with open_place(None, None).socket as first, open_place(None, None).socket as second:
        assert first.getsockname() != second.getsockname()
    with pytest.raises(UserError, match="--dashboard-host no such host: not found"):
        open_place("no such host", 0)


def test_the_command_names_its_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "adapters", total=10)
    with open_place(None, 0).socket as taken:
        port = str(taken.getsockname()[1])
        assert run_cli(coordinator, ["dashboard", str(tmp_path / "adapters"), "--port", port]) == 2
        assert f" --port {port} is taken; choose another one\n" in capsys.readouterr().err
    # Addresses of documentation (RFC 5737) are nobody's.
    assert run_cli(coordinator, ["dashboard", str(tmp_path / "adapters"), "--host", "192.0.2.1"]) == 2
    assert " --host 192.0.2.1: this machine has no such address; give one of its own\n" in capsys.readouterr().err


def test_any_other_reason_is_told_without_the_systems_way_of_saying_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(address: tuple[str, int], **_: object) -> socket.socket:
        raise PermissionError(errno.EACCES, f"Permission denied (while attempting to bind on address {address!r})")

    monkeypatch.setattr(socket, "create_server", refused)
    line = "cannot listen on 127.0.0.1, port 80: Permission denied; choose another --host or --port"
    with pytest.raises(UserError, match=f"^{line}$"):
        open_place(None, 80, "--")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dashboard-port", "7"), "need --dashboard"),
        (("--dashboard", "--plan"), "--plan and --dashboard exclude each other"),
        (("--dashboard", "--dashboard-host", "no such host"), "--dashboard-host no such host: not found"),
    ],
)
def test_mistakes_with_a_training_are_told_before_it_begins(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ("--nodes", "local", "--adapter-path", str(tmp_path / "adapters"))
    assert run_cli(coordinator, ["train", "--model", "m", "--data", "d", *where, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "adapters").exists()


def run_command(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", ENTRY, "dashboard", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def test_the_command_serves_past_runs_until_ctrl_c(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", total=10)
    with run_command("adapters", "other", "--port", "0", cwd=tmp_path) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        client = Client(int(line.split(":")[3].split("/")[0]))
        assert "token" not in line
        stream = client.stream("/stream/all")
        assert {curve["label"] for curve in next(stream)["charts"][0]["curves"]} == {"adapters", "other"}
        assert client.ask("/run/1").status == 200
        process.send_signal(2)  # with a page open
        assert list(stream) == []
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (130, "stopped")


def test_without_a_name_the_last_run_is_shown(tmp_path: Path) -> None:
    first, last = (make_run(run, tmp_path / run, [3.0, loss]) for run, loss in (("a", 2.0), ("b", 1.0)))
    index.record("a", began=1.7e9)
    index.record("b", began=1.8e9)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for place in (last, first):
        with run_command("--port", "0", cwd=elsewhere) as process:
            assert process.stdout is not None
            client = Client(int(process.stdout.readline().split(":")[3].split("/")[0]))
            assert f"the last run, in {place}; for others: coordinator runs" in process.stdout.readline()
            assert json.loads(client.ask("/data/0").body)["title"] == place.name
            process.send_signal(2)
            process.communicate(timeout=30)
        shutil.rmtree(last, ignore_errors=True)  # then it is that whose files are still there


def test_where_there_is_no_run_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(tmp_path):
        assert run_cli(coordinator, ["dashboard"]) == 2
        assert "there is no run yet; coordinator train begins one" in capsys.readouterr().err
        shutil.rmtree(make_run("a", tmp_path / "a", [3.0]))
        assert run_cli(coordinator, ["dashboard"]) == 2
        assert "coordinator runs says where" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_a_run_is_a_clear_mistake(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with run_command(name, cwd=tmp_path) as process:
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert errors.count("\n") == 1
    assert f"{name}: no such run, and no folder of one" in errors
