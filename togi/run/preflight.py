"""All checks of a run that take under a second: no torch, no model, no Ray, only the head of the data.

Contradictions between flags come first, then placement, packages, models, data, the reward file and folders. Checks that need
the tokenizer or a call of the reward function follow, before any model is loaded (``togi.run.rl_setup``)."""

import ast
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar, cast

from togi.config.architectures import COMPILABLE
from togi.config.choices import BackendName, EngineName
from togi.config.fields import Hook, hook_of
from togi.config.infer import ChatConfig, InferConfig
from togi.config.iterate import IterateConfig
from togi.config.model_facts import check_length
from togi.config.parse import Parsed
from togi.config.rl import RLConfig, SampleSettings, verifier_of
from togi.config.rl_checks import check_rl
from togi.config.shared import (
    ADAPTER_CONFIG,
    ModelSettings,
    OutputSettings,
    VLLMSettings,
    check_mixture,
    check_splittable,
)
from togi.config.tools import ServeRMConfig
from togi.data.items import Kind, listed, parse_item, parse_items, split_items
from togi.data.precheck import check_sources, parse_probs
from togi.errors import ConfigError, DataError, EngineUnavailableError, RewardError, UserError
from togi.learn.checkpoint import BEST_FOLDER, PREFIX, left_behind
from togi.methods import check_method
from togi.methods.method import Method
from togi.obs.run_dir import RunDirectory
from togi.obs.sinks import TrackerOptions, check_trackers
from togi.plan.engine_args import check_extra_arguments, check_head_size
from togi.plan.machine import Machine, check_compiler, joins_cluster, ray_place, this_machine
from togi.plan.placement import check_fits, check_spread, check_workers, plan_groups, resolve
from togi.run.plan import check_rl_metric, offline_aim

FUNCTION = "reward_func"
DEFAULT_PARENT = "runs"
# Settings that stored rollouts and their rewards depend on, besides their prompts: order, number, length and logprobs, and all
# that is done to groups when they are made.
REPLAYED = (
    *("seed", "rollout_batch_size", "n_samples_per_prompt", "generate_max_len", "temperature"),
    *SampleSettings.model_fields,
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ADAPTER_FILES = "adapter_model."
WEIGHTS = ("*.safetensors", "*.bin")


def check(parsed: Parsed[RLConfig], machine: Machine, *, reward_given: bool) -> Parsed[RLConfig]:
    """The settings with every ``auto`` of the placement resolved, and local names. Raises the first UserError.

    ``reward_given``: the reward is a Python function passed in code.
    """
    # What no change of other flags would mend, then flags against each other.
    check_rounding(parsed.config, machine)
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
    else:
        ray_place(os.environ["RAY_ADDRESS"])
    # Packages and models.
    if config.replay is None:
        check_engine(config.rollout_engine, config, config.pretrain, config.bf16, machine)
    else:
        check_replayed(config, Path(config.replay))
    models = models_of(config)
    check_models(config, models, asked_context(config), config.context_length)
    flags = {path: flag for flag, path in reversed(models)}
    for path in (config.pretrain, config.critic_source) if config.uses_critic else (config.pretrain,):
        check_splittable(config.ds_tensor_parallel_size, flags[path], path, model_settings(path))
    check_engine_heads("vllm_tensor_parallel_size", config.vllm_tensor_parallel_size, config.pretrain)
    # Data, reward files, hooks, folders.
    check_prompts(config)
    if config.pretrain_data is not None:
        keys = {"pretrain_input_key": config.pretrain_input_key, "pretrain_output_key": config.pretrain_output_key}
        split, probs = config.pretrain_split, config.pretrain_data_probs
        check_sets("pretrain_data", config.pretrain_data, keys, split, probs, every_row=False)
    for file in config.reward_files:
        check_reward(file)
    acting = [("environment", hook) for hook in (config.environment or {}).values()]
    for name, value in [*config, *acting, ("agent", hook_of(config.agent or ""))]:
        if isinstance(value, Hook):
            check_hook_file(name, value)
    critic = [f"{config.save_path}_critic"] if config.save_value_network else []
    check_outputs(config, models, [*critic, *([f"{config.save_path}_ema"] if config.enable_ema else [])])
    return parsed


def models_of(config: RLConfig) -> list[tuple[str, str]]:
    """Every model folder with its flag."""
    critic = [("critic_pretrain", config.critic_pretrain)] if config.critic_pretrain is not None else []
    return [("pretrain", config.pretrain), *critic, *(("reward_pretrain", path) for path in config.reward_models)]


def check_models(config: RLConfig | Method, models: Sequence[tuple[str, str]], asked: str, longest: int) -> None:
    """Check the training backend, and each model folder against the flags by its config.json. Raises UserError.

    ``longest``: tokens of the longest sequence, which the flags ``asked`` allow.
    """
    check_backend(config.backend)
    for flag, path in models:
        check_model(flag, path)
    for flag, path in models:
        facts, stride = model_settings(path), config.ring_head_stride
        heads, kind = facts.get("num_key_value_heads"), facts.get("model_type")
        if isinstance(heads, int) and heads % stride != 0:
            raise ConfigError(
                f"--ring_head_stride {stride} does not divide the {heads} key/value heads of --{flag} {path}: choose a divisor."
            )
        if config.torch_compile and kind is not None and kind not in COMPILABLE:
            raise ConfigError(
                f"--torch_compile is tested with {', '.join(COMPILABLE)} models, but --{flag} {path} is a {kind} model: "
                "leave it out."
            )
        check_length(asked, longest, path, facts)
    # The nodes of a cluster compile for themselves.
    if config.torch_compile and not joins_cluster():
        check_compiler()
    # A hub name has no config.json here: `check_causal_lm` looks at it.
    if config.aux_loss_coef > 0 and (facts := model_settings(config.pretrain)):
        check_mixture(config.pretrain, str(facts.get("model_type")))


def check_replayed(config: RLConfig, folder: Path) -> None:
    """Check that the run in ``--replay`` had the settings that its rollouts depend on. Raises DataError or ConfigError."""
    try:
        before = RunDirectory(folder).read_info().values
    except DataError as error:
        raise DataError(f"--replay: {error}") from None
    here = config.model_dump(mode="json")
    for name in REPLAYED:
        then, now = before.get(name, {}).get("value"), here[name]
        if then != now:
            raise ConfigError(
                f"--replay {folder} was made with --{name} {then}, but here it is {now}: make them equal."
            )


def check_backend(backend: BackendName) -> None:
    """Check that the package of the backend is installed. Raises ConfigError."""
    if backend is BackendName.DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "--backend deepspeed needs the package deepspeed: pip install '.[deepspeed]', or use --backend fsdp2."
        )


