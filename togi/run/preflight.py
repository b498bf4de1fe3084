"""All checks of a run that take under a second: no torch, no model, no Ray, only the head of the data.

Contradictions between flags come first, then placement, packages, models, data, the reward file and folders. Checks that need
the tokenizer or a call of the reward function follow, before any model is loaded (``togi.run.rl_setup``)."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from togi.config.choices import BackendName, EngineName
from togi.config.fields import Hook
from togi.config.iterate import IterateConfig
from togi.config.model_facts import check_length
from togi.config.parse import Parsed
from togi.config.rl import RLConfig, verifier_of
from togi.config.rl_checks import check_rl
from togi.config.shared import (
    ADAPTER_CONFIG,
    COMPILABLE,
    ModelSettings,
    OutputSettings,
    TrainSettings,
    check_mixture,
    check_splittable,
)
from togi.data.items import listed, parse_items
from togi.data.precheck import check_sources, parse_probs
from togi.errors import ConfigError, DataError, EngineUnavailableError, RewardError, UserError
from togi.methods import check_method
from togi.methods.method import Method
from togi.obs.sinks import TrackerOptions, check_trackers
from togi.plan.machine import Machine, check_compiler, joins_cluster
from togi.plan.placement import check_fits, check_spread, check_workers, plan_groups, resolve
from togi.run.modelscope import with_local_names
from togi.run.plan import check_rl_metric, offline_aim

FUNCTION = "reward_func"
DEFAULT_PARENT = "runs"
# Settings that stored rollouts depend on, besides their prompts: order, number and logprobs.
REPLAYED = ("seed", "rollout_batch_size", "n_samples_per_prompt", "temperature", "dynamic_filtering")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WEIGHTS = ("*.safetensors", "*.bin")


def check(parsed: Parsed[RLConfig], machine: Machine, *, reward_given: bool) -> Parsed[RLConfig]:
    """The settings with every ``auto`` of the placement resolved, and local names. Raises the first UserError.

    ``reward_given``: the reward is a Python function passed in code.
    """
    # Flags against each other.
    check_rl(parsed.config, reward_given=reward_given)
    check_rl_metric(parsed.config)
    parsed = with_local_names(resolve(parsed, machine))
    config = parsed.config
    # Placement. A Ray cluster has machines that are not known here.
    groups = plan_groups(config)
    check_workers(config, machine)
    if not joins_cluster():
        check_fits(groups, machine.gpus)
        check_spread(groups, 1)
    # Packages and models.
    if config.replay is None:
        check_engine(config.rollout_engine)
    else:
        check_replayed(config, Path(config.replay))
    check_backend(config.backend)
    models = models_of(config)
    for flag, path in models:
        check_model(flag, path)
    check_heads(config, models)
    check_splits(config, trained_models(config))
    check_compiled(config, models)
    check_context(config)
    check_engine_heads("vllm_tensor_parallel_size", config.vllm_tensor_parallel_size, config.pretrain)
    check_experts(config)
    # Data, reward files, hooks, folders.
    check_prompts(config)
    if config.pretrain_data is not None:
        check_pretraining(config, config.pretrain_data)
    for file in config.reward_files:
        check_reward(file)
    for name, value in (
        ("advantage_estimator", config.advantage_estimator),
        ("policy_loss_type", config.policy_loss_type),
    ):
        if isinstance(value, Hook):
            check_hook_file(name, value)
    check_trackers(trackers(config))
    critic = [f"{config.save_path}_critic"] if config.save_value_network else []
    check_folders(config, models, [*critic, *([f"{config.save_path}_ema"] if config.enable_ema else [])])
    return parsed


def models_of(config: RLConfig) -> list[tuple[str, str]]:
    """Every model folder with its flag."""
    critic = [("critic_pretrain", config.critic_pretrain)] if config.critic_pretrain is not None else []
    return [("pretrain", config.pretrain), *critic, *(("reward_pretrain", path) for path in config.reward_models)]


def check_heads(config: TrainSettings, models: Iterable[tuple[str, str]]) -> None:
    """Check that the key/value heads of every model divide into the ring's strides. Raises ConfigError."""
    stride = config.ring_head_stride
    for flag, path in models:
        heads = key_value_heads(path)
        if heads is not None and heads % stride != 0:
            raise ConfigError(
                f"--ring_head_stride {stride} does not divide the {heads} key/value heads of --{flag} {path}: choose a divisor."
            )


