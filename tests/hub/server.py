"""A small hub for tests: the part of the Hugging Face hub's API that huggingface_hub and datasets use to read.

    with LocalHub() as hub:
        hub.add("model", "org/tiny", folder)                     # and .add("dataset", ...), revision="v1", token="secret"
        os.environ["HF_ENDPOINT"] = hub.url

Large files (LARGE) are redirected to another host's name, as the hub redirects to its storage. `requests` records what was asked for; `fail` makes coming requests for a file go wrong.
"""

import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

LARGE = (".safetensors", ".parquet", ".arrow")  # what the hub keeps outside of git
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(?:/(.*))?)?)?")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_STORE = re.compile(r"/storage/(\w+)")


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Repository:
    """Commits by hash, and what names them. token: needed to read it; gated: its terms were not accepted."""

    kind: str
    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False


class LocalHub:
    """The server, on a free port of this machine while the context is open. url: what HF_ENDPOINT must be."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self._failures: dict[str, list[int]] = {}
        self._blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub, self._server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}/storage"  # another host to a client

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind: str, name: str, files: Path | dict[str, bytes], revision: str = "main", **access: Any) -> str:
        """Adds a commit of kind "model" or "dataset", named by `revision`; access: fields of Repository.

        files: a folder, or contents by path. Returns the commit's hash.
        """
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        repository = self.repositories.setdefault((kind, name), Repository(kind, name))
        for key, value in access.items():
            setattr(repository, key, value)
        commit = hashlib.sha1(repr((kind, name, revision, sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit], repository.revisions[revision] = files, commit
        for path, content in files.items():
            if path.endswith(LARGE):
                self._blobs[hashlib.sha256(content).hexdigest()] = content
        return commit

    def fail(self, path: str, *after: int) -> None:
        """The coming downloads of a file break off after so many bytes, one number for each; -1: status 503."""
        self._failures[path] = list(after)

    def failure(self, path: str) -> int | None:
        """How the present download of `path` fails, if it does."""
        return self._failures[path].pop(0) if self._failures.get(path) else None

    def downloads(self, path: str) -> list[str | None]:
        """The Range header of every GET of a file so far; the storage's path stands for a large file."""
        names = {hashlib.sha256(c).hexdigest() for c in self._contents(path) if path.endswith(LARGE)} or {path}
        return [r.range for r in self.requests if r.method == "GET" and r.path.endswith(tuple(names))]

    def blob(self, digest: str) -> tuple[bytes, str] | None:
        """(content, path) of a file in the storage."""
        if (content := self._blobs.get(digest)) is None:
            return None
        names = [
            p for r in self.repositories.values() for f in r.commits.values() for p, c in f.items() if c == content
        ]
        return content, names[0]

    def _contents(self, path: str) -> list[bytes]:
        return [f[path] for r in self.repositories.values() for f in r.commits.values() if path in f]


class _Refused(Exception):
    """status, the hub's code for the reason, and its text."""


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "oid": _git_hash(content), "size": len(content), "path": path}
    if path.endswith(LARGE):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        hub: LocalHub = self.server.hub
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), urllib.parse.parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        hub.requests.append(Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        try:
            if match := _STORE.fullmatch(path):
                return self._send_file(*hub.blob(match[1]))
            if match := _API.fullmatch(urllib.parse.unquote(url.path)):
                kind, name, what, revision, rest = match.groups()
                repository = self._repository(kind.removesuffix("s"), name)
                return self._send_json(self._describe(repository, what, revision, rest, query, body))
            if match := _FILE.fullmatch(path):
                kind, name, revision, file = match.groups()
                return self._resolve(self._repository("dataset" if kind else "model", name), revision, file)
            raise _Refused(404, "", "this hub has no such page")
        except _Refused as refused:
            status, code, text = refused.args
            headers = {"X-Error-Code": code, "X-Error-Message": text} if code else {}
            self._send(status, json.dumps({"error": text}).encode(), headers)

    def _repository(self, kind: str, name: str) -> Repository:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        repository = self.server.hub.repositories.get((kind, name))
        if given == "expired":
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        if repository is None or repository.token and not given:
            raise _Refused(404 if given else 401, "RepoNotFound", "Repository not found")
        if repository.token and given != repository.token:
            raise _Refused(403, "", "this token may not read the repository")
        return repository

    def _commit(self, repository: Repository, revision: str | None) -> str:
        revision = revision or "main"
        if revision in repository.commits:
            return revision
        if revision not in repository.revisions:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository.revisions[revision]

    def _describe(self, repository: Repository, what, revision, rest, query, body) -> Any:
        if what == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.revisions.items()]
            return {"branches": refs, "tags": [], "converts": []}
        commit = self._commit(repository, revision)
        files = repository.commits[commit]
        if what == "tree":
            return list(self._tree(files, (rest or "").strip("/"), query.get("recursive") == ["true"]))
        if what == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else urllib.parse.parse_qs(body.decode())
            paths = asked["paths"] if isinstance(asked["paths"], list) else [asked["paths"]]
            folders = [p for p in paths if p not in files and any(f.startswith(f"{p}/") for f in files)]
            found = [_entry(path, files[path]) for path in paths if path in files]
            return found + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        return {
            "_id": "0" * 24,
            "id": repository.name,
            "sha": commit,
            "private": repository.token is not None,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in files],
        }

    def _tree(self, files: dict[str, bytes], folder: str, recursive: bool):
        start, folders = f"{folder}/" if folder else "", set()
        if folder and not any(path.startswith(start) for path in files):
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        for path, content in files.items():
            if not path.startswith(start):
                continue
            parts = path.removeprefix(start).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folders.add(start + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                yield _entry(path, content)
        for path in sorted(folders):
            yield {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        if repository.gated:  # its description and the names of its files are public
            raise _Refused(403, "GatedRepo", f"Access to {repository.name} is restricted")
        commit = self._commit(repository, revision)
        content = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            text = f"{path} does not exist on revision {revision}"
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": text})
        if not path.endswith(LARGE):
            return self._send_file(content, path, headers | {"ETag": f'"{_git_hash(content)}"'})
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", headers | {"Location": f"{self.server.hub.storage}/{digest}"})

    def _send_file(self, content: bytes, path: str, headers: dict[str, str] = {}) -> None:
        failure = self.server.hub.failure(path) if self.command == "GET" else None
        if failure == -1:
            return self._send(503, b"", {})
        first, last, status = 0, len(content) - 1, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last, status = int(match[1]), int(match[2] or last), 206
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        part = content[first : last + 1]
        self._send(status, part, headers | {"Accept-Ranges": "bytes"}, failure)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True
