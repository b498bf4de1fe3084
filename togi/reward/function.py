"""Rewards from a user's Python function: a file (``--reward_func``, ``--remote_rm_url``) or a callable (Python API).

Signature: ``reward_func(queries, prompts, labels, **kwargs)``, sync or async, called with a whole group (all samples of one
prompt). The three arguments are lists of equal length; a query is prompt text + response text. ``responses``, ``datasources``,
``finish_reasons`` and ``response_lengths`` (in tokens) are passed as keyword arguments if the function accepts them. For return
values see ``wire.checked``.

The function runs in worker processes (``Worker``); several groups are scored at the same time. A failed call makes every
sample of its group an error, never a score of zero. It is retried ``retries`` times if the failure may be transient.

A fixed number of worker processes for one reward function, each of which can be killed at any moment.

A call that exceeds its time limit (wall clock) is killed with the worker and everything it started (its process group), and the
worker is replaced. One thread per worker waits on its socket, so the pool needs no event loop and works inside Ray actors and
daemonic processes. ``function`` interprets the messages; ``worker`` is the worker's side.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cloudpickle  # type: ignore[import-untyped]

from togi.config.choices import BUILTIN, Verifier
from togi.errors import RewardError
from togi.reward.scores import as_call, as_scores, failed, without_errors
from togi.reward.wire import NO_INDEX, Answer, Call, Complaint, Load, LoadKind, encode, receive, send
from togi.sample import Prompt, Rollout, Score

STDERR_FD = 2


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits on the calls of a function.

    ``workers``: processes, and so concurrent calls (``--reward_workers``). ``timeout``: wall-clock seconds per call
    (``--reward_timeout``). ``retries``: how often a call with a transient failure is repeated (``--reward_retries``).
    ``start_timeout``: seconds to import the user's file and its imports.
    """

    workers: int = 2
    timeout: float = 60.0
    retries: int = 0
    start_timeout: float = 120.0

    def __post_init__(self) -> None:
        assert self.workers >= 1 and self.timeout > 0 and self.retries >= 0 and self.start_timeout > 0


class UserProcess:
    """A Python process that runs a user's code, with a channel to it: ``python -m MODULE CHANNEL LIFELINE``.

    It leads a session and so a process group, which is killed as a whole.
    """

    def __init__(self, module: str) -> None:
        # The lifeline is a pipe: the process ends when the end here closes, however this process dies.
        self.channel, theirs = socket.socketpair()
        lifeline, ours = os.pipe()
        self._lifeline = open(ours, "wb", buffering=0)  # noqa: PTH123, SIM115  a descriptor, held as long as the process
        command = [sys.executable, "-u", "-P", "-m", module, str(theirs.fileno()), str(lifeline)]
        # It can import what this process can. One busy core for each, unless the user sets it.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=STDERR_FD,
            pass_fds=(theirs.fileno(), lifeline),
            start_new_session=True,
            env=environment,
        )
        # Their ends are open in the child only, so that a dead child shows as a closed socket.
        theirs.close()
        os.close(lifeline)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def interrupt(self) -> None:
        """Kill the group. Nothing is reaped or closed, so another thread may be waiting for the process."""
        # Only before the leader is reaped: until then no other group can have this id.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> int:
        """Kill the group and reap the process. Returns its exit status."""
        self.interrupt()
        self.channel.close()
        self._lifeline.close()
        return self._process.wait()


