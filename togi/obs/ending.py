"""The end of a run in its folder: how it ended, and the report page."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable

from togi.obs.report import write_report
from togi.obs.run_dir import RunDirectory, State
from togi.obs.way_out import tolerated, way_out


def cause(error: BaseException) -> str:
    """Why a run ended, in words for its status."""
    if isinstance(error, KeyboardInterrupt | CancelledError):
        return "interrupted"
    return str(error) or type(error).__name__


def end_run(directory: RunDirectory, state: State, message: str = "", close: Callable[[], None] = lambda: None) -> None:
    """``close`` what writes into the folder, then say there how the run ended. Fit for ``except``: see ``way_out``."""
    with way_out("closing the run's files and trackers"):
        close()
    with way_out("writing the run's status"):
        directory.write_status(state, message)
    with tolerated("writing the report page"), way_out("writing the report page"):
        write_report(directory.root)
