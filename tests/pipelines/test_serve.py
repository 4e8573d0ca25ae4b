"""What the schedule's command understands and refuses."""

from datetime import timedelta

import pytest

from pipelines.serve import interval, main, schedule, time_zone


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("15m", 900), ("6h", 21600), ("1d", 86400), ("1.5h", 5400), (" 2m ", 120)]
)
def test_times_between_ticks(text, seconds):
    assert interval(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["15", "m", "0s", "-5m", "15 minutes", "", "1w"])
def test_what_is_no_time_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"--every .* such as 15m"):
        interval(text)


def test_cron_is_cron_in_a_zone():
    chosen = schedule("0 3 * * *", None, "Europe/Berlin")
    assert (chosen.cron, chosen.timezone) == ("0 3 * * *", "Europe/Berlin")


@pytest.mark.parametrize("text", ["every night", "61 * * * *", "0 3 * *", ""])
def test_what_is_no_cron_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r'--cron .* "0 3 \* \* \*" is 3:00 each night'):
        schedule(text, None, "UTC")


def test_a_zone_is_the_named_one_or_this_machines():
    assert time_zone("America/New_York") == "America/New_York"
    assert time_zone(time_zone(None)) == time_zone(None)
    with pytest.raises(ValueError, match="no such zone; choose one such as"):
        time_zone("Europe/Berln")


def test_elsewhere_is_one_line_before_any_server_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--every", "1h"]) == 1
    told = capsys.readouterr().err
    assert "run from the repository's root" in told
    assert told.count("\n") == 1