def check_prompts(config: RLConfig | IterateConfig) -> None:
    """Check prompt sets, fields and probabilities. Raises UserError."""
    keys = {"input_key": None if config.acts else config.input_key, "label_key": config.label_key}
    check_sets("prompt_data", config.prompt_data, keys, config.prompt_split, config.prompt_data_probs)
    if config.eval_dataset is not None:
        check_sets("eval_dataset", config.eval_dataset, keys, config.eval_split)


def check_sets(
    flag: str,
    text: str,
    keys: Mapping[str, str | None],
    split: str,
    probs: str | None = None,
    *,
    every_row: bool = True,
) -> None:
    """Check that the data sets of a flag exist and have rows with the fields that ``keys`` name (``precheck.check_source``).

    ``probs``: the value of the flag's probabilities. Raises UserError.
    """
    named = {name: key for name, key in keys.items() if key is not None}
    try:
        check_sources(text, named, split, every_row=every_row)
    except DataError as error:
        raise DataError(f"--{flag}: {error}") from None
    if probs is not None:
        parse_probs(probs, len(parse_items(text)), f"--{flag}_probs")


def check_outputs(config: OutputSettings, models: Sequence[tuple[str, str]], more_outputs: Sequence[str] = ()) -> None:
    """Check the trackers, that every output folder can be written, that none would replace one of the ``models`` that the run
    reads, and that no other run is in the run folder. ``more_outputs``: model folders that are written beside ``--save_path``.
    """
    check_trackers(trackers(config))
    outputs = [("save_path", config.save_path), ("ckpt_path", config.ckpt_path)]
    for flag, folder in (*outputs, ("run_dir", config.run_dir or DEFAULT_PARENT)):
        check_writable(flag, Path(folder))
    for flag, folder in (*outputs, *(("save_path", folder) for folder in more_outputs)):
        check_target(flag, folder, models)
    final, kept = Path(config.save_path).resolve(), Path(config.ckpt_path).resolve()
    inside = final.relative_to(kept).parts[:1] if final.is_relative_to(kept) else ()
    if any(name == BEST_FOLDER or name.startswith(PREFIX) for name in inside):
        raise ConfigError(
            f"--save_path {config.save_path} is where the run keeps its best model or a checkpoint (--ckpt_path "
            f"{config.ckpt_path}): give another folder."
        )
    if config.run_dir is not None and Path(config.run_dir).is_dir() and not config.load_checkpoint:
        RunDirectory(Path(config.run_dir)).check_unused()
    # A new run finds no checkpoint or best model of an earlier one where it writes its own: they would be resumed as its own,
    # and pruned in place of older ones of its own.
    if config.keeps_checkpoints and not config.load_checkpoint and (left := left_behind(Path(config.ckpt_path))):
        raise ConfigError(
            f"--ckpt_path {config.ckpt_path} already holds {listed(left[-2:])} of an earlier run: go on with that run by "
            "--load_checkpoint, give another --ckpt_path, or remove the folder."
        )


