"""Environment classes in their processes: what they offer, what they answer, and every way in which one can fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from base64 import b64encode
from pathlib import Path

import psutil
import pytest

from tests.processes import gone
from togi.env.host import EnvironmentHost, HostLimits, Observation
from togi.env.hosted import Facts, environment_of
from togi.errors import EpisodeFailed, UserError
from togi.reward.wire import Complaint, Load, LoadKind
from togi.sample import Outcome, Score

# One class that does what it is told.
MANNERS = '''\
    import asyncio, ctypes, os, random, signal, subprocess, sys, tempfile, time
    from enum import Enum
    from pathlib import Path
    from typing import Literal

    class Colour(Enum):
        RED = "red"
        BLUE = "blue"

    class Manners:
        done = False

        def reset(self, note, how: str = "", **row):
            self.note, self.how, self.count = Path(note), how, 0
            if how == "raise": raise KeyError("no")
            if how == "hang": time.sleep(100)
            if how == "die": os._exit(3)
            if how == "messages": return [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
            if how == "number": return 3
            if how == "nothing": return None
            if how == "set": return [{"role": "user", "content": {1}}]
            if how == "long": return "x" * 1_000_001
            return f"count, {sorted(row)}"

        def add(self, number: int, times: float = 1.0, colour: Colour | None = None) -> float:
            """Add a number.

            It is added as often as wanted.

            Args:
                number: What is added,
                    a whole one.
                times (float, optional): How often.
            """
            self.count += number * times
            self.done = self.count > 100
            return [self.count, colour.name if colour else None]

        async def wait(self, seconds: float) -> str:
            """Wait."""
            await asyncio.sleep(seconds)
            return "waited"

        def act(self, what: Literal["raise", "exit", "die", "kill", "crash", "hang", "long", "print", "set", "nan", "none", "half",
                                    "folder", "modules", "random", "done", "pid"]):
            """Do something."""
            if what == "raise": raise ValueError("two\\nlines")
            if what == "exit": sys.exit(3)
            if what == "die": os._exit(3)
            if what == "kill": os.kill(os.getpid(), 9)
            if what == "crash": ctypes.string_at(0)
            if what == "hang":
                child = subprocess.Popen(["sleep", "100"])
                self.note.write_text(f"{os.getpid()} {child.pid}")
                time.sleep(100)
            if what == "long": return "a" * 600 + "b" * 50_000_000 + "c" * 500
            if what == "print":
                print("x" * 1_000_000)
                os.write(1, b"y" * 1_000_000)
                return sys.stdin.read()
            if what == "set": return {1}
            if what == "nan": return [float("nan")]
            if what == "half": return "\\ud800!"
            if what == "folder":
                self.folder = tempfile.TemporaryDirectory()
                return self.folder.name
            if what == "modules": return [name in sys.modules for name in ("torch", "numpy", "transformers", "asyncio")]
            if what == "random": return random.random()
            if what == "done": self.done = "yes"
            if what == "pid": return os.getpid()

        async def reward(self):
            if self.how == "reward hangs": time.sleep(100)
            if self.how == "reward raises": raise OSError("away")
            return {"nan": float("nan"), "text": "1", "none": None, "parts": {"a": 1, "b": 0.5}, "no parts": {}, "bool": True,
                    "part none": {"a": None}, "part nan": {"a": float("inf")}, "taken": {"total": 1.0}}.get(self.how, self.count)

        def close(self):
            self.note.write_text(f"closed {self.count}")
            if self.how == "close raises": raise OSError("shut")
'''
GAME = """\
    class Game:
        def reset(self, goal: int):
            self.goal, self.said = goal, 0

            return "say it"

        async def step(self, action):
            self.said += 1
            if action == "two": return "x", 0.0
            if action == "nan": return "x", float("nan"), False
            if action == "late": return "x", 1.0, 3
            if action == "bad": raise ValueError("bad")
            return action * 3, None if self.said == 1 else 0.5, self.said == self.goal

        def helper(self, anything):
            pass
