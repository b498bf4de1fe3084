"""Reward functions in their worker processes: what comes back, and every way in which a user's function can fail."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.processes import gone
from togi.errors import RewardError
from togi.reward.function import CallLimits, FunctionReward
from togi.reward.wire import Complaint, Load, LoadKind
from togi.reward.worker import load_function
from togi.sample import FinishReason, Outcome, Prompt, Rollout

ONE = CallLimits(workers=1)


def rollout(text, label="", prompt_id="p-7"):
    prompt = Prompt(prompt_id, (1, 2), "Q: ", label, "quiz")
    return Rollout(prompt, "g", (3,), (True,), (-1.0,), text, FinishReason.STOP, (0,))


def write(folder, source, name="my_reward.py"):
    path = folder / name
    path.write_text(textwrap.dedent(source))
    return path


def score(reward, *texts, label=""):
    return asyncio.run(reward.score([rollout(text, label) for text in texts]))


def closing(reward):
    """Close when the test is over, however it ends."""
    return _Closing(reward)


class _Closing:
    def __init__(self, reward):
        self.reward = reward

    def __enter__(self):
        return self.reward

    def __exit__(self, *_):
        asyncio.run(self.reward.close())


# One file that does what the label says, so that one worker serves many tests.
MANNERS = """\
    import os, subprocess, sys, time
    from pathlib import Path

    def boom(text):
        raise ZeroDivisionError("it broke\\non two lines")

    def reward_func(queries, prompts, labels, **kwargs):
        what, n = labels[0], len(queries)
        if what == "few": return [0.0] * (n - 1)
        if what == "many": return [0.0] * (n + 1)
        if what == "nan": return [0.0] * (n - 1) + [float("nan")]
        if what == "string": return ["good"] * n
        if what == "none": return None
        if what == "scalar": return 1.0
        if what == "raise": return [boom(query) for query in queries]
        if what == "exit": sys.exit(3)
        if what == "die": os._exit(3)
        if what == "kill": os.kill(os.getpid(), 9)
        if what == "hang":
            while True: pass
        if isinstance(what, list) and what[0] == "hang with child":
            child = subprocess.Popen(["sleep", "100"])
            Path(what[1]).write_text(str(child.pid))
            time.sleep(100)
        if what == "print":
            print("x" * 1_000_000)
            os.write(1, b"y" * 1_000_000)
            sys.stderr.write("z")
        if what == "stdin": sys.stdin.read()
        if what == "modules": return [("torch" in sys.modules) + 2 * ("numpy" in sys.modules)] * n
        return [float(len(query)) for query in queries]
