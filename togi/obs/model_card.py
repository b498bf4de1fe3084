"""The model card of an exported model: README.md with the metadata of the Hugging Face hub, made from a run folder.

A card may be published: it has no secrets and no server addresses, and only the last part of local paths.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from togi.obs.metrics import StepRecord, read_records
from togi.obs.run_dir import REDACTED, SECRET_FLAGS, RunDirectory, RunInfo, scrub

CARD = "README.md"
LIBRARIES = ("torch", "transformers", "safetensors", "peft", "bitsandbytes", "deepspeed", "vllm", "ray")
# Settings about the machine and the user, not about the model.
NOT_SHOWN = SECRET_FLAGS | {
    "run_dir",
    "save_path",
    "ckpt_path",
    "load_checkpoint",
    "local_rank",
    "use_tensorboard",
    "wandb_org",
    "wandb_group",
    "wandb_project",
    "wandb_run_name",
    "remote_rm_url",
    "token_file",
}
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TOGI_REWARD_TOKEN")
# "account/name" as on the hub.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(run: RunDirectory, *, base_model: str, training: str, is_scalar: bool, step: int | None) -> str:
    """The text of README.md. Raises DataError if ``run`` is not a run folder.

    ``training``: the training in words. ``step``: of the checkpoint, None for the final model.
    """
    info = run.read_info()
    # A checkpoint is described by the metrics up to its step.
    records = [record for record in read_records(run.metrics_path) if step is None or record.step <= step]
    lines = [
        "---",
        yaml.safe_dump(_metadata(info, base_model, is_scalar=is_scalar), sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {shown(base_model)} after {training}",
        "",
        f"Made from `{shown(base_model)}` by `togi {info.command}`"
        + ("." if step is None else f"; this is the checkpoint of step {step}."),
        "",
        *_data(run.root / "data"),
        *_settings(info),
        *_metrics(records),
        *_versions(info),
    ]
    # A secret may be inside another setting, so the whole text is searched.
    secrets = [os.environ[name] for name in SECRET_VARIABLES if name in os.environ]
    return scrub("\n".join(lines) + "\n", secrets)


def shown(value: object) -> str:
    """A setting for others to see: only the last part of a local path."""
    return ",".join(Path(part).name if part.startswith(("/", ".", "~")) else part for part in str(value).split(","))


def _metadata(info: RunInfo, base_model: str, *, is_scalar: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
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


def _data(folder: Path) -> Iterator[str]:
    """A table of each set from the data reports, without any row."""
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not reports:
        return
    yield from ("## Data", "", "| part | set | rows | used | left out |", "|---|---|---:|---:|---|")
    for part, report in reports.items():
        for source in report["sources"]:
            reasons = _counts(source["dropped"])
            yield f"| {part} | {shown(source['name'])} | {source['rows']} | {source['kept']} | {reasons} |"
    yield ""
    for part, report in reports.items():
        faults = report["faults"]
        if faults["rows"] > 0:
            yield f"Faulty rows in {part}: {faults['rows']} of {faults['of']} ({_counts(faults['by_kind'])})."
            yield ""


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count > 0) or "none"


def _settings(info: RunInfo) -> Iterator[str]:
    """The settings that were given, or that depend on the machine."""
    chosen = {
        name: entry["value"]
        for name, entry in info.values.items()
        if entry["source"] != "default" and name not in NOT_SHOWN and entry["value"] != REDACTED
    }
    yield from ("## Settings that differ from the defaults", "", "| setting | value |", "|---|---|")
    for name, value in chosen.items():
        text = shown(value) if isinstance(value, str) else json.dumps(value)
        yield f"| {name} | {_cell(text)} |"
    yield ""


def _cell(text: str) -> str:
    """Text escaped for a table cell."""
    return text.replace("\n", "\\n").replace("|", "\\|")


def _metrics(records: Sequence[StepRecord]) -> Iterator[str]:
    """The last value of every metric and its step, since evaluations are rarer than steps."""
    last: dict[str, tuple[int, float]] = {}
    for record in records:
        last.update({name: (record.step, value) for name, value in record.values.items()})
    if not last:
        return
    yield from ("## Metrics at the end", "", "| metric | value | step |", "|---|---:|---:|")
    for name in sorted(last):
        step, value = last[name]
        yield f"| {name} | {value:.6g} | {step} |"
    yield ""


def _versions(info: RunInfo) -> Iterator[str]:
    yield from (
        "## Versions",
        "",
        f"Trained with togi {info.togi_version} on Python {info.python_version}. Exported beside:",
        "",
    )
    for library in LIBRARIES:
        try:
            yield f"- {library} {importlib.metadata.version(library)}"
        except importlib.metadata.PackageNotFoundError:
            continue
