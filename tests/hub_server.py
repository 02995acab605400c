"""A stand-in for the hub on this machine: as much of its API as downloads and uploads ask for.

Repositories are dicts: id -> revision -> path -> content. A repository among `locked` asks for `TOKEN`, and so does every upload.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN, OWNER = "hf_of_the_stand_in", "me"


class StandIn(ThreadingHTTPServer):
    """The server, with what it holds and what it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.locked: set[str] = set()
        self.private: dict[str, bool | None] = {}
        self.sent: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, folder: Path, revision: str = "main") -> None:
        """Put the files of a folder into a repository."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories.setdefault(repo, {}).setdefault(revision, {}).update(files)

    def commit(self, repo: str, revision: str) -> str:
        """A name for the content of a revision, which is one by itself."""
        files = sorted((name, _oid(content)) for name, content in self.repositories[repo][revision].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files at a branch or a commit."""
        found = self.repositories[repo]
        return next((found[name] for name in found if revision in (name, self.commit(repo, name))), None)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_) -> None:
        """Say nothing."""

    def do_GET(self) -> None:  # noqa: N802 - the name is `http.server`'s
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            self._with_files(found, lambda repo, revision, files: self._json(self._about(repo, revision, files)))
        elif found := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)", path):
            self._with_files(found, lambda repo, revision, files: self._json(self._tree(files)))
        elif found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._with_files(found, lambda repo, revision, files: self._file(repo, revision, files, found[3]))
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815 - as above

    def do_POST(self) -> None:  # noqa: N802 - as above
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._may(True):
            self._refuse(401, "")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
            self.server.private.setdefault(repo, asked.get("visibility") == "private" or asked.get("private"))
            self.server.repositories.setdefault(repo, {"main": {}})
            self._json({"url": f"{self.server.address}/{repo}"})
        elif found := re.fullmatch(r"/api/models/(.+?)/branch/(.+)", path):
            self.server.repositories[found[1]].setdefault(found[2], {})
            self._json({})
        elif re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif found := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            entries = [json.loads(line) for line in body.splitlines()]
            added = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
            self.server.repositories[found[1]][found[2]].update(added)
            commit = self.server.commit(found[1], found[2])
            self._json({"commitUrl": f"{self.server.address}/{found[1]}/commit/{commit}", "commitOid": commit})
        else:
            self._refuse(404, "EntryNotFound")

    def _may(self, is_locked: bool) -> bool:
        return not is_locked or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _with_files(self, found: re.Match, answer) -> None:
        repo, revision = found[1], found[2]
        if repo not in self.server.repositories or not self._may(repo in self.server.locked):
            self._refuse(401, "RepoNotFound")
        elif (files := self.server.files(repo, revision)) is None:
            self._refuse(404, "RevisionNotFound")
        else:
            answer(repo, revision, files)

    def _about(self, repo: str, revision: str, files: dict) -> dict:
        sha = next(
            c for name in self.server.repositories[repo] if revision in (name, c := self.server.commit(repo, name))
        )
        return {"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]}

    def _tree(self, files: dict[str, bytes]) -> list[dict]:
        return [{"type": "file", "path": name, "size": len(c), "oid": _oid(c)} for name, c in files.items()]

    def _file(self, repo: str, revision: str, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[name]
        if self.command == "GET":
            self.server.sent.append(name)
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": revision, "Accept-Ranges": "none"}
        self._answer(200, content, "application/octet-stream", headers)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), "application/json", {})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", "application/json", {"X-Error-Code": code} if code else {})

    def _answer(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
