from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from coordinator.upload import upload
from node.errors import TandemError, UserError


class Hub:
    """A local stand-in for the Hub: remembers what it was sent, answers as it is told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str, bytes]] = []
        self.answers: dict[str, int] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.requests.append((self.command, self.path, self.headers.get("Authorization", ""), body))
                status = next((code for part, code in hub.answers.items() if part in self.path), 200)
                content = hub.answer(self.path, body) if status == 200 else {"error": "refused by the test"}
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, path: str, body: bytes) -> object:
        if path.endswith("/api/repos/create"):
            return {"url": f"{self.address}/owner/mine", "name": "owner/mine", "id": "1"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/owner/mine/commit/0"}
        return {"sha": "0" * 40, "siblings": [], "id": "owner/mine"}

    def committed(self) -> set[str]:
        body = next(body for _, path, _, body in self.requests if "/commit/" in path)
        lines = [json.loads(line) for line in body.splitlines()]
        return {line["value"]["path"] for line in lines if line["key"] == "file"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    api = huggingface_hub.HfApi
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint=hub.address, token="hf_test"))
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join(5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / ".secret").write_text("not for others")
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mlx\n---\n\n# Old\n")
    return tmp_path


def test_everything_but_hidden_files_goes_up_in_one_commit(hub: Hub, folder: Path) -> None:
    address = upload(folder, "owner/mine", "base/model")
    assert address == f"{hub.address}/owner/mine"
    assert hub.committed() == {"config.json", "tokenizer.json", "README.md"}
    changing = [sent for sent in hub.requests if "/create" in sent[1] or "/commit/" in sent[1]]
    assert [authorization for _, _, authorization, _ in changing] == ["Bearer hf_test"] * 2
    assert sum("/commit/" in path for _, path, _, _ in hub.requests) == 1


def test_the_card_names_the_base_model_and_keeps_the_rest(hub: Hub, folder: Path) -> None:
    upload(folder, "owner/mine", "base/model")
    card = (folder / "README.md").read_text()
    assert "base_model: base/model\n" in card
    assert "license: mit\n" in card
    assert "from [base/model](https://huggingface.co/base/model)" in card
    assert 'load("owner/mine")' in card


def test_without_a_base_model_the_card_says_what_it_said(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: known/base\n---\n")
    upload(folder, "owner/mine")
    assert "base_model: known/base\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("part", "status", "kind", "message"),
    [
        ("/api/", 401, UserError, "does not accept your token; run `hf auth login`"),
        ("/api/", 403, UserError, "your token may not write there"),
        ("/commit/", 403, UserError, "your token may not write there"),
        ("/commit/", 404, UserError, "no such owner"),
        ("/commit/", 400, TandemError, "the Hub answered"),
    ],
)
def test_refusals_are_one_clear_line(
    hub: Hub, folder: Path, part: str, status: int, kind: type[TandemError], message: str
) -> None:
    hub.answers[part] = status
    with pytest.raises(TandemError, match=message) as error:
        upload(folder, "owner/mine")
    assert type(error.value) is kind
    assert "\n" not in str(error.value)


def test_no_connection_is_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = huggingface_hub.HfApi
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9", token="hf_test"))
    with pytest.raises(TandemError, match=r"cannot upload to owner/mine: .*; the model is whole in") as error:
        upload(folder, "owner/mine")
    assert type(error.value) is TandemError


def test_not_logged_in(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    api = type(huggingface_hub.HfApi())
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint=hub.address, token=True))
    with pytest.raises(UserError, match="not logged in; run `hf auth login` or set HF_TOKEN"):
        upload(folder, "owner/mine")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["a/b/c", "-x", "", "owner/na me"])
def test_bad_names_never_leave_the_machine(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="not a name on the Hub; it should look like owner/name"):
        upload(folder, name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it holds no model"):
        upload(tmp_path, "owner/mine")