def check_target(flag: str, output: str, sources: Sequence[tuple[str, str]]) -> None:
    """Raise ConfigError if the output folder is one of its sources or a folder around one, which would replace it."""
    target = Path(output).resolve()
    for name, source in sources:
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(target):
            raise ConfigError(f"--{flag} {output} would replace --{name} {source}: give another folder.")


def check_rounding(config: VLLMSettings, machine: Machine) -> None:
    """Raise ConfigError for fp8 without GPUs."""
    if config.rounding and machine.gpus == 0 and not joins_cluster():
        raise ConfigError(f"--{config.rounding[0]} fp8 needs GPUs: leave it out.")


def check_engine(name: EngineName, config: VLLMSettings, pretrain: str, bf16: bool, machine: Machine) -> None:
    """Check that the engine is installed and takes settings and model. Raises EngineUnavailableError, ConfigError."""
    if name is not EngineName.VLLM:
        return
    if importlib.util.find_spec("vllm") is None:
        raise EngineUnavailableError
    check_extra_arguments(config.vllm_args)
    check_rounding(config, machine)
    if config.rounding and not bf16:
        flag = config.rounding[0]
        raise ConfigError(f"--{flag} fp8 needs --bf16, as vLLM has no fp8 beside float32: change one of them.")
    if machine.gpus == 0 and not joins_cluster():
        check_head_size(pretrain, model_settings(pretrain))


def check_model(flag: str, path: str, *, adapters: bool = False) -> None:
    """Check that a folder holds config.json and weights; other names must be hub names, in the cache if the hub is off.

    ``adapters``: also accept a LoRA adapter. Raises ConfigError.
    """
    folder = Path(path)
    # A local folder: complete, and a model.
    if path and folder.is_dir():
        weights = any(
            file for pattern in WEIGHTS for file in folder.glob(pattern) if not file.name.startswith(ADAPTER_FILES)
        )
        if (folder / ADAPTER_CONFIG).is_file() and not (weights and (folder / "config.json").is_file()):
            if adapters:
                return
            raise ConfigError(
                f"--{flag} {path} is a LoRA adapter, not a model: merge it into its base with togi merge-lora first."
            )
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--{flag} {path} is a folder without config.json: give a Hugging Face model folder.")
        if not weights:
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


def model_settings(path: str) -> dict[str, object]:
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
        raise RewardError(f"--reward_func {item} needs the package {verifier.package}: pip install '.[rewards]'.")


def check_reward_file(path: Path) -> None:
    """Check that the file parses and defines ``reward_func``, without running it. Raises RewardError."""
    defined = _defined(path, f"The reward file {path}", f"--{FUNCTION}", RewardError)
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
    defined = _defined(Path(hook.path).expanduser(), f"--{flag} {hook}: the file", f"--{flag}", ConfigError)
    if hook.name not in defined and "*" not in defined:
        raise ConfigError(
            f"--{flag} {hook}: the file defines no {hook.name}, but {listed(sorted(defined)) or 'nothing'}: write one of those "
            "after the colon, or add it."
        )


def _defined(path: Path, shown: str, flag: str, kind: type[UserError]) -> set[str]:
    """Every name that a user's Python file may define in any way; "*" for a star import. Raises ``kind``."""
    try:
        tree = ast.parse(path.read_bytes())
    except OSError as error:
        raise kind(f"{shown} cannot be read ({error.strerror}): give {flag} the path of a Python file.") from None
    except SyntaxError as error:
        raise kind(f"{shown} has a syntax error in line {error.lineno}: {error.msg}.") from None
    except ValueError as error:
        raise kind(f"{shown} is not Python text: {error}.") from None
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def existing(folder: Path) -> Path:
    """The folder, or the nearest existing parent."""
    whole = folder.absolute()
    return next(path for path in (whole, *whole.parents) if path.exists())


def check_writable(flag: str, folder: Path) -> None:
    """Check that the folder, or its nearest existing parent, is a writable folder. Raises ConfigError."""
    nearest = existing(folder)
    if not nearest.is_dir():
        raise ConfigError(f"--{flag} {folder}: {nearest} is a file, not a folder; give another path.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--{flag} {folder}: {nearest} cannot be written; give another path or change its permissions."
        )


