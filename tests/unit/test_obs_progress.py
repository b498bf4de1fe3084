"""Elapsed and remaining times by hand, plain lines where there is no terminal, and the watchdog."""

import io
import time

import pytest
from rich.console import Console

from togi.obs.progress import Progress, Watchdog, duration, expected


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain(clock=None, **options):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=200)
    return Progress(console, **({"clock": clock} if clock else {}), **options), stream


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


def test_expectation_is_the_median_of_the_past_or_the_guess():
    assert expected([]) is None
    assert expected([], 25.0) == 25.0
    assert expected([1.0, 100.0, 3.0], 25.0) == 3.0  # one slow outlier does not matter


def test_remaining_time_of_steps():
    clock = Clock()
    progress, _ = plain(clock)
    progress.start_steps(total=10, done=1)
    clock.now += 5.0
    progress.step(2)
    assert progress.remaining_seconds() == 40.0  # 8 steps of 5 s
    clock.now += 2.0
    assert progress.remaining_seconds() == 38.0
    clock.now += 1.0
    progress.step(3)  # took 3 s
    assert progress.remaining_seconds() == 28.0  # 7 x 4, the median
    clock.now += 1.0
    assert progress.remaining_seconds() == 27.0
    clock.now += 60.0  # an overdue step never makes the rest negative
    assert progress.remaining_seconds() == 24.0
    assert progress.describe() == "step 3/10 | about 24 s to go"


def test_nothing_is_claimed_before_anything_is_known():
    progress, _ = plain(Clock())
    assert progress.describe() == "waiting"
    progress.start_steps(total=4)
    assert progress.remaining_seconds() is None
    assert progress.describe() == "step 0/4"


def test_phases_say_elapsed_and_left_and_are_timed_for_the_record():
    clock = Clock()
    progress, stream = plain(clock)
    with progress.phase("starting the engine", expected_seconds=25):
        clock.now += 10
        assert progress.describe() == "starting the engine: 10 s, about 15 s left"
        clock.now += 20
        assert progress.describe() == "starting the engine: 30 s, expected 25 s"
    with progress.phase("starting the engine", expected_seconds=25):
        clock.now += 10
        assert progress.describe() == "starting the engine: 10 s, about 20 s left"  # 30 s is what it took before
    assert progress.take_seconds() == {"starting the engine": 40.0}
    assert progress.take_seconds() == {}
    assert stream.getvalue() == "starting the engine (about 25 s)\nstarting the engine: done in 30 s\n"


def test_a_failed_phase_teaches_nothing():
    clock = Clock()
    progress, _ = plain(clock)
    with pytest.raises(KeyError), progress.phase("train"):
        clock.now += 9
        raise KeyError
    with progress.phase("train"):
        assert progress.describe() == "train: 0.0 s"


def test_plain_output_speaks_at_least_once_an_interval_and_stops():
    progress, stream = plain(interval=0.1)
    with progress, progress.phase("loading"):
        time.sleep(0.35)
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 6
    assert lines[1].startswith("loading: 0.")
    time.sleep(0.15)
    assert stream.getvalue().splitlines() == lines


def test_quick_steps_do_not_flood_a_log_file():
    clock = Clock()
    progress, stream = plain(clock)
    progress.start_steps(total=100)
    for step in range(1, 101):
        clock.now += 0.1
        progress.step(step, note="reward 0.5")
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 7
    assert lines[-1] == "step 100/100 | reward 0.5"


def test_quiet_is_silent_and_still_keeps_time():
    clock = Clock()
    progress, stream = plain(clock, quiet=True)
    with progress, progress.phase("train"):
        clock.now += 3
    assert stream.getvalue() == ""
    assert progress.take_seconds() == {"train": 3.0}


def test_a_terminal_gets_a_live_line():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with Progress(console) as progress:
        progress.start_steps(total=4)
        with progress.phase("generate"):
            time.sleep(0.3)
        progress.step(1)
        time.sleep(0.3)
    assert "step 0/4 | generate: 0." in stream.getvalue()
    assert "step 1/4 | about" in stream.getvalue()


def test_the_watchdog_dumps_stacks_only_without_heartbeats(tmp_path):
    path = tmp_path / "stacks.txt"
    with Watchdog(0.4, path) as watchdog:
        for _ in range(5):
            time.sleep(0.1)
            watchdog.beat()
        assert path.read_text() == ""
        time.sleep(0.7)
    assert "test_the_watchdog_dumps_stacks" in path.read_text()
