"""``--use_ms``: models and data sets by their ModelScope names, downloaded before anything reads them.

After that they are local folders. ModelScope's package caches downloads under a lock, so the processes of a launcher download
once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

from togi.config.infer import ChatConfig, InferConfig
from togi.config.parse import Parsed
from togi.config.shared import ModelSettings
from togi.config.tools import ServeRMConfig
from togi.data.items import Kind, parse_item, split_items
from togi.errors import ConfigError

MODELS = ("pretrain", "critic_pretrain", "ref_pretrain", "teacher_model")
MODEL_LISTS = ("reward_pretrain",)
DATA_LISTS = ("dataset", "eval_dataset", "prompt_data", "pretrain_data")
Config = TypeVar("Config", bound=ModelSettings | InferConfig | ChatConfig | ServeRMConfig)


def with_local_names(parsed: Parsed[Config]) -> Parsed[Config]:
    """The settings with each ModelScope name replaced by the folder that it was downloaded to. Local paths stay.

    No-op without ``--use_ms``. Raises ConfigError if the package is missing or the download fails.
    """
    if not parsed.config.use_ms:
        return parsed
    if importlib.util.find_spec("modelscope") is None:
        raise ConfigError("--use_ms needs the package modelscope: pip install 'togi[modelscope]'.")
    given = parsed.config.model_dump()
    found = {name: _model(name, given[name]) for name in MODELS if given.get(name)}
    found |= {name: _each(name, given[name].split(","), _model) for name in MODEL_LISTS if given.get(name)}
    found |= {name: _each(name, split_items(given[name]), _data_set) for name in DATA_LISTS if given.get(name)}
    return Parsed(cast(Config, parsed.config.model_copy(update=found)), parsed.sources)


def _each(flag: str, entries: Sequence[str], find: Callable[[str, str], str]) -> str:
    """Apply ``find(flag, entry)`` to each entry; returns a comma-separated list."""
    return ",".join(find(flag, entry.strip()) for entry in entries)


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
