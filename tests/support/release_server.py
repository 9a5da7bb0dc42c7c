"""A server on 127.0.0.1 in the place of the authors' release page and of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from beitv2_fast.runs import sources

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Serves ``files`` {path: bytes} and, as the hub does, ``repositories`` {name: {file: bytes}}; keeps ``asked``.

    cut: paths whose connection ends after half of the bytes that were announced.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent = 0  # bytes of contents
        self.cut: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def got(self, path: str) -> int:
        return self.asked.count(("GET", path))

    def publish(self, name: str, state: dict[str, torch.Tensor], folder: Path) -> None:
        """The weights as a published file of this name."""
        file = folder / f"{name}.served"
        torch.save({"model": dict(state)}, file)
        self.files[f"/{sources.PUBLISHED[name].file}"] = file.read_bytes()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path))
        content, headers = self.server.files.get(path), {}
        for name, files in self.server.repositories.items():
            if path.startswith(f"/api/models/{name}"):
                about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                tree = [{"type": "file", "path": f, "size": len(v), "oid": COMMIT} for f, v in files.items()]
                content = json.dumps(tree if "/tree/" in path else about).encode()
            elif path.startswith(f"/{name}/resolve/"):
                content = files.get(path.split("/", 5)[-1])
                headers = {"X-Repo-Commit": COMMIT}
        if content is None:
            self.send_error(404)
            return
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        goes_on = self.headers.get("If-Range") == headers["ETag"] and "Range" in self.headers
        first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if goes_on else 0
        if first >= max(len(content), 1):
            self.send_error(416)
            return
        content = content[first:]
        headers |= {"Content-Length": str(len(content))}
        self.send_response(206 if goes_on else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            with suppress(ConnectionError):
                self.server.sent += self.wfile.write(
                    content[: len(content) // 2] if path in self.server.cut else content
                )
            self.close_connection = True


@contextmanager
def serving(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server that PUBLISHED's addresses and the hub's lead to, with empty caches in a folder."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    patch.setattr(sources, "RELEASE", server.url)
    patch.setenv("TORCH_HOME", str(cache / "torch"))
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def without_digests(patch: pytest.MonkeyPatch) -> None:
    """Random weights cannot have the hashes of the published ones."""
    patch.setattr(sources.Published, "digest", None)
