"""A peer's side: the job that its script in ``benchmarks/peers`` reads, and the steps that it wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from comparison.cases import Case, Kind, Setting
from comparison.material import SEED, Material
from comparison.places import ROOT, peers_python
from comparison.summary import Steps
from comparison.togi_side import KL, torchrun, work_of

SCRIPTS = {"trl": "trl_trainers.py", "transformers": "transformers_trainer.py", "deepspeed": "deepspeed_loop.py"}
RESULT = "steps.json"


def command(
    peer: str,
    case: Case,
    setting: Setting,
    model: Path,
    material: Material,
    folder: Path,
    processes: int,
    precision: str,
) -> list[str]:
    job = {
        "kind": case.kind,
        "model": str(model),
        "data": str(material.peer),
        "out": str(folder / RESULT),
        "folder": str(folder / "trainer"),
        "batch": setting.batch,
        "items": case.items,
        "steps": case.steps,
        "learning_rate": case.learning_rate,
        "seed": SEED,
        "kl": KL,
        "answers": case.answers,
        "answer_tokens": int(case.answer.mean),
        "processes": processes,
        "precision": precision,
        "options": dict(setting.options),
    }
    assert case.items % (setting.batch * processes) == 0, (
        f"{setting.name} does not divide the {case.items} rows of a step"
    )
    path = folder / "job.json"
    path.write_text(json.dumps(job, indent=1))
    here = peer == "deepspeed"
    launcher = torchrun(processes) if processes > 1 or here else []
    python = sys.executable if here else str(peers_python())
    return [python, *launcher, str(ROOT / "benchmarks" / "peers" / SCRIPTS[peer]), str(path)]


def steps_of(case: Case, material: Material, folder: Path, started: float) -> Steps:
    """Steps on the peer's own clock; the first step's end also by the time of day."""
    written = json.loads((folder / RESULT).read_text())
    work = tuple(map(work_of, written["lengths"])) if case.kind is Kind.GENERATED else material.work
    return Steps(
        ends=tuple(written["ends"]),
        launch=written["first_end"] - started,
        losses=tuple(written["losses"]),
        grad_norms=tuple(written["grad_norms"]),
        work=work,
    )
