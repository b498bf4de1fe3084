"""The front door of the offline recipe: check everything, then import and train.

Imports no torch, so that a mistake is told in a moment. The recipe itself is ``togi.recipes.offline``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from togi.config.parse import Parsed
from togi.methods.method import Method
from togi.plan.machine import this_machine
from togi.plan.precision import usable_precision
from togi.recipes import offline_preflight
from togi.recipes.notices import say_ignored

if TYPE_CHECKING:
    from togi.recipes.offline import Result

logger = logging.getLogger(__name__)


def start_offline(
    parsed: Parsed[Method],
    command: str,
    *,
    argv: Sequence[str] = (),
    announce: Callable[[str], None] = logger.info,
) -> Result:
    """Check, then run ``togi <command>``. Raises UserError for whatever the user can mend."""
    ready = opening(parsed, announce=announce)
    from togi.recipes.offline import run

    return run(ready, command, argv=argv, announce=announce)


def opening(parsed: Parsed[Method], *, announce: Callable[[str], None], launched: bool = True) -> Parsed[Method]:
    """The settings as they are run, after all checks that need no tokenizer; says what is taken otherwise than it is written.

    ``launched``: this is one of the processes that are to train.
    """
    ready, notice = usable_precision(offline_preflight.check(parsed, launched=launched), this_machine())
    if notice:
        announce(notice)
    say_ignored(ready.config, announce)
    return ready
