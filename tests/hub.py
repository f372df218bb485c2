"""A Hub on loopback that serves the folders of a directory, as far as reading data sets asks for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import datasets
import huggingface_hub.constants
import pytest

COMMIT = "a" * 40


class Hub:
    """The server; `folder` holds OWNER/NAME/…, and who asks for a set in `gated` has not accepted its terms."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def write(self, repository: str, files: dict[str, str]) -> None:
        for name, content in files.items():
            path = self.folder / repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def go_online(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Let the libraries ask this server, with a cache of their own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "datasets"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(cache / "downloads"))


def models_in_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, models: Mapping[str, Mapping[str, Path]]) -> None:
    """Repositories of models as they lie in the cache of the Hub: by name and revision what folder they are."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    for name, revisions in models.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        for place, (revision, folder) in enumerate(revisions.items()):
            commit = str(place) * 40
            (repository / "refs" / revision).write_text(commit)
            shutil.copytree(folder, repository / "snapshots" / commit)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _say(self, code: int, body: Any, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _no(self, code: int, why: str) -> None:
            self._say(code, {"error": why}, X_Error_Code=why)

        def do_GET(self) -> None:
            self._answer(b"")

        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, body: bytes) -> None:
            words = unquote(urlparse(self.path).path).strip("/").split("/")
            hub.asked.append(f"{self.command} {self.path}")
            api = words[0] == "api"
            if words[0] == "files":
                return self._say(200, (hub.folder / words[1]).read_bytes(), ETag='"1"')
            repository, rest = "/".join(words[1 + api : 3 + api]), words[3 + api :]
            folder = hub.folder / repository
            if not folder.is_dir():
                return self._no(401, "RepoNotFound")
            if not rest or rest[0] == "revision":
                if rest[1:] not in ([], ["main"], [COMMIT]):
                    return self._no(404, "RevisionNotFound")
                names = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
                return self._say(200, {"id": repository, "sha": COMMIT, "tags": [], "siblings": names})
            if rest[0] == "tree":
                return self._say(200, [self._entry(folder, path) for path in sorted(folder.rglob("*"))])
            if rest[0] == "paths-info":
                asked = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
                return self._say(200, [self._entry(folder, folder / n) for n in asked if (folder / n).exists()])
            if repository in hub.gated:
                return self._no(401, "GatedRepo")
            path = folder / "/".join(rest[2:])
            if not path.is_file():
                return self._no(404, "EntryNotFound")
            content = path.read_bytes()
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self._say(200, content, ETag=tag, X_Repo_Commit=COMMIT)

        def _entry(self, folder: Path, path: Path) -> dict[str, Any]:
            kind, size = ("file", path.stat().st_size) if path.is_file() else ("directory", 0)
            name = str(path.relative_to(folder))
            return {"type": kind, "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}

    return Handler
