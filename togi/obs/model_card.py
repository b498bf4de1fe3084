"""The model card of an exported model: README.md with the metadata of the Hugging Face hub, made from a run folder.

Its text is ``page/card.md.j2``, which says what is in it in which order; here is where that comes from.

A card may be published: it has no secrets and no server addresses, and only the last part of local paths.
"""

import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader

from togi.obs.metrics import read_records
from togi.obs.run_dir import REDACTED, SECRET_FLAGS, RunDirectory, RunInfo, read_data_reports, scrub

CARD = "README.md"
LIBRARIES = ("torch", "transformers", "safetensors", "peft", "bitsandbytes", "deepspeed", "vllm", "ray")
# Settings about the machine and the user, not about the model.
NOT_SHOWN = SECRET_FLAGS | {
    *("run_dir", "save_path", "ckpt_path", "load_checkpoint", "local_rank", "remote_rm_url", "token_file"),
    *("use_tensorboard", "wandb_org", "wandb_group", "wandb_project", "wandb_run_name"),
}
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TOGI_REWARD_TOKEN")
# "account/name" as on the hub.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(run: RunDirectory, *, base_model: str, training: str, is_scalar: bool, step: int | None) -> str:
    """The text of README.md. Raises DataError if ``run`` is not a run folder.

    ``training``: the training in words. ``step``: of the checkpoint, None for the final model.
    """
    info = run.read_info()
    # A checkpoint is described by the metrics up to its step. The last value of each, since evaluations are rarer than steps.
    metrics: dict[str, tuple[int, float]] = {}
    for record in read_records(run.metrics_path):
        if step is None or record.step <= step:
            metrics |= {name: (record.step, value) for name, value in record.values.items()}
    metadata = yaml.safe_dump(_metadata(info, base_model, is_scalar=is_scalar), sort_keys=False, allow_unicode=True)
    pages = Environment(  # noqa: S701  Markdown: there is nothing to escape
        loader=PackageLoader("togi.obs", "page"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    pages.filters |= {"shown": shown, "counts": _counts, "cell": _cell}
    text = pages.get_template("card.md.j2").render(
        metadata=metadata.strip(),
        base_model=base_model,
        training=training,
        info=info,
        step=step,
        reports=read_data_reports(run.root),
        # the settings that were given, or that depend on the machine
        settings={
            name: entry["value"]
            for name, entry in info.values.items()
            if entry["source"] != "default" and name not in NOT_SHOWN and entry["value"] != REDACTED
        },
        metrics=metrics,
        versions=_versions(),
    )
    # A secret may be inside another setting, so the whole text is searched.
    return scrub(text, [os.environ[name] for name in SECRET_VARIABLES if name in os.environ])


def shown(value: object) -> str:
    """A setting for others to see: only the last part of a local path."""
    return ",".join(Path(part).name if part.startswith(("/", ".", "~")) else part for part in str(value).split(","))


def _metadata(info: RunInfo, base_model: str, *, is_scalar: bool) -> dict[str, object]:
    record: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if is_scalar else "text-generation",
        "tags": ["togi", info.command],
    }
    if _on_hub(base_model):
        record["base_model"] = base_model
    sets = [item for name in ("dataset", "prompt_data") for item in _names(info, name) if _on_hub(item)]
    return record | ({"datasets": sets} if sets else {})


def _on_hub(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _names(info: RunInfo, setting: str) -> list[str]:
    value = info.values.get(setting, {}).get("value")
    return [part.split("@")[0] for part in value.split(",") if part] if isinstance(value, str) else []


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count > 0) or "none"


def _cell(value: object) -> str:
    """A setting as a cell of a table."""
    text = shown(value) if isinstance(value, str) else json.dumps(value)
    return text.replace("\n", "\\n").replace("|", "\\|")


def _versions() -> dict[str, str]:
    """The installed ones of ``LIBRARIES``."""
    found = {}
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found
