"""The front door of the RL recipe, for the command line and for Python alike: check everything, then import and train.

Imports no torch, so that a mistake is told in a moment. The recipe itself is ``togi.recipes.rl``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from togi.config.parse import Parsed
from togi.config.presets import describe
from togi.config.rl import RLConfig
from togi.plan.machine import joins_cluster, this_machine
from togi.plan.precision import usable_precision
from togi.recipes import preflight
from togi.recipes.notices import NO_CUDA_FOR_LIGER, say_ignored

if TYPE_CHECKING:
    from togi.recipes.rl import Result

logger = logging.getLogger(__name__)


def start_rl(
    parsed: Parsed[RLConfig],
    *,
    argv: Sequence[str] = (),
    reward: Callable[..., Any] | None = None,
    announce: Callable[[str], None] = logger.info,
) -> Result:
    """Check, then run ``togi rl``. ``reward`` replaces ``--reward_func`` by a Python function.

    Raises UserError for whatever the user can mend, before a model is loaded where that is possible.
    """
    ready = opening(parsed, reward_given=reward is not None, announce=announce)
    from togi.recipes.rl import run

    return run(ready, argv=argv, reward=reward, announce=announce)


def opening(parsed: Parsed[RLConfig], *, reward_given: bool, announce: Callable[[str], None]) -> Parsed[RLConfig]:
    """The settings as they are run, after all checks that need no tokenizer; says what is taken otherwise than it is written."""
    if parsed.config.algo is not None:
        bringer, _ = parsed.config.preset({})
        announce(describe(parsed.config.algo, parsed.values_from(bringer)))
    machine = this_machine()
    ready, notice = usable_precision(preflight.check(parsed, machine, reward_given=reward_given), machine)
    if notice:
        announce(notice)
    if ready.config.ref_reward_offload and machine.gpus == 0 and not joins_cluster():
        announce("--ref_reward_offload: there is no GPU, reference and reward models are in host memory already")
    if ready.config.use_liger_kernel and machine.gpus == 0 and not joins_cluster():
        announce(NO_CUDA_FOR_LIGER)
    say_ignored(ready.config, announce)
    return ready