def check_compiled(config: ModelSettings, models: Iterable[tuple[str, str]]) -> None:
    """Check that the layers of every model can be compiled, and that this machine can compile them. Raises ConfigError."""
    if not config.torch_compile:
        return
    for flag, path in models:
        kind = model_settings(path).get("model_type")
        if kind is not None and kind not in COMPILABLE:
            raise ConfigError(
                f"--torch_compile is tested with {', '.join(COMPILABLE)} models, but --{flag} {path} is a {kind} model: "
                "leave it out."
            )
    # The nodes of a cluster compile for themselves.
    if not joins_cluster():
        check_compiler()


def check_replayed(config: RLConfig, folder: Path) -> None:
    """Check that the run in ``--replay`` had the settings that its rollouts depend on. Raises DataError or ConfigError."""
    from togi.obs.run_dir import RunDirectory

    try:
        before = RunDirectory(folder).read_info().values
    except DataError as error:
        raise DataError(f"--replay: {error}") from None
    for name in REPLAYED:
        then, now = before.get(name, {}).get("value"), getattr(config, name)
        if then != now:
            raise ConfigError(
                f"--replay {folder} was made with --{name} {then}, but here it is {now}: make them equal."
            )


def trained_models(config: RLConfig) -> list[tuple[str, str]]:
    """The folders that actor and critic start from, with their flags."""
    flags = {path: flag for flag, path in reversed(models_of(config))}
    sources = [config.pretrain, config.critic_source] if config.uses_critic else [config.pretrain]
    return [(flags[path], path) for path in sources]


def check_splits(config: TrainSettings, models: Iterable[tuple[str, str]]) -> None:
    """Check that the layers of every trained model split over ``--ds_tensor_parallel_size`` ranks. Raises UserError."""
    for flag, path in models:
        check_splittable(config.ds_tensor_parallel_size, flag, path, model_settings(path))


def check_backend(backend: BackendName) -> None:
    """Check that the package of the backend is installed. Raises ConfigError."""
    if backend is BackendName.DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "--backend deepspeed needs the package deepspeed: pip install 'togi[deepspeed]', or use --backend fsdp2."
        )


def check_prompts(config: RLConfig | IterateConfig) -> None:
    """Check prompt sets, fields and probabilities. Raises UserError."""
    keys = {"input_key": config.input_key} | ({"label_key": config.label_key} if config.label_key is not None else {})
    check_sets("prompt_data", config.prompt_data, keys, config.prompt_split)
    if config.prompt_data_probs is not None:
        parse_probs(config.prompt_data_probs, len(parse_items(config.prompt_data)), "--prompt_data_probs")
    if config.eval_dataset is not None:
        check_sets("eval_dataset", config.eval_dataset, keys, config.eval_split)


def check_pretraining(config: RLConfig, data: str) -> None:
    """Check sets, fields and probabilities of ``--pretrain_data``. Raises UserError."""
    keys = {"pretrain_input_key": config.pretrain_input_key}
    if config.pretrain_output_key is not None:
        keys["pretrain_output_key"] = config.pretrain_output_key
    check_sets("pretrain_data", data, keys, config.pretrain_split, every_row=False)
    if config.pretrain_data_probs is not None:
        parse_probs(config.pretrain_data_probs, len(parse_items(data)), "--pretrain_data_probs")


def check_sets(flag: str, text: str, keys: Mapping[str, str], split: str, *, every_row: bool = True) -> None:
    """Check that the data sets of a flag exist and have rows with the fields (``precheck.check_source``). Raises DataError."""
    try:
        check_sources(text, keys, split, every_row=every_row)
    except DataError as error:
        raise DataError(f"--{flag}: {error}") from None