"""


def write(folder, source, name="my_env.py"):
    path = folder / name
    path.write_text(textwrap.dedent(source))
    return path


def at(condition, source=MANNERS):
    """The place of the line that begins with a condition, as errors show it."""
    lines = textwrap.dedent(source).splitlines()
    return next(f"at line {n} ({line.strip()[:12]}" for n, line in enumerate(lines, 1) if f"if {condition}" in line)


@contextlib.asynccontextmanager
async def hosted(path, name="Manners", **limits):
    """A host that is closed however the test ends."""
    host = EnvironmentHost.from_file(path, name, HostLimits(**limits))
    try:
        yield host
    finally:
        await host.close()
        assert not psutil.pid_exists(host.zygote_pid)


@contextlib.asynccontextmanager
async def begun(host, note="/dev/null", how="", prompt_id="p-7", **row):
    """An episode after its reset."""
    async with host.episode(prompt_id) as episode:
        await episode.reset({"note": str(note), "how": how, **row})
        yield episode


def test_a_class_is_known_by_its_signatures_and_docstrings(tmp_path):
    async def facts():
        async with hosted(write(tmp_path, MANNERS)) as host, hosted(write(tmp_path, GAME, "g.py"), "Game") as game:
            return await host.facts(), await game.facts()

    found, game = asyncio.run(facts())
    assert [tool["function"]["name"] for tool in found.tools] == ["add", "wait", "act"]
    assert found.tools[0] == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add a number.\n\nIt is added as often as wanted.",
            "parameters": {
                "type": "object",
                "properties": {
                    "number": {"type": "integer", "description": "What is added, a whole one."},
                    "times": {"type": "number", "description": "How often.", "default": 1.0},
                    "colour": {
                        "anyOf": [{"type": "string", "enum": ["red", "blue"], "title": "Colour"}, {"type": "null"}],
                        "default": None,
                    },
                },
                "required": ["number"],
            },
        },
    }
    assert (found.is_game, found.has_reward) == (False, True)
    assert (found.required, found.optional, found.any_column) == (("note",), ("how",), True)
    assert game == Facts((), True, False, ("goal",), (), False)


def test_tools_act_on_an_instance_that_is_one_episode(tmp_path):
    """Two episodes at once, each with its own count, and the light process that all of it takes."""

    async def talk():
        async with hosted(write(tmp_path, MANNERS)) as host, begun(host) as one, begun(host) as other:
            assert await one.reset({"note": "/dev/null", "z": 1, "a": None}) == "count, ['a', 'z']"
            first = await one.reset({"note": "/dev/null", "how": "messages"})
            assert first == [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
            assert await one.reset({"note": "/dev/null", "how": "nothing"}) == []
            assert await one.call("add", {"number": 3}) == Observation("[3.0, null]", False, "", 0)
            again = {"number": 2, "times": 0.5, "colour": "red"}
            assert await one.call("add", again) == Observation('[4.0, "RED"]', False, "", 0)
            assert (await other.call("add", {"number": 1})).text == "[1.0, null]"
            assert await one.call("add", {"number": 100, "times": 2}) == Observation("[204.0, null]", True, "", 0)
            # an int is a float in JSON, and only there; what is asked at the same time is answered in turn
            waited = await asyncio.gather(other.call("wait", {"seconds": 0}), other.call("act", {"what": "none"}))
            assert [observation.text for observation in waited] == ["waited", "null"]
            assert (await other.call("act", {"what": "modules"})).text == "[false, false, false, true]"
            numbers = {(await episode.call("act", {"what": "random"})).text for episode in (one, other)}
            assert len(numbers) == 2
            assert await one.reward() == Score(Outcome.SCORE, 204.0, {"environment": 204.0})

    asyncio.run(talk())


WRONG = [
    ("add", {"number": "3"}, 'number: Input should be a valid integer (it is "3")'),
    ("add", {"number": 3.0}, "number: Input should be a valid integer (it is 3.0)"),
    ("add", {"number": True}, "number: Input should be a valid integer (it is true)"),
    ("add", {"number": 1, "times": "1"}, 'times: Input should be a valid number (it is "1")'),
    ("add", {}, "the argument 'number' is missing"),
    ("add", {"numbers": 1}, "the argument 'number' is missing; there is no argument 'numbers'"),
    ("add", [1], "the arguments are not a JSON object"),
    ("add", {"number": 1, "times": float("nan")}, "times: Input should be a finite number (it is NaN)"),
    ("act", {"what": "sing"}, "what: Input should be 'raise', 'exit', 'die'"),
    ("subtract", {"number": 1}, "there is no tool 'subtract', only add, wait, act"),
    ("reset", {}, "there is no tool 'reset', only"),
    ("_x", {}, "there is no tool '_x', only"),
]
RAISED = [
    (
        "raise",
        "ValueError: two lines",
        "raised ValueError: two lines " + at('what == "raise"'),
    ),
    ("exit", "SystemExit: 3", "raised SystemExit: 3 " + at('what == "exit"')),
    ("set", "TypeError: a set is not JSON", "raised TypeError: a set is not JSON"),
    ("nan", "ValueError: Out of range float values are not JSON compliant", "raised ValueError: Out of range"),
]


def test_what_a_model_does_wrong_and_what_a_tool_raises_are_observations(tmp_path):
    async def talk():
        async with hosted(write(tmp_path, MANNERS)) as host, begun(host) as episode:
            for name, arguments, sentence in WRONG:
                found = await episode.call(name, arguments)
                assert found.text.startswith(f"Error: {sentence}")
                assert found.text == f"Error: {found.error}"
            for what, text, error in RAISED:
                found = await episode.call("act", {"what": what})
                assert found.text.startswith(f"Error: {text}") and "\n" not in found.text
                assert found.error.startswith(f"act() {error}")
            # none of these has touched the instance
            assert (await episode.call("add", {"number": 1})).text == "[1.0, null]"

    asyncio.run(talk())


def test_what_is_long_is_cut_where_it_is_made_and_prints_cross_nothing(tmp_path):
    async def talk():
        async with hosted(write(tmp_path, MANNERS), observation_chars=1001) as host, begun(host) as episode:
            note = "\n[... 50000099 characters left out ...]\n"
            long = await episode.call("act", {"what": "long"})
            assert long == Observation("a" * 501 + note + "c" * 500, False, "", 50_000_099)
            assert (await episode.call("act", {"what": "print"})).text == ""
            assert (await episode.call("act", {"what": "half"})).text == "?!"
            wrong = await episode.call("n" * 5_000_000, {})
            assert (len(wrong.text), len(wrong.error)) == (
                1001 + len("\n[... 4999070 characters left out ...]\n"),
                1000,
            )
            wrong = await episode.call("add", {"number": 1, "n" * 5_000_000: 2})
            assert (wrong.text[:33], len(wrong.error)) == ("Error: there is no argument 'nnnn", 1000)

    asyncio.run(talk())


DIED = "(prompt 'p-7'); let it return, within the machine's memory."


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("hang", "ran longer than 0.5 s in act() and was killed (prompt 'p-7'); make it faster or allow more time."),
        ("die", f"ended its process in act() (exit code 3) {DIED}"),
        ("kill", f"ended its process in act() (killed by SIGKILL) {DIED}"),
        ("crash", f"ended its process in act() (killed by SIGSEGV) {DIED}"),
        (
            "done",
            "has a value of type str as the attribute done (prompt 'p-7'); use True or False.",
        ),
    ],
)
def test_an_episode_that_breaks_is_alone(tmp_path, what, sentence):
    """It is killed with all that it has started, another one goes on, and its own next request says what happened."""
    path, note = write(tmp_path, MANNERS), tmp_path / "note"

    async def talk():
        async with hosted(path, tool_seconds=0.5 if what == "hang" else 60) as host, begun(host) as other:
            async with begun(host, note) as episode:
                with pytest.raises(EpisodeFailed) as failure:
                    await episode.call("act", {"what": what})
                assert str(failure.value) == f"Manners in {path} {sentence}"
                if what != "done":
                    assert (await episode.reward()) == Score(Outcome.ERROR, message=str(failure.value))
                    with pytest.raises(EpisodeFailed) as again:
                        await episode.call("add", {"number": 1})
                    assert str(again.value) == str(failure.value)
            if what == "hang":
                assert all(gone(int(pid)) for pid in note.read_text().split())
            assert (await other.call("add", {"number": 1})).text == "[1.0, null]"

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"how": "raise"}, "raised KeyError: 'no' " + at('how == "raise"')),
        ({"how": "hang"}, "ran longer than 1 s in reset() and was killed "),
        ({"how": "die"}, "ended its process in reset() (exit code 3) "),
        ({"how": "number"}, "returned a value of type int from reset() "),
        ({"how": "set"}, "returned messages from reset() that are not JSON (a set is not JSON) "),
        ({"how": "long"}, "returned 1,000,001 characters from reset(), more than 1,000,000 "),
        ({"note": None}, "needs the column 'note' in reset(), which the row lacks "),
    ],
)
def test_an_episode_that_cannot_begin(tmp_path, row, sentence):
    path = write(tmp_path, MANNERS)

    async def talk():
        async with hosted(path, start_seconds=1.0) as host, host.episode("p-7") as episode:
            with pytest.raises(EpisodeFailed) as failure:
                columns = {"note": "/dev/null", **row}
                await episode.reset({name: value for name, value in columns.items() if value is not None})
            assert str(failure.value).startswith(f"Manners in {path} {sentence}")
            assert "(prompt 'p-7'); " in str(failure.value)

    asyncio.run(talk())


REWARDS = [
    ("", Score(Outcome.SCORE, 2.0, {"environment": 2.0})),
    ("bool", Score(Outcome.SCORE, 1.0, {"environment": 1.0})),
    ("parts", Score(Outcome.SCORE, 1.5, {"a": 1.0, "b": 0.5})),
    ("none", "abstained."),
    ("nan", "returned nan in reward() (prompt"),
    ("text", "returned the string '1' in reward() (prompt"),
    ("no parts", "returned parts of reward() that are not numbers with names (prompt"),
    ("part none", "returned parts of reward() that are not numbers with names (prompt"),
    ("part nan", "returned inf in part 'a' of reward() (prompt"),
    ("reward raises", "raised OSError: away " + at('self.how == "reward raises"')),
    ("reward hangs", "ran longer than 0.5 s in reward() and was killed (prompt 'p-7')"),
]


def test_a_reward_is_a_number_or_an_outcome_that_is_none(tmp_path):
    path = write(tmp_path, MANNERS)

    async def talk():
        async with hosted(path, tool_seconds=0.5) as host:
            for how, expected in REWARDS:
                async with begun(host, how=how) as episode:
                    await episode.call("add", {"number": 2})
                    score = await episode.reward()
                if isinstance(expected, Score):
                    assert score == expected
                else:
                    assert score.outcome is (Outcome.ABSTAIN if how == "none" else Outcome.ERROR)
                    assert score.message.startswith(f"Manners in {path} {expected}")
                    assert score.components == {}

    asyncio.run(talk())


def test_a_game_has_turns_with_rewards(tmp_path):
    async def play():
        async with hosted(write(tmp_path, GAME), "Game", observation_chars=8) as host, host.episode("p-7") as episode:
            assert await episode.reset({"goal": 2}) == "say it"
            assert await episode.step("no") == Observation("nonono", False, "", 0, None)
            shown = "yesy\n[... 1 characters left out ...]\nsyes"
            assert await episode.step("yes") == Observation(shown, True, "", 1, 0.5)
            assert (await episode.reward()).outcome is Outcome.ABSTAIN
            for action, sentence in (
                ("two", "returned a value of type tuple of 2 from step()"),
                ("nan", "returned nan in the reward of step()"),
                ("late", "has a value of type int as done from step()"),
                ("bad", "raised ValueError: bad " + at('action == "bad"', GAME)),
            ):
                with pytest.raises(EpisodeFailed, match=r"prompt 'p-7'") as failure:
                    await episode.step(action)
                assert f" {sentence}" in str(failure.value)

    asyncio.run(play())


def test_close_is_called_whatever_happens_to_an_episode_that_lives(tmp_path, caplog):
    path, note = write(tmp_path, MANNERS), tmp_path / "note"

    async def talk():
        async with hosted(path, tool_seconds=0.5) as host:
            async with begun(host, note) as episode:
                await episode.call("add", {"number": 1})
                folder = Path((await episode.call("act", {"what": "folder"})).text)
                assert folder.is_dir()
            assert note.read_text() == "closed 1.0"
            assert not folder.exists()
            note.unlink()
            with pytest.raises(EpisodeFailed, match="KeyError"):
                async with begun(host, note, "raise"):
                    pass
            assert note.read_text() == "closed 0"
            note.unlink()
            with pytest.raises(ZeroDivisionError):
                async with begun(host, note, "close raises"):
                    raise ZeroDivisionError
            assert note.read_text() == "closed 0"
            assert "raised OSError: shut " + at('self.how == "close raises"') in caplog.text
            # it hangs, so there is nobody to call it
            async with begun(host, note) as episode:
                with pytest.raises(EpisodeFailed):
                    await episode.call("act", {"what": "hang"})
            assert "closed" not in note.read_text()

    asyncio.run(talk())


def test_an_episode_that_is_cancelled_is_killed(tmp_path):
    note = tmp_path / "note"

    async def talk():
        async with hosted(write(tmp_path, MANNERS)) as host:

            async def hang():
                async with begun(host, note) as episode:
                    await episode.call("act", {"what": "hang"})

            task = asyncio.create_task(hang())
            while not (note.exists() and " " in note.read_text()):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert all(gone(int(pid)) for pid in note.read_text().split())
            assert psutil.Process(host.zygote_pid).children() == []

    asyncio.run(talk())


def descriptors(*pids):
    return [psutil.Process(pid).num_fds() for pid in pids]


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.large)])
def test_many_episodes_are_all_accounted_for_and_leave_nothing(tmp_path, count):
    """64 at once, of which some fail in each way: each has the outcome that it was given, and no process or descriptor is left."""
    fates = random.Random(7).choices(
        ["fine", "raise", "die", "kill", "hang", "cancel", "body"], [20, 4, 2, 2, 1, 2, 2], k=count
    )

    async def live(host, number, fate):
        async with begun(host, tmp_path / f"{number}", prompt_id=f"p-{number}") as episode:
            await episode.call("add", {"number": number})
            if fate == "body":
                raise ZeroDivisionError
            if fate == "cancel":
                async with asyncio.timeout(0.05):
                    await episode.call("wait", {"seconds": 100.0})
            if fate not in ("fine", "raise"):
                await episode.call("act", {"what": fate})
            if fate == "raise":
                assert (await episode.call("act", {"what": "raise"})).error
            return (await episode.reward()).value

    async def all_of_them():
        async with hosted(write(tmp_path, MANNERS), processes=64, tool_seconds=3.0) as host:
            async with begun(host):
                pass
            before = descriptors(os.getpid(), host.zygote_pid)
            lives = (live(host, number, fate) for number, fate in enumerate(fates))
            results = await asyncio.gather(*lives, return_exceptions=True)
            zygote = psutil.Process(host.zygote_pid)
            assert zygote.children(recursive=True) == []
            assert descriptors(os.getpid(), host.zygote_pid) == before
            return results

    results = asyncio.run(all_of_them())
    kinds = {"die": EpisodeFailed, "kill": EpisodeFailed, "hang": EpisodeFailed, "cancel": TimeoutError}
    for number, (fate, result) in enumerate(zip(fates, results, strict=True)):
        if fate in ("fine", "raise"):
            assert result == float(number)
        else:
            assert type(result) is kinds.get(fate, ZeroDivisionError), (fate, result)
            assert fate in ("cancel", "body") or f"prompt 'p-{number}'" in str(result)
    for number, fate in enumerate(fates):
        if fate == "hang":
            assert all(gone(int(pid)) for pid in (tmp_path / f"{number}").read_text().split())


def test_no_more_episodes_live_than_are_allowed(tmp_path):
    async def talk():
        async with hosted(write(tmp_path, MANNERS), processes=2) as host:

            async def live():
                async with begun(host) as episode:
                    await episode.call("wait", {"seconds": 0.1})
                    return len(psutil.Process(host.zygote_pid).children())

            return await asyncio.gather(*(live() for _ in range(6)))

    assert max(asyncio.run(talk())) == 2


def test_a_zygote_that_is_killed_is_replaced(tmp_path):
    """Its episodes end with it, and say so; the next ones come from another, also where it dies unseen."""

    async def talk():
        async with hosted(write(tmp_path, MANNERS)) as host:
            async with begun(host) as episode:
                pid = int((await episode.call("act", {"what": "pid"})).text)
                before = host.zygote_pid
                call = asyncio.create_task(episode.call("wait", {"seconds": 100.0}))
                await asyncio.sleep(0.1)
                os.kill(before, signal.SIGKILL)
                with pytest.raises(
                    EpisodeFailed, match=r"the process that starts episodes has ended: killed by SIGKILL"
                ):
                    await call
                assert gone(pid)
            async with begun(host) as episode:
                assert (await episode.call("add", {"number": 1})).text == "[1.0, null]"
            assert host.zygote_pid != before
            os.kill(host.zygote_pid, signal.SIGKILL)
            async with begun(host) as episode:
                assert (await episode.call("add", {"number": 1})).text == "[1.0, null]"

    asyncio.run(talk())


def test_close_ends_what_runs(tmp_path):
    async def talk():
        async with hosted(write(tmp_path, MANNERS)) as host:
            async with begun(host) as episode:
                call = asyncio.create_task(episode.call("wait", {"seconds": 100.0}))
                await asyncio.sleep(0.1)
                await host.close()
                with pytest.raises(EpisodeFailed, match="ended its process in wait"):
                    await call
            with pytest.raises(EpisodeFailed, match="is closed and starts no more episodes"):
                await host.facts()

    asyncio.run(talk())


def test_a_file_edited_during_a_run_changes_nothing(tmp_path):
    path = write(tmp_path, MANNERS)

    async def talk():
        async with hosted(path) as host:
            path.write_text("no Python (")
            for _ in range(2):
                async with begun(host) as episode:
                    assert (await episode.call("add", {"number": 1})).text == "[1.0, null]"
                    assert at('what == "raise"') in (await episode.call("act", {"what": "raise"})).error
                os.kill(host.zygote_pid, signal.SIGKILL)

    asyncio.run(talk())


NOTEBOOK = """\
    import asyncio
    from togi.env.host import EnvironmentHost, HostLimits

    STEP = 5

    class Counter:
        def reset(self):
            self.count = 0
            return "go"

        def up(self, by: int = STEP):
            \"\"\"Count.\"\"\"
            self.count += by
            return self.count

    async def main():
        host = EnvironmentHost.from_class(Counter)
        async with host.episode("p-7") as episode:
            first = await episode.reset({"other": 1})
            print(first, (await episode.call("up", {})).text, (await episode.reward()).message)
        await host.close()

    asyncio.run(main())
