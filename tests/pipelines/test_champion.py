"""The table of a run against the champion, and that promotion is asked once about the same results."""

import pytest

from pipelines.flows import champion
from pipelines.promote import Decision


def test_table_holds_scores_with_intervals_and_differences_in_points():
    before = {"knn/val_top1": 0.80, "knn/val_top1_low": 0.78, "knn/val_top1_high": 0.82, "probe/val_top1": 0.5}
    now = {"knn/val_top1": 0.823, "knn/val_top1_low": 0.80, "knn/val_top1_high": 0.84, "knn/test_top1": 0.81}
    rows = champion.comparison(Decision(True, "", "2", before, now))
    assert [list(row.values()) for row in rows] == [
        ["knn, test", "", "81.0", ""],
        ["knn, val", "80.0 (78.0-82.0)", "82.3 (80.0-84.0)", "+2.3"],
        ["probe, val", "50.0", "", ""],
    ]


def test_promotion_is_asked_again_when_results_change_or_it_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DINO_ROOT", raising=False)
    (tmp_path / "dvc.lock").write_text("first")

    def away(params: object) -> Decision:
        raise OSError("no server")

    monkeypatch.setattr(champion, "consider", away)
    with pytest.raises(OSError, match="no server"):
        champion.decide(None)
    assert champion.is_news()
    monkeypatch.setattr(champion, "consider", lambda params: Decision(False, "not better"))
    assert champion.decide(None).words == "not better"
    assert not champion.is_news()
    (tmp_path / "dvc.lock").write_text("second")
    assert champion.is_news()
