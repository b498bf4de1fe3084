"""The entry of every run, for command line and Python: the checks that need no tokenizer, and their notices.

Imports no torch, so that a mistake is reported at once. After it the command imports its loop (``togi.run.rl``,
``togi.run.offline``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from togi.config.chat import ChatConfig
from togi.config.infer import InferConfig
from togi.config.parse import Parsed
from togi.config.presets import describe
from togi.config.rl import RLConfig
from togi.config.serve_rm import ServeRMConfig
from togi.config.shared import ModelSettings
from togi.methods.method import Method
from togi.plan.machine import joins_cluster, this_machine
from togi.plan.precision import usable_precision
from togi.recipes import offline_preflight, preflight
from togi.run.event_loop import run_to_end

if TYPE_CHECKING:
    from togi.run.rl import Result

ONE_TOKENIZER = "--disable_fast_tokenizer: Transformers has one tokenizer for each model, which is used"
NO_CUDA_FOR_LIGER = "--use_liger_kernel: there is no CUDA device here, Transformers' own layers compute instead"
logger = logging.getLogger(__name__)
Announce = Callable[[str], None]


def start_rl(
    parsed: Parsed[RLConfig], *, reward: Callable[..., Any] | None = None, announce: Announce = logger.info
) -> Result:
    """Check the settings, then run ``togi rl`` from Python. ``reward`` replaces ``--reward_func`` by a function.

    Raises UserError for the user's mistakes, before a model is loaded where that is possible.
    """
    ready = rl_door(parsed, reward_given=reward is not None, announce=announce)
    from togi.run.rl import run

    return run_to_end(run(ready, reward=reward, announce=announce))


def rl_door(parsed: Parsed[RLConfig], *, reward_given: bool, announce: Announce) -> Parsed[RLConfig]:
    """The settings as ``togi rl`` runs them. Announces those that this machine changes. Raises UserError."""
    # The preset of --algo, then the checks, then what this machine changes.
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


def offline_door(parsed: Parsed[Method], *, announce: Announce, launched: bool = True) -> Parsed[Method]:
    """The settings as a run on fixed data uses them. Announces those that this machine changes. Raises UserError.

    ``launched``: this is one of the processes that train.
    """
    ready, notice = usable_precision(offline_preflight.check(parsed, launched=launched), this_machine())
    if notice:
        announce(notice)
    say_ignored(ready.config, announce)
    return ready


def say_ignored(config: ModelSettings | InferConfig | ChatConfig | ServeRMConfig, announce: Announce) -> None:
    """Announce flags that are accepted but have no effect, one line each."""
    if config.disable_fast_tokenizer:
        announce(ONE_TOKENIZER)
