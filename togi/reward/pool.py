"""A fixed number of worker processes for one reward function, each of which can be killed at any moment.

A call that exceeds its time limit (wall clock) is killed with the worker and everything it started (its process group), and the
worker is replaced. One thread per worker waits on its socket, so the pool needs no event loop and works inside Ray actors and
daemonic processes. ``function`` interprets the messages; ``worker`` is the worker's side.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from togi.reward.wire import Answer, Complaint, Load, as_reply, encode, receive, send

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


class WorkerPool:
    """Processes that have loaded the same function. They start at once and import in the background."""

    def __init__(self, load: Load, limits: CallLimits) -> None:
        self._workers = [Worker(load, limits) for _ in range(limits.workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max_workers=limits.workers, thread_name_prefix="togi-reward")

    async def run(self, frame: bytes) -> Answer | Complaint:
        """Run one call on the next idle worker. ``frame``: an encoded ``Call``."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, frame)

    def close(self) -> None:
        """Kill and reap every worker; calls in flight end with a complaint."""
        for worker in self._workers:
            worker.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    @property
    def pids(self) -> list[int]:
        """The current process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def _run(self, frame: bytes) -> Answer | Complaint:
        worker = self._idle.get()
        try:
            return worker.call(frame)
        finally:
            self._idle.put(worker)


class Worker:
    """One process slot. Its process is replaced after every failure that kills it."""

    def __init__(self, load: Load, limits: CallLimits) -> None:
        self._load = encode(load)
        self._limits = limits
        self._closed = False
        self._ready = False
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, frame: bytes) -> Answer | Complaint:
        """Send a frame and wait for the reply within the limit. Blocks; one call at a time."""
        # The first reply says whether the import worked; it has a limit of its own.
        if not self._ready:
            reply = self._exchange(b"", self._limits.start_timeout, self._late_start)
            if isinstance(reply, Complaint):
                self._replace()
                return reply
            self._ready = True
        return self._exchange(frame, self._limits.timeout, self._late)

    @property
    def _late_start(self) -> Complaint:
        what = f"took longer than {self._limits.start_timeout:g} s to import and was killed"
        return Complaint(what, "do less work at import", during_call=False)

    @property
    def _late(self) -> Complaint:
        what = f"ran longer than the limit of {self._limits.timeout:g} s and was killed"
        return Complaint(what, "make it faster or raise --reward_timeout", is_transient=True)

    def interrupt(self) -> None:
        """End the call in flight from another thread: kill the process without replacing it."""
        self._closed = True
        self._signal()

    def close(self) -> None:
        """Kill and reap the process for good. No call may be in flight."""
        self._closed = True
        self._kill()

    def _start(self) -> None:
        # The lifeline is a pipe: the worker ends when the end here closes, however this process dies.
        self._channel, theirs = socket.socketpair()
        lifeline, ours = os.pipe()
        self._lifeline = open(ours, "wb", buffering=0)  # noqa: PTH123, SIM115  a descriptor, held as long as the worker
        command = [sys.executable, "-u", "-P", "-m", "togi.reward.worker", str(theirs.fileno()), str(lifeline)]
        # The worker can import what this process can. One busy core per worker, unless the user sets it.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
        # A session of its own makes the worker the leader of a process group, which is killed as a whole.
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
        with contextlib.suppress(OSError):  # a dead worker is reported by its first call
            send(self._channel, self._load, self._limits.start_timeout)

    def _exchange(self, frame: bytes, timeout: float, late: Complaint) -> Answer | Complaint:
        try:
            if frame:
                send(self._channel, frame, timeout)
            return as_reply(receive(self._channel, timeout))
        except TimeoutError:
            self._replace()
            return late
        except OSError:
            what = f"ended its process ({_ending(self._replace())})"
            return Complaint(what, "let it return its rewards, within the machine's memory", is_transient=True)

    def _replace(self) -> int:
        """Kill, reap and restart the process. Returns the exit status of the old one."""
        status = self._kill()
        self._ready = False
        if not self._closed:
            self._start()
        return status

    def _kill(self) -> int:
        self._signal()
        self._channel.close()
        self._lifeline.close()
        return self._process.wait()

    def _signal(self) -> None:
        # Only before the leader is reaped: until then no other group can have this id.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
