"""The errors Togi raises on purpose.

A ``UserError`` is the user's mistake: its message is one clear sentence that names the flag, row or function,
what is wrong and what to do, and the command line prints it without a traceback. Everything else that
escapes is a defect of ours.
"""


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


class WeightSyncError(RuntimeError):
    """A weight update that was refused or not finished: names, shapes, dtypes or the deadline differ."""


class EngineUnavailableError(UserError):
    """A generation engine whose package is not installed. The message says what to install."""


class RolloutError(RuntimeError):
    """An environment that failed on a prompt. The message names prompt, group and sample; the cause is chained."""
