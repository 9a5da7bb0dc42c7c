"""The page's server: who may ask, how much, and what it answers."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from beitv2_fast.errors import UserError
from beitv2_fast.show.explore.answers import MAX_UPLOAD
from beitv2_fast.show.explore.server import MAX_JSON, SCRIPTS, STYLES, Server, explore_page


def ask(server: Server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request(method, path, body, {"Host": f"127.0.0.1:{server.server_port}", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.headers)
    finally:
        connection.close()


def test_it_listens_on_this_computer_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1", "127.0.0.1:1", "localhost.example.com", "0.0.0.0"])
@pytest.mark.parametrize("path", ["/", "/api/info"])
def test_a_request_under_another_name_is_refused(server, host, path):
    status, body, _ = ask(server, "GET", path, Host=host)
    assert status == 403 and b"<html" not in body


def test_a_request_without_a_host_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(b"GET /api/info HTTP/1.0\r\n\r\n")
        assert b"403" in connection.recv(1000).split(b"\r\n")[0]


def test_localhost_is_a_name_of_this_computer(server):
    assert ask(server, "GET", "/api/info", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("origin", ["https://example.com", "null", "http://127.0.0.1:1"])
def test_a_request_by_another_page_is_refused(server, origin):
    body = json.dumps({"key": "sample-0", "hidden": [1]}).encode()
    assert ask(server, "POST", "/api/predict", body, Origin=origin)[0] == 403


def test_the_page_is_one_document_that_loads_nothing_from_elsewhere(server):
    status, body, headers = ask(server, "GET", "/")
    text = body.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text) and "@import" not in text
    assert "<link" not in text.replace('<link rel="icon" href="data:,">', "") and "<script src" not in text
    assert not re.findall(r"https?://", text)
    assert "/*STYLES*/" not in text and "/*SCRIPTS*/" not in text


def test_only_the_pages_own_scripts_may_run(server):
    policies = [ask(server, "GET", "/")[2]["Content-Security-Policy"] for _ in range(2)]
    nonces = [re.search(r"script-src 'nonce-([\w-]{20,})'", policy)[1] for policy in policies]
    assert nonces[0] != nonces[1]
    assert all("default-src 'none'" in policy and "unsafe" not in policy for policy in policies)
    assert explore_page("abc").count('nonce="abc"') == 2


def test_a_picture_of_an_uploaded_image_can_be_had(server, answers):
    status, body, _ = ask(server, "POST", "/api/image", answers.runs.samples.read(0))
    assert status == 200
    status, picture, headers = ask(server, "GET", f"/api/image/{json.loads(body)['key']}")
    assert status == 200 and headers["Content-Type"] == "image/png" and picture[:4] == b"\x89PNG"


@pytest.mark.parametrize("path", ["/api/thumb/0", "/api/patch/0/3", "/api/typical"])
def test_pictures_are_pictures(server, path):
    status, body, headers = ask(server, "GET", path)
    assert status == 200 and body[:3] in (b"\xff\xd8\xff", b"\x89PN") and headers["Content-Type"].startswith("image/")


@pytest.mark.parametrize("path, most", [("/api/image", MAX_UPLOAD), ("/api/predict", MAX_JSON)])
def test_a_body_that_is_too_long_is_refused_before_it_is_read(server, path, most):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Length: {most + 1}\r\n\r\n"
        connection.sendall(head.encode())
        assert b"413" in connection.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "length", ["", "Content-Length: -1\r\n", "Content-Length: x\r\n", "Transfer-Encoding: chunked\r\n"]
)
def test_a_body_of_unknown_length_is_refused(server, length):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(f"POST /api/image HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n{length}\r\n".encode())
        assert b"411" in connection.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b"{}", b'{"key": "sample-0"}', b'{"key": "sample-0", "hidden": ["x"]}',
             b'{"key": "sample-0", "hidden": 3}', b'{"key": "nobody", "hidden": [1]}', b"\xff",
             b'{"key": "sample-0", "hidden": [1e999]}', b"[" * 100_000],
)  # fmt: skip
def test_a_question_that_makes_no_sense_is_the_askers_mistake(server, body):
    ask(server, "GET", "/api/sample/0")
    status, answer, _ = ask(server, "POST", "/api/predict", body)
    assert status == 400 and "error" in json.loads(answer)


@pytest.mark.parametrize("path, status", [("/api/sample/99", 400), ("/api/code/-1", 400), ("/api/patch/x/1", 400),
    ("/../../etc/passwd", 404), ("/api/image/..%2f..%2fx", 400), ("/x", 404)])  # fmt: skip
def test_what_does_not_exist_is_not_found(server, path, status):
    assert ask(server, "GET", path)[0] == status


def test_a_port_in_use_is_named(server, answers):
    with pytest.raises(UserError, match=f"port {server.server_port}.*--port"):
        Server(answers, server.server_port).server_close()


def test_the_page_is_part_of_what_is_installed(tmp_path):
    """``build_py`` copies what a wheel holds of Python and of package data."""
    source = Path(__file__).resolve().parents[3]
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    wanted = {path.name for path in (source / "beitv2_fast" / "show" / "explore" / "page").iterdir()}
    assert {path.name for path in (tmp_path / "beitv2_fast" / "show" / "explore" / "page").iterdir()} == wanted
    assert {"page.html", *STYLES, *SCRIPTS} == wanted
