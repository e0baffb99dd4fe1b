from __future__ import annotations

import io

import pytest

from megafish import progress
from megafish.progress import format_quantity, format_seconds, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_quantities() -> None:
    assert format_quantity(1023, "B") == "1023 B"
    assert format_quantity(3 << 20, "B") == "3.0 MiB"
    assert format_quantity(0.25, "steps") == "0.2 steps"
    assert format_quantity(7, "") == "7"
    assert format_quantity(12_345, "tokens") == "12.3 ktokens"
    assert format_seconds(59.6) == "1:00"
    assert format_seconds(3725) == "1:02:05"


def test_plain_lines_are_rare_and_tell_rate_and_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    with track(100, "reading", "docs", stream=stream) as tracker:
        for _ in range(60):
            clock.now += 1
            tracker.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 7  # one in ten seconds, and the last
    assert lines[0] == "reading: 10 docs of 100 docs (10 %), 1 docs/s, 1:30 left"
    assert lines[-1] == "reading: 60 docs in 1:00"


def test_short_work_says_nothing(clock: Clock) -> None:
    stream = io.StringIO()
    with track(3, "reading", "docs", stream=stream) as tracker:
        tracker.advance(3)
    assert stream.getvalue() == ""


def test_work_done_before_does_not_count_as_fast(clock: Clock) -> None:
    stream = io.StringIO()
    with track(100, "reading", "docs", stream=stream) as tracker:
        tracker.set(80, already_done=True)
        clock.now += 10
        tracker.advance(10)
    assert "90 docs of 100 docs (90 %), 1 docs/s, 0:10 left" in stream.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with track(10, "reading", "docs", stream=stream) as tracker:
        tracker.advance(10)
        tracker.note("beside [the] bar")
    assert "reading" in stream.getvalue() and "10 docs of 10 docs (100 %)" in stream.getvalue()
    assert "beside [the] bar" in stream.getvalue()


def test_switched_off(clock: Clock) -> None:
    stream = Terminal()
    with track(10, "reading", "docs", enabled=False, stream=stream) as tracker:
        clock.now += 100
        tracker.advance(10)
        tracker.note("nothing")
    assert stream.getvalue() == ""


def test_a_failure_passes_through(clock: Clock) -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), track(None, "reading", stream=stream):
        clock.now += 60
        raise KeyError
    assert stream.getvalue() == ""
