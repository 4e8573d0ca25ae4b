"""Speed and waiting of a training, in numbers and words."""

from pipelines.training.pace import ADVICE, Pace


def test_share_of_time_and_advice_where_it_is_high() -> None:
    clock = [100.0]
    pace = Pace(lambda: clock[0])
    pace.images = 640
    clock[0] += 10.0
    pace.waited(1.0)
    assert pace.numbers() == {"images_per_second": 64.0, "waiting_for_data": 0.1}
    assert pace.note() == "" and pace.verdict() == "64 images/s, 10% of the time waiting for data"
    pace.waited(3.0)
    assert pace.note() == ", 40% of the time waiting for data"
    assert pace.verdict() == f"64 images/s, 40% of the time waiting for data: {ADVICE}"
    assert "data.max_short_px" in ADVICE
