"""Lines of progress in a log: how many, as often as asked."""

import pytest

from pipelines.processes.progress import heard, progress


def lines(capsys: pytest.CaptureFixture[str], advances: int) -> list[str]:
    with progress("train:", advances * 4) as advance:
        for _ in range(advances):
            advance(4, "loss 1.5")
    return capsys.readouterr().out.splitlines()


def test_what_is_done_soon_needs_no_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINO_PROGRESS_SECONDS", raising=False)
    assert lines(capsys, 5) == []


def test_a_line_for_every_advance(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_PROGRESS_SECONDS", "0")
    printed = lines(capsys, 3)
    assert [line.split(" images")[0] for line in printed] == ["train: 4 of 12", "train: 8 of 12", "train: 12 of 12"]
    assert printed[-1].endswith("/s, 0:00 min left; loss 1.5")


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_no_number_of_seconds_is_one_clear_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_PROGRESS_SECONDS", text)
    with (
        pytest.raises(ValueError, match=f"DINO_PROGRESS_SECONDS is '{text}': choose a number of seconds"),
        progress("", 1),
    ):
        pass


def test_a_line_of_progress_is_read_back(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_PROGRESS_SECONDS", "0")
    with progress("pretrain:", 54_000) as advance:
        advance(13_500, "loss 4.21")
    line = capsys.readouterr().out.strip()
    found = heard(line)
    assert found is not None
    assert found[0] == 25.0
    assert f"pretrain: {found[1]}" == line and "left; loss 4.21" in found[1]
    assert heard("pretrain: 54,000 images, 5 epochs") is None
    assert heard("") is None
