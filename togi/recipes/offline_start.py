"""The front door of the offline recipe: check everything, then import and train.

Imports no torch, so that a mistake is told in a moment. The recipe itself is ``togi.recipes.offline``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from togi.config.offline import OfflineConfig
from togi.config.parse import Parsed
from togi.recipes import offline_preflight

if TYPE_CHECKING:
    from togi.recipes.offline import Result

logger = logging.getLogger(__name__)


def start_offline(
    parsed: Parsed[OfflineConfig],
    command: str,
    *,
    argv: Sequence[str] = (),
    announce: Callable[[str], None] = logger.info,
) -> Result:
    """Check, then run ``togi <command>``. Raises UserError for whatever the user can mend."""
    offline_preflight.check(parsed)
    from togi.recipes.offline import run

    return run(parsed, command, argv=argv, announce=announce)
