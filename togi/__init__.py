"""Togi (研ぎ, "polishing"): train language models from human and verifiable feedback.

The command ``togi`` and this package are the same thing: every flag of ``togi rl`` is a keyword of ``togi.rl``.
Importing it is light; torch comes with the first run.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any

from togi.version import __version__

if TYPE_CHECKING:
    from togi.run.rl import Result

__all__ = ["__version__", "rl"]


def rl(
    *, reward: Callable[..., Any] | None = None, config: str | PathLike[str] | None = None, **settings: Any
) -> Result:
    """Online RL of a language model: ``togi rl`` from Python.

    ``settings`` are the flags by their flat names (``togi rl --help`` lists them); whatever is left out has its default.
    ``config`` is a YAML file of such settings, which those given here replace. ``reward`` is a Python function in place of
    ``reward_func``; its arguments are those of a reward file::

        import togi

        def short(queries, prompts, labels):
            return [-len(query) / 1000 for query in queries]

        result = togi.rl(
            pretrain="HuggingFaceTB/SmolLM2-135M-Instruct",
            prompt_data="prompts.jsonl",
            input_key="prompt",
            apply_chat_template=True,
            reward=short,
            advantage_estimator="group_norm",
            n_samples_per_prompt=8,
            rollout_batch_size=16,
            init_kl_coef=0,
        )
        print(result.model, result.report)

    The function runs in processes of its own. One that was defined in the script or notebook is sent to them with the values that
    it uses. One that was imported from a module is imported there anew: what this process has changed in that module since, a
    global or the code itself, is not seen.

    Models and engine are objects of this process where one is enough (``workers``), so it runs in a notebook and under a
    debugger. Returns where the run left what (``togi.run.rl.Result``). Raises ``togi.errors.UserError`` with one sentence for
    what the user can mend.
    """
    from togi.config.parse import Source, over_file
    from togi.config.rl import RLConfig
    from togi.errors import ConfigError
    from togi.run.start import start_rl

    if isinstance(reward, type):
        raise ConfigError(
            f"reward is the class {reward.__name__}, which is not called with queries: give an object of it, "
            f"{reward.__name__}(...), or a function of (queries, prompts, labels)."
        )
    if reward is not None and not callable(reward):
        raise ConfigError(
            f"reward must be a function of (queries, prompts, labels), not {type(reward).__name__}: "
            "for a file use reward_func."
        )
    return start_rl(over_file(RLConfig, config, settings, Source.PYTHON), reward=reward)
