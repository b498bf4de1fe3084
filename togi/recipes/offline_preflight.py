"""All checks of an offline run that take under a second: no torch, no model, only the head of the data."""

from __future__ import annotations

import os
from collections.abc import Mapping

from togi.config.model_facts import check_length
from togi.config.parse import Parsed
from togi.data.items import parse_items
from togi.data.precheck import parse_probs
from togi.errors import ConfigError
from togi.methods.checks import check_method
from togi.methods.method import Method
from togi.obs.sinks import check_trackers
from togi.recipes.best_metric import offline_aim
from togi.recipes.modelscope import with_local_names
from togi.recipes.preflight import (
    check_backend,
    check_compiled,
    check_engine,
    check_experts,
    check_folders,
    check_heads,
    check_model,
    check_sets,
    check_splits,
    model_settings,
    trackers,
)


def check(parsed: Parsed[Method], *, launched: bool = True) -> Parsed[Method]:
    """The settings with local names. Raises the first UserError.

    ``launched``: this is one of the processes that train, so that their number can be checked.
    """
    # Flags against each other.
    check_method(parsed)
    offline_aim(parsed.config)
    parsed = with_local_names(parsed)
    config = parsed.config
    # Packages and models.
    if config.on_policy is not None:
        check_engine(config.on_policy.rollout_engine)
    check_backend(config.backend)
    for flag, path in other_models(config).items():
        check_model(flag, path)
    check_context(config)
    if launched:
        check_teams(config)
    # Model configs against flags: heads, splits, compilation, experts.
    check_heads(config, other_models(config).items())
    check_splits(config, [("pretrain", config.pretrain)])
    check_compiled(config, other_models(config).items())
    check_experts(config)
    # Data and folders.
    check_data(config)
    check_trackers(trackers(config))
    check_folders(config)
    return parsed


def other_models(config: Method) -> Mapping[str, str]:
    """Every model folder by its flag, the trained model first."""
    return {"pretrain": config.pretrain, **config.more_models}


def check_context(config: Method) -> None:
    """Check that the longest sequence fits the positions of every model that reads it. Raises ConfigError."""
    for path in other_models(config).values():
        check_length(f"--max_len {config.max_len}", config.max_len, path, model_settings(path))


def check_teams(config: Method) -> None:
    """Check that the launched processes divide into rings, or into tensor-parallel groups. Raises ConfigError."""
    for flag, size in (
        ("--ring_attn_size", config.ring_attn_size),
        ("--ds_tensor_parallel_size", config.ds_tensor_parallel_size),
    ):
        processes = os.environ.get("WORLD_SIZE", "1")
        if size > 1 and processes == "1":
            raise ConfigError(
                f"{flag} {size} needs {size} processes and this is one: start with torchrun --nproc_per_node {size}, "
                "or leave it out."
            )
        if processes.isdigit() and int(processes) % size != 0:
            raise ConfigError(
                f"{flag} {size} does not divide the {processes} processes of --nproc_per_node x --nnodes: "
                f"start a multiple of {size}, or lower {flag}."
            )


def check_data(config: Method) -> None:
    """Check data sets, fields and probabilities. Single bad rows are counted when the data is loaded."""
    keys = {flag: key for flag, key in config.row_fields.items() if key is not None}
    check_sets("dataset", config.dataset, keys, config.split, every_row=False)
    if config.dataset_probs is not None:
        parse_probs(config.dataset_probs, len(parse_items(config.dataset)), "--dataset_probs")
    if config.eval_dataset is not None:
        check_sets("eval_dataset", config.eval_dataset, keys, config.eval_split, every_row=False)
