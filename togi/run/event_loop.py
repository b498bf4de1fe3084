"""Run a coroutine to its end from synchronous code, also where an event loop is already running."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import Any, TypeVar

T = TypeVar("T")
SECONDS_AT_MOST = 0.5


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Like ``asyncio.run``. Inside a running loop (a notebook) the work runs on a thread with a loop of its own.

    The running loop blocks meanwhile. Ctrl-C cancels ``work`` there too, and this function returns when it has ended.
    """
    if not _in_event_loop():
        return asyncio.run(work)
    # The work must not start before the interrupt handler below can find its task.
    started = Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]]()
    may_begin = Event()

    async def main() -> T:
        may_begin.wait()
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        return await work

    with ThreadPoolExecutor(1, "togi") as thread:
        done = None
        try:
            done = thread.submit(asyncio.run, main())
            may_begin.set()  # only now can an interrupt of the work be answered
            # A signal just before a wait does not end that wait, so none may be long.
            while not wait([done], timeout=SECONDS_AT_MOST).done:
                pass
            return done.result()
        except KeyboardInterrupt:
            may_begin.set()
            # The main thread got the Ctrl-C: cancel the task on the other thread and wait for its cleanup.
            if done is not None and not done.done():
                loop, task = started.result()
                loop.call_soon_threadsafe(task.cancel)
                wait([done])
            raise


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
