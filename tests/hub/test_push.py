"""`jsft export --push` against a hub on this machine: what is asked of it, what is refused before anything is written."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jsft.errors import ConfigError, ModelError
from jsft.hf.push import check_push, push


class Hub:
    """Repositories by name: whether each is private, and its files. refuse: status of every write, 0 for none."""

    def __init__(self):
        self.repositories: dict[str, dict] = {}
        self.refuse = 0
        self.writes: list[str] = []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, name = self.server.hub, self.path.removeprefix("/api/models/").split("/revision")[0]
        if self.headers.get("Authorization") != "Bearer good":
            self.answer(401, {"error": "bad token"})
        elif self.path == "/api/whoami-v2":
            self.answer(200, {"name": "me", "type": "user"})
        elif name in hub.repositories:
            private = hub.repositories[name]["private"]
            self.answer(200, {"id": name, "private": private, "sha": "0" * 40, "siblings": [], "tags": []})
        else:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self):
        hub, body = self.server.hub, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        hub.writes.append(self.path)
        if hub.refuse:
            return self.answer(hub.refuse, {"error": "no"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.repositories.setdefault(name, {"private": asked["visibility"] == "private", "files": {}})
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        name = self.path.removeprefix("/api/models/").partition("/preupload")[0].partition("/commit")[0]
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.repositories[name]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        address = f"{self.server.url}/{name}/commit/{'0' * 40}"
        return self.answer(200, {"success": True, "commitUrl": address, "commitOid": "0" * 40})

    def answer(self, status: int, value: dict, headers: dict | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads, server.url = Hub(), True, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "good")
    yield server.hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "step_3"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# a card\n")
    return folder


@pytest.mark.parametrize("public", [False, True])
def test_every_file_arrives_in_a_repository_that_is_private_unless_asked_otherwise(hub, folder, public):
    check_push("org/model", public=public)
    assert not hub.writes and not hub.repositories  # the check only reads
    assert push(folder, "org/model", public=public, message="run, step 3").endswith("org/model")
    assert hub.repositories["org/model"]["private"] is not public
    assert hub.repositories["org/model"]["files"] == {file.name: file.read_bytes() for file in folder.iterdir()}
    check_push("org/model", public=public)  # the next step of the run goes there too


def test_what_cannot_be_pushed_is_refused_before_anything_is_written(hub, monkeypatch):
    hub.repositories["org/open"] = {"private": False, "files": {}}
    with pytest.raises(ConfigError, match="org/open: it exists and is public; give --public"):
        check_push("org/open", public=False)
    check_push("org/open", public=True)
    for name in ("model", "a/b/c", "org/bad name"):
        with pytest.raises(ConfigError, match="has the form ORG/NAME"):
            check_push(name, public=False)
    monkeypatch.setenv("HF_TOKEN", "old")
    with pytest.raises(ConfigError, match="refuses the token; make a new one"):
        check_push("org/model", public=False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="no token is here; set HF_TOKEN"):
        check_push("org/model", public=False)
    assert not hub.writes


def test_an_upload_that_is_refused_says_that_the_model_is_written(hub, folder):
    hub.refuse = 403
    with pytest.raises(
        ModelError, match=r"step_3 is written, but was not uploaded to org/model: the token may not write"
    ):
        push(folder, "org/model", public=False, message="run, step 3")
