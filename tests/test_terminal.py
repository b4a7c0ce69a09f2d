import pytest

from mole import terminal
from mole.terminal import BarReporter, LineReporter, duration


def test_durations() -> None:
    assert [duration(s) for s in (7.4, 200, 7500)] == ["7 s", "3 min 20 s", "2 h 5 min"]


def test_without_a_terminal_a_line_comes_about_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 10.0, 31.0, 40.0, 70.0, 80.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with LineReporter().stage("train", 1000, "steps") as advance:
        for done in (0, 100, 310, 400, 700):
            advance(done)
    assert capsys.readouterr().out.splitlines() == [
        "train: 1,000 steps",
        "train: 310 of 1,000 steps, 10.0 steps/s, 1 min 9 s left",
        "train: 700 of 1,000 steps, 10.0 steps/s, 30 s left",
        "train: finished in 1 min 20 s",
    ]


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with BarReporter().stage("train", 10, "steps") as advance:
        advance(10)
    shown = capsys.readouterr().err
    assert "train" in shown and "10.0/10.0" in shown and "steps/s" in shown