def check_folders(config: OutputSettings, models: Iterable[tuple[str, str]], more_outputs: Iterable[str] = ()) -> None:
    """Check that every output folder can be written, that none would replace one of the ``models`` that the run reads, and that
    the run folder is not in use by another run. ``more_outputs``: model folders that are written beside ``--save_path``.
    """
    run_dir = config.run_dir if config.run_dir is not None else DEFAULT_PARENT
    for flag, folder in (("save_path", config.save_path), ("ckpt_path", config.ckpt_path), ("run_dir", run_dir)):
        check_writable(flag, Path(folder))
    models = list(models)
    outputs = [("save_path", config.save_path), ("ckpt_path", config.ckpt_path)]
    for flag, folder in outputs + [("save_path", folder) for folder in more_outputs]:
        check_target(flag, folder, models)
    if config.run_dir is not None and Path(config.run_dir).is_dir() and not config.load_checkpoint:
        from togi.obs.run_dir import RunDirectory

        RunDirectory(Path(config.run_dir)).check_unused()


def check_target(flag: str, output: str, sources: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError if the output folder is one of its sources or a folder around one, which would replace it."""
    target = Path(output).resolve()
    for name, source in sources:
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(target):
            raise ConfigError(f"--{flag} {output} would replace --{name} {source}: give another folder.")


def check_engine(name: EngineName) -> None:
    """Raise EngineUnavailableError if the package of the engine is not installed."""
    if name is EngineName.VLLM and importlib.util.find_spec("vllm") is None:
        raise EngineUnavailableError


def check_model(flag: str, path: str, *, adapters: bool = False) -> None:
    """Check that a folder holds config.json and weights; other names must be hub names, in the cache if the hub is off.

    ``adapters``: also accept a LoRA adapter. Raises ConfigError.
    """
    folder = Path(path)
    # A local folder: complete, and a model.
    if path and folder.is_dir():
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            if adapters:
                return
            raise ConfigError(
                f"--{flag} {path} is a LoRA adapter, not a model: merge it into its base with togi merge-lora first."
            )
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--{flag} {path} is a folder without config.json: give a Hugging Face model folder.")
        if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
            raise ConfigError(f"--{flag} {path} has no weights ({', '.join(WEIGHTS)}): give a complete model folder.")
        return
    # A hub name.
    if not HUB_NAME.fullmatch(path):
        raise ConfigError(f"--{flag} {path} is not a folder: give a Hugging Face model folder or a hub name.")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(path, "config.json"), str):
        raise ConfigError(
            f"--{flag} {path} is neither a folder nor in the hub cache, and HF_HUB_OFFLINE forbids to ask the hub: "
            "give a folder, or unset HF_HUB_OFFLINE."
        )


def check_context(config: RLConfig) -> None:
    """Check that the longest sequence fits the positions in every model's config.json, unless rope scaling extends them."""
    for _, path in models_of(config):
        check_length(asked_context(config), config.context_length, path, model_settings(path))


def asked_context(config: RLConfig) -> str:
    """The flags that determine the longest sequence, for messages."""
    if config.max_len is not None:
        return f"--max_len {config.max_len}"
    return f"--prompt_max_len {config.prompt_max_len} + --generate_max_len {config.generate_max_len}"


def check_engine_heads(flag: str, size: int, path: str) -> None:
    """Check that the attention heads divide evenly over the processes of an engine. Raises ConfigError."""
    heads = model_settings(path).get("num_attention_heads")
    if isinstance(heads, int) and heads % size != 0:
        raise ConfigError(f"--{flag} {size} does not divide the {heads} attention heads of {path}: lower it.")


def key_value_heads(path: str) -> int | None:
    """The key/value heads of a layer in the config.json of a model folder; None if it has no such entry."""
    heads = model_settings(path).get("num_key_value_heads")
    return heads if isinstance(heads, int) else None


def check_experts(config: ModelSettings) -> None:
    """Check that ``--aux_loss_coef`` is set only for a mixture of experts. Hub names are checked by ``check_causal_lm``."""
    settings = model_settings(config.pretrain)
    if config.aux_loss_coef > 0 and settings:
        check_mixture(config.pretrain, str(settings.get("model_type")))


def model_settings(path: str) -> dict[str, Any]:
    """The config.json of a model folder; empty if ``path`` is not such a folder. Raises ConfigError."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--pretrain: {file} cannot be read ({error}): give a complete model folder.") from None


def check_reward(item: str) -> None:
    """Check one entry of ``--reward_func``: the package of a built-in function, or the file. Raises RewardError."""
    verifier = verifier_of(item)
    if verifier is None:
        check_reward_file(Path(item))
    elif verifier.package and importlib.util.find_spec(verifier.package) is None:
        raise RewardError(f"--reward_func {item} needs the package {verifier.package}: pip install 'togi[rewards]'.")


def check_reward_file(path: Path) -> None:
    """Check that the file parses and defines ``reward_func``, without running it. Raises RewardError."""
    defined = _defined(_syntax(path, f"The reward file {path}", f"--{FUNCTION}", RewardError))
    if FUNCTION not in defined and "*" not in defined:
        there = listed(sorted(defined)) or "nothing"
        raise RewardError(
            f"The reward file {path} must define {FUNCTION}(queries, prompts, labels, **kwargs) but defines {there}: "
            f"add it, or rename your function to {FUNCTION}."
        )


def check_hook_file(flag: str, hook: Hook) -> None:
    """Check that the file of ``FILE.py:name`` parses and defines the name, without running it. Raises ConfigError."""
    if hook.function is not None:
        return
    defined = _defined(_syntax(Path(hook.path).expanduser(), f"--{flag} {hook}: the file", f"--{flag}", ConfigError))
    if hook.name not in defined and "*" not in defined:
        raise ConfigError(
            f"--{flag} {hook}: the file defines no {hook.name}, but {listed(sorted(defined)) or 'nothing'}: write one of those "
            "after the colon, or add it."
        )


def _syntax(path: Path, shown: str, flag: str, kind: type[UserError]) -> ast.Module:
    """The syntax tree of a user's Python file. Raises ``kind``."""
    try:
        return ast.parse(path.read_bytes())
    except OSError as error:
        raise kind(f"{shown} cannot be read ({error.strerror}): give {flag} the path of a Python file.") from None
    except SyntaxError as error:
        raise kind(f"{shown} has a syntax error in line {error.lineno}: {error.msg}.") from None
    except ValueError as error:
        raise kind(f"{shown} is not Python text: {error}.") from None


def _defined(tree: ast.Module) -> set[str]:
    """Every name that a module may define in any way; "*" for a star import."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def check_writable(flag: str, folder: Path) -> None:
    """Check that the folder, or its nearest existing parent, is a writable folder. Raises ConfigError."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"--{flag} {folder}: {nearest} is a file, not a folder; give another path.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--{flag} {folder}: {nearest} cannot be written; give another path or change its permissions."
        )


def trackers(config: OutputSettings) -> TrackerOptions:
    """The tracker flags in the form of the sinks."""
    return TrackerOptions(
        use_tensorboard=config.use_tensorboard or "",
        use_wandb=config.use_wandb or "",
        wandb_org=config.wandb_org or "",
        wandb_group=config.wandb_group or "",
        wandb_project=config.wandb_project,
        wandb_run_name=config.wandb_run_name or "",
        logging_steps=config.logging_steps,
    )


def check_offline(parsed: Parsed[Method], *, launched: bool = True) -> Parsed[Method]:
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
    _check_lengths(config)
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
    check_folders(config, other_models(config).items())
    return parsed


def other_models(config: Method) -> Mapping[str, str]:
    """Every model folder by its flag, the trained model first."""
    return {"pretrain": config.pretrain, **config.more_models}


def _check_lengths(config: Method) -> None:
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
