"""The progress line: what it makes of the time that is over."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from allyouneed.core import progress
from allyouneed.core.progress import Progress, StepProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its only element is the time."""
    time = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


def seconds_left(clock: list[float], steps: list[float], total: int, done: int = 0) -> list[float]:
    """What is said to be left after each of these steps."""
    with StepProgress("train", total, done=done, stream=io.StringIO()) as line:
        found = []
        for seconds in steps:
            clock[0] += seconds
            line.update()
            found.append(line.left(clock[0] - line.started))
    return found


def test_steps_that_take_alike_have_their_mean(clock):
    assert seconds_left(clock, [2.0] * 4, total=10) == pytest.approx([18.0, 16 + 1.6, 14 + 1.4, 12 + 1.2])
    assert seconds_left(clock, [2.0] * 2, total=10, done=5) == pytest.approx([8.0, 6 + 0.6])


def test_one_step_that_took_long_is_no_measure_for_the_rest(clock):
    """Two rounds of 100 steps of 1 s, each begun by 400 s of writing: 1,000 s in all."""
    round_ = [401.0] + [1.0] * 99
    left = seconds_left(clock, round_ * 2, total=200)
    over = [sum((round_ * 2)[: i + 1]) for i in range(200)]
    wrong = [abs(said - (1000 - past)) for said, past in zip(left, over, strict=True)]
    by_the_mean = [abs(past / (i + 1) * (199 - i) - (1000 - past)) for i, past in enumerate(over)]
    assert left[0] == 401 * 199  # nothing else is known
    assert max(wrong[1:100]) < 210 and max(by_the_mean[1:100]) > 30_000
    assert all(ours <= theirs + 1 for ours, theirs in zip(wrong[100:], by_the_mean[100:], strict=True))


def test_answers_that_end_at_once_have_their_mean(clock):
    """64 a minute, as a batch has them that all run to their limit."""
    with Progress("write", 256, unit="answer", stream=io.StringIO()) as line:
        for minutes in (3, 2, 1):
            clock[0] += 60
            for _ in range(64):
                line.update()
            assert line.left(clock[0] - line.started) == 60 * minutes


def test_the_line(clock, capsys):
    stream = io.StringIO()
    with Progress("write", 8, unit="answer", stream=stream) as line:
        clock[0] += 4
        line.update(2, errors=0)
    assert stream.getvalue().splitlines() == ["write  2/8  errors 0  2 s/answer  12s left"] * 2