def ending(status: int) -> str:
    """How a process ended, by its exit status."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"


class Worker:
    """One process slot. Its process is replaced after every failure that kills it."""

    def __init__(self, load: Load, limits: CallLimits) -> None:
        self._load = encode(asdict(load))
        self._limits = limits
        self._closed = False
        self._ready = False
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, frame: bytes) -> Answer:
        """Send a frame and wait for the reply within the limit. Blocks; one call at a time. Raises Complaint."""
        # Who died between two calls did not fail in this one, which would cost it a try.
        if self._process.has_ended and self._ready:
            self._replace()
        # The first reply says whether the import worked; it has a limit of its own.
        if not self._ready:
            limit = self._limits.start_timeout
            what = f"took longer than {limit:g} s to import and was killed"
            self._exchange(b"", limit, Complaint(what, "do less work at import", during_call=False))
            self._ready = True
        limit = self._limits.timeout
        what = f"ran longer than the limit of {limit:g} s and was killed"
        late = Complaint(what, "make it faster or raise --reward_timeout", is_transient=True)
        return self._exchange(frame, limit, late)

    def interrupt(self) -> None:
        """End the call in flight from another thread: kill the process without replacing it."""
        self._closed = True
        self._process.interrupt()

    def close(self) -> None:
        """Kill and reap the process for good. No call may be in flight."""
        self._closed = True
        self._process.kill()

    def _start(self) -> None:
        self._process = UserProcess("togi.reward.worker")
        with contextlib.suppress(OSError):  # a dead worker is reported by its first call
            send(self._process.channel, self._load, self._limits.start_timeout)

    def _exchange(self, frame: bytes, timeout: float, late: Complaint) -> Answer:
        try:
            if frame:
                send(self._process.channel, frame, timeout)
            reply = receive(self._process.channel, timeout)
        except TimeoutError:
            self._replace()
            raise late from None
        except OSError:
            status = self._replace()
            what = f"ended its process ({ending(status)})"
            advice = "let it return its rewards, within the machine's memory"
            raise Complaint(what, advice, is_transient=True) from None
        if "complaint" in reply:
            complaint = Complaint(**reply["complaint"])
            if not complaint.during_call:  # the worker has ended
                self._replace()
            raise complaint
        answer: Answer = reply["answer"]
        return answer

    def _replace(self) -> int:
        """Kill, reap and restart the process. Returns the exit status of the old one."""
        status = self._process.kill()
        self._ready = False
        if not self._closed:
            self._start()
        return status


FUNCTION_NAME = "reward_func"
SHOWN_CHARACTERS = 80
# Few enough to be checked within the limit of a call, which the user may have set low.
LABELS_AT_ONCE = 64
DEFAULT = CallLimits()

logger = logging.getLogger(__name__)


class FunctionReward:
    """A reward function in a pool of worker processes. Create it with ``from_file`` or ``from_callable``.

    ``component``: the name of the reward in the logs, beside "scores" and the function's own logs. The processes start in the
    constructor: call ``check`` before loading models, and ``close`` at the end.
    """

    def __init__(self, load: Load, shown_as: str, limits: CallLimits, component: str) -> None:
        self.shown_as = shown_as
        self._retries = limits.retries
        self._component = component
        self._is_closed = False
        # The processes start at once and import in the background.
        self._workers = [Worker(load, limits) for _ in range(limits.workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max_workers=limits.workers, thread_name_prefix="togi-reward")

    @classmethod
    def from_file(cls, path: str | Path, limits: CallLimits = DEFAULT, component: str = "function") -> FunctionReward:
        """The ``reward_func`` of a Python file, which is read once, here. Raises RewardError if there is no such file."""
        try:
            load = load_of_file(path, FUNCTION_NAME)
        except Complaint as complaint:
            advice = "give --reward_func the path of one"
            raise RewardError(f"The reward function file {path} {complaint}; {advice}.") from None
        return cls(load, f"{FUNCTION_NAME} in {path}", limits, component)

    @classmethod
    def from_verifier(
        cls, verifier: Verifier, settings: Mapping[str, str], limits: CallLimits = DEFAULT, component: str = "function"
    ) -> FunctionReward:
        """A built-in function. ``settings``: its keyword arguments."""
        module, function = ("text", verifier.value) if verifier.is_of_text else (verifier.value, FUNCTION_NAME)
        load = Load(LoadKind.MODULE, f"togi.reward.verifiers.{module}", function, settings)
        return cls(load, f"{BUILTIN}{verifier}", limits, component)

    @classmethod
    def from_callable(
        cls, function: Callable[..., object], limits: CallLimits = DEFAULT, component: str = "function"
    ) -> FunctionReward:
        """A Python function. Raises RewardError if it cannot be sent to a worker process."""
        name = function.__qualname__ if inspect.isroutine(function) else type(function).__qualname__
        shown_as = f"{name} in {file_of(function if inspect.isroutine(function) else type(function))}"
        try:
            load = load_by_value(function, name)
        except Complaint as complaint:
            advice = "move it to the top level of a module or give its file to --reward_func"
            raise RewardError(f"{shown_as} {complaint}; {advice}.") from complaint
        return cls(load, shown_as, limits, component)

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; all of them errors if the last try failed too.

        Raises RewardError if the function cannot be loaded or the pool is closed.
        """
        return await self._score(group, self._retries)

    async def check(self, group: Sequence[Rollout]) -> list[Score]:
        """Import the function, call it once, and return its scores. Raises RewardError for every failure.

        Two rollouts are enough to tell one number per sample from one number for all.
        """
        return without_errors(await self._score(group, 0))

    async def check_labels(self, prompts: Sequence[Prompt], place: Callable[[Prompt], str]) -> None:
        """Have a built-in function check every label. Raises RewardError with the ``place`` of the first that is of no use."""
        # many rows may share one label, such as a schema
        distinct = list({hash(json.dumps(prompt.label)): prompt for prompt in reversed(prompts)}.values())[::-1]

        async def problem(part: Sequence[Prompt]) -> str:
            texts = [""] * len(part)
            try:
                await self.answer({"queries": texts, "prompts": texts, "labels": [prompt.label for prompt in part]})
            except Complaint as complaint:
                said = f"{self.shown_as} {complaint}; {complaint.advice}"
                known = complaint.index != NO_INDEX
                return f"{place(part[complaint.index])}: {said}, or correct or remove the row." if known else f"{said}."
            return ""

        starts = range(0, len(distinct), LABELS_AT_ONCE)
        found = await asyncio.gather(*(problem(distinct[start : start + LABELS_AT_ONCE]) for start in starts))
        if first := next(filter(None, found), ""):
            raise RewardError(first)

    async def answer(self, call: Call) -> Answer:
        """The result of one call on the next idle worker, without retries. Raises Complaint."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, encode(call))

    def _call(self, frame: bytes) -> Answer:
        worker = self._idle.get()
        try:
            return worker.call(frame)
        finally:
            self._idle.put(worker)

    @property
    def is_built_in(self) -> bool:
        """Whether the function is built in."""
        return self.shown_as.startswith(BUILTIN)

    async def _score(self, group: Sequence[Rollout], retries: int) -> list[Score]:
        assert group, "a group has at least one rollout"
        call = as_call(group, lambda rollout: rollout.response_text)
        retry = 0
        while True:
            try:
                return as_scores(await self.answer(call), self._component, self.shown_as, len(group))
            except Complaint as complaint:
                sentence = self._sentence(complaint, group)
                # A function that cannot be loaded fails for every group, so it ends the run.
                if self._is_closed or not complaint.during_call:
                    raise RewardError(sentence) from None
                # Retry only what may pass by itself; a wrong return value would come again.
                if retry == retries or not complaint.is_transient:
                    return failed(len(group), sentence)
            retry += 1
            logger.warning("%s Try %d of %d follows.", sentence, retry, retries)

    async def close(self) -> None:
        """Kill and reap the worker processes. Calls in flight end with a RewardError."""
        self._is_closed = True
        for worker in self._workers:
            worker.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    @property
    def worker_pids(self) -> list[int]:
        """The current process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def _sentence(self, complaint: Complaint, group: Sequence[Rollout]) -> str:
        prompt = f"prompt {group[0].prompt.id!r}"
        where = f" (scoring {prompt})" if complaint.during_call else ""
        if complaint.index != NO_INDEX:
            rollout = group[complaint.index]
            start = rollout.response_text[:SHOWN_CHARACTERS]
            where = f" for sample {complaint.index} of {prompt} (response: {start!r})"
        return f"{self.shown_as} {complaint}{where}; {complaint.advice}."


def load_of_file(path: str | Path, name: str) -> Load:
    """``name`` of a Python file, which is read once, here. Raises Complaint if there is no such file."""
    file = Path(path).expanduser().absolute()
    if file.suffix != ".py" or not file.is_file():
        raise Complaint("is not an existing .py file")
    try:
        content = base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise Complaint(f"cannot be read ({error})") from None
    return Load(LoadKind.FILE, str(file), name, content=content)


def load_by_value(item: object, name: str) -> Load:
    """Send a function or class by name if a process can import it under that name, else by value: cloudpickle's own rule.

    Raises Complaint.
    """
    try:
        pickled = cloudpickle.dumps(item)
    except Exception as error:  # pickling runs the user's own __reduce__ methods
        raise Complaint(f"cannot be sent to a worker process ({error})") from error
    return Load(LoadKind.PICKLE, base64.b64encode(pickled).decode(), name)


def file_of(item: Callable[..., object]) -> str:
    """The file in which a function or class is written."""
    try:
        return inspect.getfile(item)
    except (TypeError, OSError):  # written in C, or typed into an interactive session
        return "an unknown file"