"""


def run_script(path, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, path, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


def test_a_class_of_a_notebook_goes_by_value(tmp_path):
    path = write(tmp_path, NOTEBOOK)
    with run_script(path) as process:
        assert process.communicate()[0] == f"go 5 Counter in {path} has no reward().\n"


def test_a_class_that_cannot_be_sent():
    lock = __import__("threading").Lock()

    class Held:
        def reset(self):
            return lock

    with pytest.raises(UserError, match=r"Held in .*test_env_host.py cannot be sent .*; .* its file to --environment"):
        EnvironmentHost.from_class(Held)


DRIVER = """\
    import asyncio, sys
    from togi.env.host import EnvironmentHost

    async def main():
        host = EnvironmentHost.from_file(sys.argv[1], "Manners")
        async with host.episode("p-7") as episode:
            await episode.reset({"note": sys.argv[2]})
            print(host.zygote_pid, flush=True)
            await episode.call("act", {"what": "hang"})

    asyncio.run(main())
"""


def test_nothing_outlives_a_driver_that_is_killed(tmp_path):
    note = tmp_path / "note"
    with run_script(write(tmp_path, DRIVER, "driver.py"), write(tmp_path, MANNERS), note) as driver:
        pids = [int(driver.stdout.readline())]
        while not (note.exists() and " " in note.read_text()):
            assert driver.poll() is None
            time.sleep(0.01)
        pids += [int(pid) for pid in note.read_text().split()]
        assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
        driver.kill()
    assert [gone(pid) for pid in pids] == [True, True, True]


RESET = "class E:\n def reset(self): return ''\n"
DO = f"{RESET} def do(self, x: int): 'Do it.'\n"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("class Other: pass\nx = 1", "does not exist: the file defines Other"),
        ("x = 1", "does not exist: the file defines no class"),
        ("E = 3", "is of type int, not a class"),
        (
            "import no_such_package",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_package' at line 1",
        ),
        ("class E:\n def do(self): 'Do.'", "has no method reset"),
        (RESET, "has no public method that could be a tool, and no step"),
        (
            f"{DO} def __init__(self, size): pass",
            "has a constructor with arguments (missing a required argument: 'size')",
        ),
        (f"{RESET} def do(self, x: int): pass", "has a tool do() (line 3) without a docstring"),
        (f"{RESET} def do(self, x): 'Do it.'", "has a tool do() (line 3) whose argument x has no type hint"),
        (f"{RESET} def do(self, x: no): 'Do it.'", "cannot be imported: NameError: name 'no' is not defined at line 3"),
        (
            f"{RESET} def do(self, x: 'no'): 'Do it.'",
            "has a tool do() (line 3) with a type hint that cannot be read (name 'no' is not defined)",
        ),
        (
            f"{RESET} def do(self, *x: int): 'Do it.'",
            "has a tool do() (line 3) with the argument *x: int, which cannot be",
        ),
        (f"{RESET} def do(self, x: E): 'Do it.'", "cannot be imported: NameError"),
        (
            f"class T: pass\n{RESET} def do(self, x: T): 'Do it.'",
            "has a tool do() (line 4) with an argument of a type that has no JSON form",
        ),
        (
            f"{RESET} def do(self, x: int):\n  '''Do it.\n\n  Args:\n    y: What.\n  '''",
            "has a tool do() (line 3) whose docstring describes y, which it does not take",
        ),
        (
            f"{RESET} def done(self): 'Say it.'",
            "has a tool done() (line 3), a name that is taken: the attribute that ends",
        ),
        (
            f"{DO} def get_reward(self): return 1",
            "has a tool get_reward() (line 4), a name that is taken: the reward is",
        ),
        (
            f"{DO} def reward(self, x): return 1",
            "has a method reward() (line 4) that cannot be called with 0 arguments",
        ),
        (f"{RESET} def step(self): return 1", "has a method step() (line 3) that cannot be called with 1 arguments"),
    ],
)
def test_a_class_that_cannot_be_used(tmp_path, monkeypatch, source, sentence):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write(tmp_path, source)
    with pytest.raises(Complaint) as refusal:
        environment_of(Load(LoadKind.FILE, str(path), "E", content=b64encode(path.read_bytes()).decode()))
    assert refusal.value.what.startswith(sentence)


def test_every_kind_of_method_and_type_is_a_tool(tmp_path, monkeypatch):
    source = """\
        from dataclasses import dataclass
        from functools import wraps

        def logged(function):
            @wraps(function)
            def call(*arguments, **named): return function(*arguments, **named)
            return call

        @dataclass
        class Point:
            x: int
            y: int = 0

        class Base:
            def first(self, points: list[Point], options: dict[str, float]): "Inherited."

        class E(Base):
            size = 3
            def reset(self): return ""
            @logged
            def second(self, copy: str | None = None, *, json: bool): "Decorated."
            @staticmethod
            def third(pair: tuple[int, int]): "Static."
            @classmethod
            def fourth(cls): "Of the class."
            @property
            def fifth(self): "No tool."
            def _sixth(self): pass
    """
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write(tmp_path, source)
    found = environment_of(Load(LoadKind.FILE, str(path), "E", content=b64encode(path.read_bytes()).decode()))
    assert list(found.tools) == ["first", "second", "third", "fourth"]
    point = {"type": "object", "title": "Point", "required": ["x"], "additionalProperties": False}
    point["properties"] = {"x": {"type": "integer"}, "y": {"type": "integer", "default": 0}}
    assert found.facts.tools[0]["function"]["parameters"]["properties"] == {
        "points": {"type": "array", "items": point},
        "options": {"type": "object", "additionalProperties": {"type": "number"}},
    }
    assert found.facts.tools[1]["function"]["parameters"]["required"] == ["json"]
    checked = found.tools["first"].checked({"points": [{"x": 1}], "options": {"a": 1}})
    assert ([vars(point) for point in checked["points"]], checked["options"]) == ([{"x": 1, "y": 0}], {"a": 1.0})
    assert found.tools["second"].checked({"json": True}) == {"json": True}
    assert found.tools["third"].checked({"pair": [1, 2]}) == {"pair": (1, 2)}
    with pytest.raises(ValueError, match=r"points\.0\.x: Input should be a valid integer \(it is \"1\"\)"):
        found.tools["first"].checked({"points": [{"x": "1"}], "options": {}})


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("while True: pass", "took longer than 0.5 s to import and was killed; do less work at import."),
        (
            "import os; os._exit(4)",
            "ended its process at import (exit code 4); make the file importable by plain Python.",
        ),
        ("class F: pass", "does not exist: the file defines F; define class E with "),
    ],
)
def test_a_file_that_cannot_be_used_says_so_each_time(tmp_path, source, sentence):
    path = write(tmp_path, source)

    async def ask():
        async with hosted(path, "E", start_seconds=0.5) as host:
            for asked in (host.facts, host.episode("p-7").__aenter__):
                with pytest.raises(UserError) as refusal:
                    await asked()
                assert str(refusal.value).startswith(f"E in {path} {sentence}")

    asyncio.run(ask())


def test_a_missing_file_and_a_limit_that_is_too_low_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"nowhere/e\.py is not an existing \.py file; give --environment FILE\.py:Class"
    ):
        EnvironmentHost.from_file("nowhere/e.py", "E")
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    with pytest.raises(UserError, match=r"500 episodes of Manners .* need 1128 open files, .* 1024; raise the limit"):
        EnvironmentHost.from_file(write(tmp_path, MANNERS), "Manners", HostLimits(processes=500))
