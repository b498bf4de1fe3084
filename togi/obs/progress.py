"""Progress on standard error: start-up phases, steps, and the phases of a step, with expected times.

On a terminal one live line with a spinner; elsewhere (log files, CI) plain lines, at least one every ``interval``
seconds. Expected times come from the run itself (the median of recent ones) and, before there are any, from the caller.
The phase times also go into the step record (``take_seconds``). Metrics and log records are elsewhere.
"""

from __future__ import annotations

import faulthandler
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_WINDOW = 20
_STEP_LINE_SECONDS = 2.0


def expected(past: Sequence[float], guess: float | None = None) -> float | None:
    """The expected duration of something in seconds: the median of its ``past`` ones, else the caller's guess."""
    return statistics.median(past) if past else guess


@dataclass(frozen=True, slots=True, eq=False)
class Activity:
    """A running phase."""

    name: str
    started: float
    expected: float | None

    def describe(self, now: float) -> str:
        elapsed = now - self.started
        text = f"{self.name}: {duration(elapsed)}"
        if self.expected is None:
            return text
        left = self.expected - elapsed
        return f"{text}, about {duration(left)} left" if left > 0 else f"{text}, expected {duration(self.expected)}"


@dataclass(slots=True)
class _Steps:
    done: int = 0
    first: int = 0
    total: int = 0
    last_end: float = 0.0
    note: str = ""
    past: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


class Progress:
    """A context manager for the process that talks to the user. Phases may run in several threads.

    ``quiet``: show nothing but keep time; ``clock``: in seconds, replaced in tests only.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True)
        self._clock, self._interval, self._quiet = clock, interval, quiet
        self._lock = threading.RLock()
        # Phases in progress, and the seconds of finished ones since the last step record.
        self._active: list[Activity] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._past: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        # The innermost phase that the last error came out of.
        self._broke: BaseException | None = None
        self._broke_in = ""
        self._steps = _Steps(last_end=clock())
        # Plain lines come from a timer thread; a terminal has a live line instead.
        self._last_line = clock()
        self._stop = threading.Event()
        self._timer = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._line, console=self.console, refresh_per_second=5, transient=True)

    @property
    def _is_live(self) -> bool:
        return self.console.is_terminal and not self._quiet

    def __enter__(self) -> Progress:
        if self._is_live:
            self._live.start()
        elif not self._quiet:
            self._timer.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        if self._is_live:
            self._live.stop()
        elif not self._quiet:
            self._timer.join()

    @contextmanager
    def phase(self, name: str, expected_seconds: float | None = None) -> Iterator[None]:
        """Time a phase. ``expected_seconds`` is used until the phase has run once."""
        past = self._past[name]
        first_time, activity = not past, Activity(name, self._clock(), expected(past, expected_seconds))
        with self._lock:
            self._active.append(activity)
        if first_time:
            about = "" if activity.expected is None else f" (about {duration(activity.expected)})"
            self._say(f"{name}{about}", plain_only=True)
        try:
            yield
        finally:
            seconds, error = self._clock() - activity.started, sys.exception()
            with self._lock:
                if error is not None and error is not self._broke:
                    self._broke, self._broke_in = error, name
                self._active.remove(activity)
                self._seconds[name] += seconds
        # Only now: a failed phase says nothing about how long it takes.
        with self._lock:
            past.append(seconds)
        if first_time:
            self._say(f"{name}: done in {duration(seconds)}", plain_only=False)

    def start_steps(self, total: int, done: int = 0) -> None:
        """Start counting steps; ``done`` of ``total`` were done before (a resumed run)."""
        with self._lock:
            self._steps = _Steps(done=done, first=done, total=total, last_end=self._clock())
            self._broke_in = ""

    def step(self, done: int, note: str = "") -> None:
        """Step number ``done`` (from 1) is finished. ``note``: a headline such as "reward 0.41"."""
        with self._lock:
            now, steps = self._clock(), self._steps
            assert done > steps.done, f"step {done} finished after step {steps.done}"
            steps.past.append((now - steps.last_end) / (done - steps.done))
            steps.done, steps.last_end, steps.note = done, now, note
            # Fast steps would flood a log file, so lines keep a distance; the first and the last step are always shown.
            due = now - self._last_line >= _STEP_LINE_SECONDS or done in (steps.first + 1, steps.total)
        if due:
            self._say(self.describe(), plain_only=True)

    def place(self) -> str:
        """The step and the phase that the last error came out of, in words."""
        with self._lock:
            steps = self._steps
            step = (
                f"in step {min(steps.done + 1, steps.total)} of {steps.total}"
                if steps.total
                else "before the first step"
            )
            return f"{step}, {self._broke_in}" if self._broke_in else step

    def remaining_seconds(self) -> float | None:
        """Seconds until the last step ends, less what the current step has used; None if nothing is known yet."""
        with self._lock:
            steps = self._steps
            each = expected(steps.past)
            if each is None or steps.total == 0:
                return None
            used = min(self._clock() - steps.last_end, each) if steps.done < steps.total else 0.0
            return each * (steps.total - steps.done) - used

    def take_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call, for the step record. Nested phases count in both."""
        with self._lock:
            taken = dict(self._seconds)
            self._seconds.clear()
            return taken

    def describe(self) -> str:
        """The current state in one line."""
        with self._lock:
            now, steps, parts = self._clock(), self._steps, []
            if steps.total:
                parts.append(f"step {steps.done}/{steps.total}")
                if steps.note:
                    parts.append(steps.note)
                left = self.remaining_seconds()
                if left is not None and steps.done < steps.total:
                    parts.append(f"about {duration(left)} to go")
            parts += [activity.describe(now) for activity in self._active]
            return " | ".join(parts) or "waiting"

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._say(text, plain_only=False)

    def _say(self, text: str, plain_only: bool) -> None:
        """Print a line; on a terminal only one that should stay."""
        if self._quiet or (plain_only and self._is_live):
            return
        with self._lock:
            self._last_line = self._clock()
        self.console.print(Text(text), soft_wrap=True)

    def _tick(self) -> None:
        while not self._stop.wait(self._interval / 10):
            if self._clock() - self._last_line >= self._interval * 0.9:
                self._say(self.describe(), plain_only=True)

    def _line(self) -> Table:
        """The live line: spinner, bar while there are steps, text."""
        grid = Table.grid(padding=(0, 1))
        cells: list[Spinner | ProgressBar | Text] = [self._spinner]
        if self._steps.total:
            cells.append(ProgressBar(total=self._steps.total, completed=self._steps.done, width=24))
        cells.append(Text(self.describe(), overflow="ellipsis", no_wrap=True))
        grid.add_row(*cells)
        return grid


# A watchdog for hangs: without a heartbeat in time it writes the Python stacks of all threads to a file.
#
# It only writes: ending a stalled process is up to its supervisor. ``faulthandler`` has one timer per process, so use one
# ``Watchdog`` per process; the timer runs outside the interpreter and fires while native code holds the lock.


class Watchdog:
    """Call ``beat`` at least every ``seconds`` inside the block; otherwise the stacks are written to ``dump_path``."""

    def __init__(self, seconds: float, dump_path: Path) -> None:
        assert seconds > 0, f"a watchdog of {seconds} s"
        self._seconds = seconds
        self._file = dump_path.open("a", encoding="utf-8")

    def beat(self) -> None:
        faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def __enter__(self) -> Watchdog:
        self.beat()
        return self

    def __exit__(self, *failure: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