"""


@pytest.fixture(scope="module")
def manners(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("manners"), MANNERS)
    with closing(FunctionReward.from_file(path, CallLimits(workers=1, timeout=20.0))) as reward:
        yield reward


def failure(reward, label, *texts):
    """The message of a failed call: every sample of its group is an error, none has a score."""
    texts = texts or ("first", "second")
    scores = score(reward, *texts, label=label)
    assert [(s.outcome, math.isnan(s.value), s.components) for s in scores] == [(Outcome.ERROR, True, {})] * len(texts)
    return scores[0].message


def refusal(reward, label, *texts):
    """The sentence of what cannot get better and stops the run."""
    with pytest.raises(RewardError) as error:
        score(reward, *(texts or ("first", "second")), label=label)
    return str(error.value)


def test_queries_are_prompt_plus_response_in_order(manners):
    scores = score(manners, "", "a", "bb")
    assert [s.value for s in scores] == [3.0, 4.0, 5.0]
    assert [s.outcome for s in scores] == [Outcome.SCORE] * 3
    assert [s.components for s in scores] == [{"function": 3.0}, {"function": 4.0}, {"function": 5.0}]


IN_CALL = " (scoring prompt 'p-7'); "
ONE_NUMBER = IN_CALL + "return one number per query."
FINITE = "; return a finite number for every query, or None to abstain."
DIED = IN_CALL + "let it return its rewards, within the machine's memory."
RAISED_AT = 'at line 5 (raise ZeroDivisionError("it broke\\non two lines"))'
EXIT_AT = 'at line 16 (if what == "exit": sys.exit(3))'


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("few", f"returned 1 rewards for 2 queries{ONE_NUMBER}"),
        ("many", f"returned 3 rewards for 2 queries{ONE_NUMBER}"),
        ("none", f"returned None as rewards{IN_CALL}return a list with one number per query."),
        ("scalar", f"returned a single number as rewards for 2 queries{ONE_NUMBER}"),
        ("nan", f"returned nan in rewards for sample 1 of prompt 'p-7' (response: 'second'){FINITE}"),
        ("string", f"returned the string 'good' in rewards for sample 0 of prompt 'p-7' (response: 'first'){FINITE}"),
        ("raise", f"raised ZeroDivisionError: it broke on two lines {RAISED_AT}{IN_CALL}correct the function."),
        ("exit", f"raised SystemExit: 3 {EXIT_AT}{IN_CALL}correct the function."),
        ("die", f"ended its process (exit code 3){DIED}"),
        ("kill", f"ended its process (killed by SIGKILL){DIED}"),
    ],
)
def test_a_failure_is_one_sentence_and_the_next_call_works(manners, label, sentence):
    message = failure(manners, label)
    assert message.startswith("reward_func in ")
    assert message.endswith(f"my_reward.py {sentence}")
    assert score(manners, "again")[0].value == 8.0


def test_the_first_80_characters_of_the_response_are_shown(manners):
    assert f"(response: '{'r' * 80}')" in failure(manners, "nan", "r" * 81)


def test_printing_and_reading_do_not_disturb_the_protocol(manners):
    assert score(manners, "a", label="print")[0].value == 4.0
    assert score(manners, "a", label="stdin")[0].value == 4.0


def test_the_worker_imports_neither_torch_nor_numpy(manners):
    assert score(manners, "a", label="modules")[0].value == 0.0


def test_a_label_may_be_any_json_value(manners):
    for label in (None, 3, 1.5, True, [1, ["x"]], {"a": {"b": None}}, "ü\ud800\n"):
        assert score(manners, "a", label=label)[0].value == 4.0


def test_a_large_group_passes(manners):
    assert [s.value for s in score(manners, *["x" * 100_000] * 64)] == [100_003.0] * 64


def test_a_hanging_function_is_killed_with_its_children_and_replaced(tmp_path):
    path, note = write(tmp_path, MANNERS), tmp_path / "pid"
    with closing(FunctionReward.from_file(path, CallLimits(workers=1, timeout=0.5))) as reward:
        assert score(reward, "a")[0].value == 4.0
        before = reward.worker_pids
        expected = (
            f"ran longer than the limit of 0.5 s and was killed{IN_CALL}make it faster or raise --reward_timeout."
        )
        assert failure(reward, "hang").endswith(expected)
        assert failure(reward, ["hang with child", str(note)]).endswith(expected)
        assert gone(int(note.read_text()))
        assert reward.worker_pids != before
        assert not psutil.pid_exists(before[0])
        assert score(reward, "a")[0].value == 4.0


def test_processes_that_died_between_calls_cost_no_try(tmp_path):
    """Both are killed while they wait; without retries every sample is scored all the same."""
    limits = CallLimits(workers=2, retries=0)
    with closing(FunctionReward.from_file(write(tmp_path, MANNERS), limits)) as reward:
        for _ in range(2):  # each of the two has answered a call
            assert score(reward, "a")[0].value == 4.0
        before = reward.worker_pids
        for pid in before:
            os.killpg(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        for _ in range(4):
            assert score(reward, "a")[0].value == 4.0
        assert not set(before) & set(reward.worker_pids)


@pytest.mark.parametrize("edited", ["def reward_func(queries, prompts, labels): return [9]", "no Python ("])
def test_a_file_edited_during_a_run_changes_nothing(tmp_path, edited):
    """Every worker has the file as it was at the start, also one that replaces another, and errors show its lines."""
    path = write(tmp_path, MANNERS)
    with closing(FunctionReward.from_file(path, CallLimits(workers=1, timeout=0.5))) as reward:
        path.write_text(edited)
        assert score(reward, "a")[0].value == 4.0
        assert "was killed" in failure(reward, "hang")
        assert score(reward, "a")[0].value == 4.0
        before = failure(reward, "raise")
        path.write_text(textwrap.dedent(MANNERS))
        with closing(FunctionReward.from_file(path, CallLimits(workers=1))) as other:
            assert failure(other, "raise") == before


def test_close_reaps_the_workers_and_ends_calls_in_flight(tmp_path):
    reward = FunctionReward.from_file(write(tmp_path, MANNERS), CallLimits(workers=2))

    async def close_while_scoring():
        call = asyncio.create_task(reward.score([rollout("a", "hang")]))
        await reward.check([rollout("a")])
        pids = reward.worker_pids
        await reward.close()
        with pytest.raises(RewardError, match="killed by SIGKILL"):
            await call
        return pids

    pids = asyncio.run(close_while_scoring())
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


RENDEZVOUS = """\
    import time
    from pathlib import Path

    def reward_func(queries, prompts, labels):
        folder, number = Path(labels[0][0]), labels[0][1]
        (folder / f"started-{number}").touch()
        while len(list(folder.glob("started-*"))) < 2 * (number // 2) + 2:
            time.sleep(0.002)
        started, ended = len(list(folder.glob("started-*"))), len(list(folder.glob("ended-*")))
        (folder / f"ended-{number}").touch()
        return [10 * number + started - ended]
"""


def test_groups_overlap_up_to_the_number_of_workers_and_keep_their_order(tmp_path):
    """Groups 2k and 2k + 1 wait for each other: one at a time they would run into the limit. Never three at a time."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    limits = CallLimits(workers=2, timeout=10.0)
    with closing(FunctionReward.from_file(write(tmp_path, RENDEZVOUS), limits)) as reward:

        async def four_groups():
            return await asyncio.gather(*(reward.score([rollout("a", [str(meeting), i])]) for i in range(4)))

        values = [int(scores[0].value) for scores in asyncio.run(four_groups())]
    assert [value // 10 for value in values] == [0, 1, 2, 3]
    assert all(1 <= value % 10 <= 2 for value in values)


def test_retries_repeat_a_failed_call(tmp_path):
    source = """\
        from pathlib import Path

        def reward_func(queries, prompts, labels):
            note = Path(labels[0])
            tries = len(note.read_text()) if note.exists() else 0
            note.write_text("x" * (tries + 1))
            if tries < 2:
                raise OSError("not yet")
            return [tries]
    """
    path = write(tmp_path, source)
    with closing(FunctionReward.from_file(path, replace(ONE, retries=2))) as reward:
        assert score(reward, "a", label=str(tmp_path / "two"))[0].value == 2.0
    with closing(FunctionReward.from_file(path, replace(ONE, retries=1))) as reward:
        assert "raised OSError: not yet at line 8" in failure(reward, str(tmp_path / "one"), "a")
    assert (tmp_path / "one").read_text() == "xx"


def test_optional_arguments_async_dict_and_abstaining(tmp_path):
    source = """\
        import asyncio
        from neighbour import OFFSET

        async def reward_func(queries, prompts, labels, responses, finish_reasons):
            await asyncio.sleep(0)
            assert queries == [p + r for p, r in zip(prompts, responses)] and finish_reasons == ["stop", "stop"]
            rewards = [None if r == "skip" else len(r) + OFFSET for r in responses]
            return {"rewards": rewards, "scores": [0, 1], "extra_logs": {"all": 0.5, "each": [1, None]}}
    """
    write(tmp_path, "OFFSET = 10\n", "neighbour.py")
    with closing(FunctionReward.from_file(write(tmp_path, source), ONE)) as reward:
        first, second = score(reward, "ab", "skip")
    assert (first.outcome, first.value) == (Outcome.SCORE, 12.0)
    assert first.components == {"function": 12.0, "scores": 0.0, "all": 0.5, "each": 1.0}
    assert second.outcome is Outcome.ABSTAIN
    assert second.components == {"scores": 1.0, "all": 0.5}
    assert second.message.endswith("my_reward.py abstained.")


def test_keyword_arguments_reach_a_function_that_takes_any(tmp_path):
    source = """\
        def reward_func(queries, prompts, labels, **kwargs):
            known = {"responses": ["a"], "datasources": ["quiz"], "finish_reasons": ["stop"], "response_lengths": [1]}
            assert kwargs == known, kwargs
            return {"rewards": [1], "extra_logs": {"function": 1}}
    """
    with closing(FunctionReward.from_file(write(tmp_path, source), ONE)) as reward:
        assert "returned a log named 'function', which is the name of the reward itself" in refusal(reward, "", "a")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def other(a): pass\ndef more(): pass", "does not exist: the file defines other, more"),
        ("x = 1", "does not exist: the file defines no function"),
        ("reward_func = 3", "is of type int, not a function"),
        (
            "def reward_func(queries, prompts): pass",
            "cannot be called with queries, prompts and labels (too many positional arguments)",
        ),
        (
            "def reward_func(queries, prompts, labels, tokenizer): pass",
            "cannot be called with queries, prompts and labels (missing a required argument: 'tokenizer')",
        ),
        (
            "import no_such_package",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_package' at line 1",
        ),
        ("x = 1\ny = x / 0", "cannot be imported: ZeroDivisionError: division by zero at line 2 (y = x / 0)"),
        ("import sys\nsys.exit(2)", "cannot be imported: SystemExit: 2 at line 2 (sys.exit(2))"),
        ("def reward_func(:\n  pass", "cannot be imported: SyntaxError: invalid syntax (my_reward.py, line 1)"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, monkeypatch, source, sentence):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(Complaint) as refusal:
        path = write(tmp_path, source)
        load_function(Load(LoadKind.FILE, str(path), "reward_func", content=b64encode(path.read_bytes()).decode()))
    assert refusal.value.what.startswith(sentence)


def test_check_finds_a_bad_file_and_says_so_again(tmp_path):
    with closing(FunctionReward.from_file(write(tmp_path, "def score(): pass"), ONE)) as reward:
        for _ in range(2):
            with pytest.raises(RewardError) as refusal:
                asyncio.run(reward.check([rollout("a")]))
            assert str(refusal.value) == (
                f"reward_func in {tmp_path / 'my_reward.py'} does not exist: the file defines score; "
                "define reward_func(queries, prompts, labels, **kwargs)."
            )


def test_an_import_that_hangs_is_killed(tmp_path):
    path = write(tmp_path, "while True: pass")
    with closing(FunctionReward.from_file(path, replace(ONE, start_timeout=0.5))) as reward:
        assert "took longer than 0.5 s to import and was killed" in refusal(reward, "", "a")


def test_a_missing_file_is_named():
    with pytest.raises(RewardError, match=r"nowhere/r\.py is not an existing \.py file; give --reward_func"):
        FunctionReward.from_file("nowhere/r.py")


def test_a_callable_by_value_and_by_name(tmp_path, monkeypatch):
    offset = 5

    def local_reward(queries, prompts, labels):
        return [len(query) + offset for query in queries]

    with closing(FunctionReward.from_callable(local_reward, ONE)) as reward:
        assert score(reward, "a")[0].value == 9.0

    write(tmp_path, "import os\nWHERE = os.getpid()\ndef top(q, p, l): return [WHERE]", "importable_reward.py")
    monkeypatch.syspath_prepend(tmp_path)
    import importable_reward

    with closing(FunctionReward.from_callable(importable_reward.top, ONE)) as reward:
        assert int(score(reward, "a")[0].value) == reward.worker_pids[0] != importable_reward.WHERE


def test_a_callable_that_cannot_be_sent():
    lock = __import__("threading").Lock()

    def holds_a_lock(queries, prompts, labels):
        return [lock] * len(queries)

    with pytest.raises(RewardError, match=r"holds_a_lock in .* cannot be sent to a worker process"):
        FunctionReward.from_callable(holds_a_lock, ONE)


PARENT = """\
    import asyncio, sys
    from togi.reward.function import FunctionReward
    from togi.reward.function import CallLimits
    from togi.sample import FinishReason, Prompt, Rollout

    reward = FunctionReward.from_file(sys.argv[1], CallLimits(workers=1))
    prompt = Prompt("p", (1,), "Q", sys.argv[2])
    asyncio.run(reward.score([Rollout(prompt, "g", (3,), (True,), (-1.0,), "a", FinishReason.STOP, (0,))]))
"""
STUCK_IN_C = """\
    import os, re, subprocess
    from pathlib import Path

    def reward_func(queries, prompts, labels):
        child = subprocess.Popen(["sleep", "100"])
        Path(labels[0] + ".part").write_text(f"{os.getpid()} {child.pid}")
        Path(labels[0] + ".part").rename(labels[0])
        re.match(r"(a+)+$", "a" * 60 + "b")
"""


def test_workers_and_their_children_die_with_a_parent_that_is_killed(tmp_path):
    """Even while the worker holds the interpreter lock in C code, where no Python thread of its own could notice."""
    note, repository = tmp_path / "pids", Path(__file__).parents[2]
    command = [sys.executable, write(tmp_path, PARENT, "parent.py"), write(tmp_path, STUCK_IN_C), note]
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(repository)})
    try:
        for _ in range(2000):
            if note.exists() or parent.poll() is not None:
                break
            time.sleep(0.01)
        pids = [int(pid) for pid in note.read_text().split()]
        assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert [gone(pid) for pid in pids] == [True, True]
