"""The webhook, told by real HTTP."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipelines import notify


class Listener(HTTPServer):
    """Keeps what it was told, and answers with `status`."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, str]]] = []
        self.status = 200
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_text_arrives_and_the_secret_comes_from_the_environment(listener, monkeypatch):
    monkeypatch.setenv("HOOK_TOKEN", "s3cret")
    said = notify.tell(f"{listener.address}/services/$HOOK_TOKEN", "pretrain failed: ümlaut")
    assert listener.heard == [("/services/s3cret", {"text": "pretrain failed: ümlaut"})]
    assert said == "127.0.0.1 was told"


def test_a_long_text_is_cut(listener):
    notify.tell(listener.address, "x" * 10_000)
    assert len(listener.heard[0][1]["text"]) == notify.MAX_CHARACTERS


@pytest.mark.parametrize("webhook", ["{}/s3cret", "http://127.0.0.1:9/s3cret", "http://s3cret.invalid:port/s3cret"])
def test_who_cannot_be_told_is_named_without_the_secret(listener, webhook):
    listener.status = 500
    said = notify.tell(webhook.format(listener.address), "text")
    assert "was not told" in said
    assert "/s3cret" not in said


def test_a_secret_that_is_not_set_is_named_and_nobody_asked(listener):
    said = notify.tell(f"{listener.address}/${{NO_SUCH_TOKEN}}", "text")
    assert "$NO_SUCH_TOKEN" in said and "does not set" in said
    assert not listener.heard
