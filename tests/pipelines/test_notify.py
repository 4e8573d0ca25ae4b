"""The webhook, told by real HTTP."""

from collections.abc import Iterator

import pytest
from listener import Listener, listening

from pipelines.flows import notify


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as server:
        yield server


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
