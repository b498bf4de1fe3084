"""What the supervised and preference commands learn on real data: makes the runs of results.yaml and writes docs/results.md.

    TOGI_SHARED_DATA=FOLDER python benchmarks/results.py             # all of them; what is done already is not done again
    TOGI_SHARED_DATA=FOLDER python benchmarks/results.py rm_persona  # these only, anew

FOLDER holds the public sets that results.yaml names, as JSON lines. The model is that of examples/demo/prepare.py. Every figure
is on a held-out split that has no prompt in common with the training split. A run that misses its goal makes the script fail.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from togi.plan.machine import cache_folder

ROOT = Path(__file__).parents[1]
CACHE = cache_folder()
MODEL = CACHE / "smollm2-135m-instruct"
RUNS = ROOT / "runs" / "results"
DOCS = ROOT / "docs"
MADE = RUNS / "data"
PLAN = yaml.safe_load((Path(__file__).parent / "results.yaml").read_text())
SHOWN = ("eval/loss", "eval/accuracy", "eval/reward/margin", "eval/kl/teacher")
STEP = "<file_sep>"
PRM_TOKENS = 384
PRM_ROW = runpy.run_path(str(ROOT / "examples" / "prm_rows.py"))["convert"]
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)


def main() -> int:
    data = Path(os.environ["TOGI_SHARED_DATA"])
    wanted = sys.argv[1:] or [name for name in PLAN["jobs"] if not (RUNS / name / "result.json").is_file()]
    majority = make_sets(data)
    for name in wanted:
        run(name, PLAN["jobs"][name], data, majority)
    results = {
        name: json.loads(file.read_text()) for name in PLAN["jobs"] if (file := RUNS / name / "result.json").is_file()
    }
    write_page(results)
    missed = [name for name, result in results.items() if not result["reached"]]
    print(f"missed: {', '.join(missed)}" if missed else f"{len(results)} of {len(PLAN['jobs'])} runs, all reached")
    return 1 if missed else 0


def make_sets(data: Path) -> float:
    """Sets in the shape that a command reads; returns the share of the larger class of step labels in the test split."""
    MADE.mkdir(parents=True, exist_ok=True)
    signs: Counter[str] = Counter()
    for split in ("train", "test"):
        rows = convert(data / "step_labels" / f"{split}.jsonl", MADE / f"steps_{split}.jsonl", steps, fits)
        signs = Counter(sign for row in rows for sign in row["label"])
        convert(data / "fastchat_identity" / f"sft_{split}.jsonl", MADE / f"identity_{split}.jsonl", last_turn)
    return max(signs.values()) / sum(signs.values())


def convert(
    source: Path,
    target: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    keep: Callable[[dict[str, Any]], bool] = lambda row: True,
) -> list[dict[str, Any]]:
    rows = [change(json.loads(line)) for line in source.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if keep(row)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def fits(row: dict[str, Any]) -> bool:
    """Whether --max_len would not drop it: the majority must be that of the rows that are measured."""
    return len(TOKENIZER(row["text"])["input_ids"]) <= PRM_TOKENS


def steps(row: dict[str, Any]) -> dict[str, Any]:
    """The steps up to the first wrong one, which is the last that was judged, each with a marker after it."""
    made = PRM_ROW(row, STEP)
    return {"text": made["text"], "label": made["labels"]}


def last_turn(row: dict[str, Any]) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    return {"prompt": prompt, "answer": answer["content"]}


def head(path: str, name: str, rows: int) -> str:
    """The first ``rows`` lines as a set of their own."""
    target = MADE / f"{name}_test.jsonl"
    target.write_text(
        "".join(Path(path).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8"
    )
    return f"{{made}}/{target.name}"


def run(name: str, job: dict[str, Any], data: Path, majority: float) -> None:
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    flags = f"{job['flags']} {PLAN['common']}"
    test = head(job["test"].format(data=data, made=MADE), name, job["test_rows"]) if "test_rows" in job else job["test"]
    words = ["togi", job["command"], "--pretrain", "{model}", "--dataset", job["train"], "--eval_dataset", test]
    places = {"data": data, "made": MADE, "runs": RUNS, "model": MODEL}
    outputs = ["--run_dir", folder, "--save_path", folder / "model", "--ckpt_path", folder / "checkpoints"]
    filled = [str(word).format(**places) for word in (*words[1:], *flags.split(), *outputs)]
    print(f"{name}: togi {' '.join(filled)}", flush=True)
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "togi", *filled], cwd=ROOT, check=True)
    steps_of_run = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [step["values"] for step in steps_of_run if "eval/loss" in step["values"]]
    first, last = measured[0][job["metric"]], measured[-1][job["metric"]]
    goal = majority if job.get("goal") == "majority" else job.get("goal")
    reached = last < first if job["better"] == "falls" else last > first
    result = {
        "command": " ".join([*words, *flags.split()]),
        "first": {key: measured[0][key] for key in SHOWN if key in measured[0]},
        "last": {key: measured[-1][key] for key in SHOWN if key in measured[-1]},
        "goal": goal,
        "reached": bool(reached and (goal is None or last > goal)),
        "minutes": (time.monotonic() - start) / 60,
        "steps": steps_of_run[-1]["step"],
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def write_page(results: dict[str, dict[str, Any]]) -> None:
    lines = [
        "# What the commands learn on real data",
        "",
        "    TOGI_SHARED_DATA=FOLDER .venv/bin/python benchmarks/results.py    # makes this page again",
        "",
        "SmolLM2-135M-Instruct, bf16, on two CPU cores without a GPU. Every figure is measured on a held-out split that shares",
        "no prompt with the training split, before the first and after the last optimizer step. Small sets and one seed: these",
        "runs show that each command learns what its data teach, not how good a model can become. The limit of prm_steps is the",
        "share of the larger class; rewards of DPO and KTO are 0 before training, when the policy is the reference. Minutes were",
        "taken beside other work and are no measure of speed. Most sets are cut with --max_samples; a run that missed says so.",
        "",
        "| run | steps | figure | before | after | must | minutes |",
        "|---|---:|---|---:|---:|---|---:|",
    ]
    for name, result in results.items():
        job = PLAN["jobs"][name]
        for key in sorted(result["last"], key=lambda key: key != job["metric"]):
            main_figure = key == job["metric"]
            must = f"{'**' if result['reached'] else 'MISSED '}{job['better']}" if main_figure else ""
            must += f", above {result['goal']:.3f}" if main_figure and result["goal"] is not None else ""
            must += "**" if main_figure and result["reached"] else ""
            head = f"{name} | {result['steps']}" if main_figure else " | "
            tail = f"{result['minutes']:.1f}" if main_figure else ""
            lines.append(
                f"| {head} | {key} | {result['first'][key]:.3f} | {result['last'][key]:.3f} | {must} | {tail} |"
            )
    lines += ["", "## The commands", "", "`{data}` is FOLDER, `{made}` what the script makes of it.", ""]
    for name, result in results.items():
        lines += [f"**{name}**", "", f"    {result['command']}", ""]
    lines += estimators_section() + chain_section()
    (DOCS / "results.md").write_text("\n".join(lines), encoding="utf-8")


def estimators_section() -> list[str]:
    """What benchmarks/estimators.py measured."""
    file = DOCS / "estimators.json"
    if not file.is_file():
        return []
    results = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "## Six advantage estimators, one start and one budget",
        "",
        "    .venv/bin/python benchmarks/estimators.py    # measures and draws again",
        "",
        "`togi rl` on the one-digit sums of examples/demo (made by reasoning-gym): 12 rollouts of 16 prompts x 8 samples, one",
        "update each, the same prompts, seed and learning rate, no KL term; only PPO has a critic. Mean reward of four samples",
        "for each of 64 held-out prompts, with its standard error over prompts. One seed each, so this orders nothing.",
        "",
        "![held-out reward over training](estimators.svg)",
        "",
        "| estimator | before | after | rise in standard errors | minutes |",
        "|---|---:|---:|---:|---:|",
    ]
    for result in results.values():
        first, last = result["evaluations"][0], result["evaluations"][-1]
        rise = (last["reward"] - first["reward"]) / math.hypot(first["stderr"], last["stderr"])
        before, after = (f"{point['reward']:.3f} ± {point['stderr']:.3f}" for point in (first, last))
        lines.append(f"| {result['title']} | {before} | {after} | {rise:.1f} | {result['minutes']:.1f} |")
    return [*lines, ""]


def chain_section() -> list[str]:
    """What benchmarks/chain.py measured."""
    file = DOCS / "chain.json"
    if not file.is_file():
        return []
    chain = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "## The whole chain of RLHF",
        "",
        "    TOGI_SHARED_DATA=FOLDER .venv/bin/python benchmarks/chain.py    # measures again",
        "",
        "examples/scripts/rlhf_chain.sh on oasst: SFT, a reward model from ranked pairs, PPO against it behind `togi serve-rm`,",
        "and iterative DPO and rejection sampling from the same SFT model. Scores are those of this reward model, standardised,",
        f"for sampled answers to {chain['models']['sft']['prompts']} held-out prompts; the gain over SFT is paired by prompt. The",
        "reward model judges its own pupils: the chain optimises what it is told to, whether or not people like it better.",
        "",
        "| model | mean score | gain over SFT | answers cut |",
        "|---|---:|---:|---:|",
    ]
    for name, facts in chain["models"].items():
        gain = f"{facts['gain']:.3f} ± {facts['gain_standard_error']:.3f}"
        lines.append(
            f"| {name} | {facts['mean']:.3f} ± {facts['standard_error']:.3f} | {gain} | {facts['cut_share']:.0%} |"
        )
    facts = chain["facts"]
    kl = ", ".join(f"{value:.4f}" for value in facts["ppo_kl"])
    (sft_before, sft_after), (rm_before, rm_after) = facts["sft_loss"], facts["rm_accuracy"]
    return [
        *lines,
        "",
        f"SFT's held-out loss went from {sft_before:.3f} to {sft_after:.3f}, the reward model's held-out accuracy from",
        f"{rm_before:.3f} to {rm_after:.3f}. PPO's KL to the SFT model, in nats a token, rollout by rollout: {kl}.",
        "A first run, with two outputs a prompt, had 0.06 ± 0.09 for PPO (six rollouts at 1e-5) and 0.09 ± 0.06 for rejection",
        "sampling (1e-5). Their learning rates and PPO's rollouts were raised after it; nothing was chosen by these figures.",
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
