"""The page's server: HTTP of the standard library on 127.0.0.1, only for the person at this computer.

Every request has to name this server as its host, so that a web page elsewhere cannot reach it under a name of its own
that resolves to 127.0.0.1 (DNS rebinding); a request that another page makes is refused by its Origin. Bodies are
bounded, and images are decoded by ``answers``, which bounds their pixels.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from ...config.show import ExploreConfig
from ...errors import UserError
from ..theme import DARK, LIGHT
from .answers import MAX_UPLOAD, Answers, BadRequest

ADDRESS = "127.0.0.1"
MAX_JSON = 1 << 20
TIMEOUT = 30  # seconds that a connection may be silent
STYLES = ("style.css",)
SCRIPTS = ("server.js", "board.js", "patch.js", "game.js", "main.js")


def explore_page(nonce: str) -> str:
    """The page as one document, with its styles and scripts in it; ``nonce``: of its content security policy."""
    folder = files(__package__) / "page"
    themes = f":root {{ {LIGHT.css()} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {DARK.css()} }} }}\n"
    styles = themes + "\n".join((folder / name).read_text(encoding="utf-8") for name in STYLES)
    scripts = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    text = (folder / "page.html").read_text(encoding="utf-8")
    return text.replace("/*STYLES*/", styles).replace("/*SCRIPTS*/", scripts).replace("NONCE", nonce)


class Server(ThreadingHTTPServer):
    """Serves answers. port 0: any that is free; ``url`` says which."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answers: Answers, port: int = 0):
        self.answers = answers
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise UserError(
                f"the page cannot be served on port {port} ({error}). Choose another --port, or 0 for any that is free."
            ) from error
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a connection early is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET: the page, its pictures, facts. POST: an image, or a question in JSON."""

    server: Server
    server_version, sys_version = "beitv2-fast", ""
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, find: Callable[[list[str]], None]) -> None:
        """Check where the request comes from, then answer it; whatever is wrong with it is said in JSON."""
        origin = self.headers.get("Origin")
        allowed = self.headers.get("Host") in self.server.hosts
        if not allowed or origin not in (None, *(f"http://{host}" for host in self.server.hosts)):
            here = f"{self.server.url} (through ssh -L: the same port at both ends)"
            self._refuse(HTTPStatus.FORBIDDEN, f"this page answers only at its own address: {here}")
            return
        try:
            find([part for part in urlsplit(self.path).path.split("/") if part])
        except BadRequest as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST, "this request cannot be understood")

    def _get(self, path: list[str]) -> None:
        answers = self.server.answers
        match path:
            case []:
                nonce = secrets.token_urlsafe(16)
                self._send(explore_page(nonce).encode(), "text/html; charset=utf-8", nonce=nonce)
            case ["api", "info"]:
                self._json(answers.info())
            case ["api", "sample", number]:
                self._json(answers.sample(int(number)))
            case ["api", "code", code]:
                self._json(answers.code(int(code)))
            case ["api", "mask", seed]:
                self._json(answers.mask(int(seed) % 2**31))
            case ["api", "image", key]:
                self._send(answers.picture(key), "image/png")
            case ["api", "thumb", number]:
                self._send(answers.thumb(int(number)), "image/jpeg", keep=True)
            case ["api", "patch", image, patch]:
                self._send(answers.patch(int(image), int(patch)), "image/jpeg", keep=True)
            case ["api", "typical"]:
                self._send(answers.typical, "image/png", keep=True)
            case _:
                self._refuse(HTTPStatus.NOT_FOUND, "there is nothing at this address")

    def _post(self, path: list[str]) -> None:
        answers = self.server.answers
        if path == ["api", "image"]:
            body = self._body(MAX_UPLOAD)
            if body is not None:
                self._json(answers.add(body))
            return
        body = self._body(MAX_JSON)
        if body is None:
            return
        asked = json.loads(body)
        match path:
            case ["api", "nearest"]:
                self._json(answers.nearest(str(asked["key"]), int(asked["patch"]), str(asked["model"])))
            case ["api", "attention"]:
                key, patch, model, layer = asked["key"], asked["patch"], asked["model"], asked["layer"]
                self._json(answers.attention(str(key), int(patch), str(model), int(layer)))
            case ["api", "predict"]:
                self._json(answers.predict(str(asked["key"]), [int(patch) for patch in asked["hidden"]]))
            case _:
                self._refuse(HTTPStatus.NOT_FOUND, "there is nothing at this address")

    def _body(self, most: int) -> bytes | None:
        """The request's body; None, and refused, if its length is not said or too much."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the length of the request is not said")
        elif int(length) > most:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the file has more than {most >> 20} MB")
        else:
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                raise ConnectionError("the request ended early")
            return body
        return None

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value, separators=(",", ":")).encode(), "application/json", status)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # a body that was not read is not taken for the next request
        self._json({"error": text}, status)

    def _send(
        self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, *, keep: bool = False, nonce: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "private, max-age=3600" if keep else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        own = f"'nonce-{nonce}'" if nonce else "'none'"
        policy = f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src {own}; style-src {own}"
        self.send_header(
            "Content-Security-Policy", f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal stays quiet."""


def _has_screen() -> bool:
    """Without one, a browser for the terminal might take it over."""
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def serve(answers: Answers, config: ExploreConfig, say: Callable[[str], None] = print) -> int:
    """Serve the page until Ctrl+C."""
    with Server(answers, config.port) as server:
        if answers.runs.problem:
            say(answers.runs.problem)
        say(f"explore: {server.url} (Ctrl+C ends it)")
        sys.stdout.flush()
        if config.browser and _has_screen():
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
    return 0
