"""A small Hugging Face Hub: repositories in memory behind the HTTP interface of the real one."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_these_tests"


class Hub(ThreadingHTTPServer):
    """Repositories as ``{name: {revision: {path: bytes}}}``; only a holder of TOKEN may write."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, body: str) -> None:
        files = dict(self.repositories[name]["main"])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        self.repositories[name]["main"] = files


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, content: Any, *, status: int = 200, headers: dict[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, status=404, headers={"X-Error-Code": code})

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.server.repositories.get(name)
        if revisions is None:
            return self._missing("RepoNotFound")
        for known, files in revisions.items():
            if revision in (known, _commit(known)):
                return files
        return self._missing("RevisionNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, kind = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else ""
            revision = parts[5] if len(parts) > 5 else "main"
            if (files := self._files(name, revision)) is None:
                return
            if kind == "tree":
                self._answer([_entry(path, data) for path, data in files.items()])
            else:
                siblings = [{"rfilename": path} for path in files]
                self._answer({"id": name, "sha": _commit(revision), "siblings": siblings})
        elif len(parts) > 4 and parts[2] == "resolve":
            name, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            if (files := self._files(name, revision)) is None:
                return
            if path not in files:
                return self._missing("EntryNotFound")
            headers = {"ETag": f'"{_digest(files[path])}"', "X-Repo-Commit": _commit(revision)}
            self._answer(files[path], headers=headers)
        else:
            self._missing("EntryNotFound")

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = unquote(urlsplit(self.path).path).strip("/")
        if path == "api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, status=401)
        if path == "api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/blob/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        name, kind = "/".join(path.split("/")[2:4]), path.split("/")[4]
        if kind == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": modes})
        self.server.commit(name, body)
        url = f"{self.server.url}/{name}/commit/main"
        self._answer({"success": True, "commitUrl": url, "commitOid": _commit("main")})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            return self._answer({"error": "You already created this model repo"}, status=409)
        self.server.repositories[name] = {"main": {}}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.server.private.add(name)
        self._answer({"url": url, "name": name})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _commit(revision: str) -> str:
    """The commit of a branch or tag; of a commit itself."""
    return revision if len(revision) == 40 else _digest(revision.encode())


@contextmanager
def hub() -> Iterator[Hub]:
    """Runs a hub in a thread."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