def trackers(config: OutputSettings) -> TrackerOptions:
    """The tracker flags in the form of the sinks."""
    given = config.model_dump(include={each.name for each in fields(TrackerOptions)}, exclude_none=True)
    return TrackerOptions(**given)


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
        check_engine(config.on_policy.rollout_engine, config.on_policy, config.pretrain, config.bf16, this_machine())
    models = [("pretrain", config.pretrain), *config.more_models.items()]
    check_models(config, models, f"--max_len {config.max_len}", config.max_len)
    if launched:
        check_teams(config)
    check_splittable(config.ds_tensor_parallel_size, "pretrain", config.pretrain, model_settings(config.pretrain))
    # Data and folders. Single bad rows are counted when the data is loaded.
    keys = config.row_fields
    check_sets("dataset", config.dataset, keys, config.split, config.dataset_probs, every_row=False)
    if config.eval_dataset is not None:
        check_sets("eval_dataset", config.eval_dataset, keys, config.eval_split, every_row=False)
    check_outputs(config, models)
    return parsed


def check_teams(config: Method) -> None:
    """Check that the launched processes divide into rings, tensor-parallel groups or groups of shards. Raises ConfigError."""
    for flag, size in (
        ("--ring_attn_size", config.ring_attn_size),
        ("--ds_tensor_parallel_size", config.ds_tensor_parallel_size),
        ("--fsdp_shard_size", config.fsdp_shard_size or 1),
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


# ``--use_ms``: models and data sets by their ModelScope names, downloaded before anything reads them. After that they are local
# folders. ModelScope's package caches downloads under a lock, so the processes of a launcher download once.

MODELS = ("pretrain", "critic_pretrain", "ref_pretrain", "teacher_model")
OUTPUTS = ("save_path", "ckpt_path", "run_dir")
DATA_LISTS = ("dataset", "eval_dataset", "prompt_data", "pretrain_data")
Named = TypeVar("Named", bound=ModelSettings | InferConfig | ChatConfig | ServeRMConfig)


def with_local_names(parsed: Parsed[Named]) -> Parsed[Named]:
    """The settings with each ModelScope name replaced by the folder that it was downloaded to. Local paths stay.

    No-op without ``--use_ms``. Raises ConfigError if the package is missing or the download fails.
    """
    if not parsed.config.use_ms:
        return parsed
    if importlib.util.find_spec("modelscope") is None:
        raise ConfigError("--use_ms needs the package modelscope: pip install '.[modelscope]'.")
    given = parsed.config.model_dump()
    found = {name: _model(name, given[name]) for name in MODELS if given.get(name)}
    if models := given.get("reward_pretrain"):
        found["reward_pretrain"] = ",".join(_model("reward_pretrain", item.strip()) for item in models.split(","))
    for name in (name for name in DATA_LISTS if given.get(name)):
        found[name] = ",".join(_data_set(name, item.strip()) for item in split_items(given[name]))
    return Parsed(cast(Named, parsed.config.model_copy(update=found)), parsed.sources)


def absolute(name: str, value: object) -> object:
    """The value of a setting; output folders and local models as absolute paths."""
    if not isinstance(value, str) or name not in (*OUTPUTS, *MODELS, "reward_pretrain"):
        return value
    parts = value.split(",") if name == "reward_pretrain" else [value]
    return ",".join(str(Path(part).absolute()) if name in OUTPUTS or Path(part).is_dir() else part for part in parts)


def _model(flag: str, name: str) -> str:
    if Path(name).is_dir():
        return name
    from modelscope import snapshot_download

    from togi.weights.files import FILES

    return _downloaded(flag, name, lambda: snapshot_download(name, allow_patterns=FILES))


def _data_set(flag: str, text: str) -> str:
    """``name[@data_dir]`` as in every data flag: the part after @ is a folder inside the set."""
    item = parse_item(text)
    if item.kind is not Kind.HUB:
        return text
    from modelscope import dataset_snapshot_download

    folder = _downloaded(flag, item.location, lambda: dataset_snapshot_download(item.location))
    return f"{folder}@{item.data_dir}" if item.data_dir else folder


def _downloaded(flag: str, name: str, download: Callable[[], str]) -> str:
    if name.count("/") != 1:
        raise ConfigError(f"--{flag} {name} is no folder and no name of ModelScope: write namespace/name.")
    try:
        return download()
    except Exception as error:  # noqa: BLE001  the package's, its HTTP library's and the network's, which share no class
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--{flag} {name} cannot be had from ModelScope ({reason}): check the name and the network, or give a folder."
        ) from None
