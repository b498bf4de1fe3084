"""Togi's side: the command of a case with the defaults of the program, and its steps from ``metrics.jsonl``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from comparison.cases import Case, Kind
from comparison.material import SEED, Material
from comparison.places import ROOT
from comparison.summary import Steps, Work
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.data.prompts import PromptLoader, PromptSpec, load_prompts
from togi.obs import names
from togi.obs.metrics import read_records
from togi.obs.rollout_store import RolloutStore, Split
from togi.obs.run_dir import Resolved, RunDirectory
from togi.plan.machine import cache_folder
from togi.sample import FinishReason, Outcome

TOKENS_PER_PACK = 4096
KL = 0.04
RL_REWARD = ROOT / "benchmarks" / "peers" / "letters.py"
ROWS = {
    Kind.SFT: "--input_key prompt --output_key completion --input_template {}",
    Kind.DPO: "--prompt_key prompt --input_template {} --beta 0.1",
    Kind.RM: "--prompt_key prompt --input_template {}",
}


def command(case: Case, model: Path, material: Material, folder: Path, processes: int, precision: str) -> list[str]:
    """The words of the command; everything that is not named is a default."""
    common = (
        f"--pretrain {model} --max_tokens_per_gpu {TOKENS_PER_PACK} --lr_scheduler constant --lr_warmup_ratio 0 "
        f"--seed {SEED} --run_dir {folder / 'run'} --save_path {folder / 'model'} --ckpt_path {folder / 'checkpoints'}"
    ).split() + (["--bf16"] if precision == "bf16" else [])
    if case.kind in ROWS:
        launcher = torchrun(processes) if processes > 1 else []
        flags = f"{ROWS[case.kind]} --dataset {material.togi} --max_len 4096 --max_epochs 1".split()
        sizes = f"--train_batch_size {case.rows} --learning_rate {case.learning_rate}".split()
        return [sys.executable, *launcher, "-m", f"togi.cli.train_{case.kind}", *common, *flags, *sizes]
    longest = int(case.prompt.mean)
    flags = (
        f"--prompt_data {material.togi} --input_key prompt --prompt_max_len {longest} --generate_max_len "
        f"{int(case.answer.mean)} --advantage_estimator {'gae' if case.critic else 'group_norm'} "
        f"--init_kl_coef {KL} --use_kl_loss --kl_estimator k3 "
        f"--n_samples_per_prompt {case.answers} --rollout_batch_size {case.rows} --train_batch_size {case.items} "
        f"--actor_learning_rate {case.learning_rate} --actor_num_gpus_per_node {processes} --ref_num_gpus_per_node {processes}"
    ).split()
    if case.critic:
        flags += ["--critic_learning_rate", str(case.learning_rate)]
    source = ["--reward_func", str(RL_REWARD), "--rollout_engine", "transformers", "--colocate_all_models"]
    if case.kind is Kind.REPLAYED:
        settings = parse(RLConfig, [*common, *flags], "rl").config.model_dump(mode="json")
        stored = store_rollouts(case, model, material, folder / "stored", settings)
        source = ["--replay", str(stored), "--colocate_actor_ref"]
    return [sys.executable, "-m", "togi", "rl", *common, *flags, *source]


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def store_rollouts(case: Case, model: Path, material: Material, folder: Path, settings: dict[str, object]) -> Path:
    """The folder of a run with ``settings`` that made these responses, as ``--replay`` reads it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    spec = PromptSpec(str(material.togi), input_key="prompt", seed=SEED)
    loader = PromptLoader(load_prompts(spec, tokenizer), seed=SEED, episodes=1)
    resolved = {name: Resolved(value, "benchmark") for name, value in settings.items()}
    run = RunDirectory.create(folder, "rl", [], resolved)
    by_text = {record["prompt"]: record for record in material.records}
    for step in range(1, case.steps + 1):
        rows = []
        for prompt in loader.take(case.rows):
            record = by_text[prompt.text]
            for place, (answer, reward) in enumerate(zip(record["answers"], record["rewards"], strict=True)):
                tokens = (*tokenizer(answer)["input_ids"], tokenizer.eos_token_id)
                rows.append(
                    {
                        "group_id": f"step{step}/{prompt.id}",
                        "prompt_id": prompt.id,
                        "sample_index": place,
                        "datasource": prompt.datasource,
                        "prompt_text": prompt.text,
                        "response_text": answer,
                        "label": '""',
                        "prompt_tokens": prompt.tokens,
                        "response_tokens": tokens,
                        "response_mask": (True,) * len(tokens),
                        "rollout_logprobs": (-1.0,) * len(tokens),
                        "trainer_logprobs": (),
                        "ref_logprobs": (),
                        "advantages": (),
                        "reward": reward,
                        "components": {},
                        "outcome": Outcome.SCORE,
                        "finish_reason": FinishReason.STOP,
                        "policy_version": step - 1,
                        "versions": (step - 1,) * len(tokens),
                        "filtered": False,
                    }
                )
        RolloutStore(run.rollouts.folder).write(step, Split.TRAIN, rows)
    return folder


def steps_of(case: Case, material: Material, folder: Path, started: float) -> Steps:
    """A record is written at the end of its step, with the time of day."""
    run = RunDirectory(folder / "run")
    records = [record for record in read_records(run.metrics_path) if record.step > 0]
    is_rl = case.kind in (Kind.REPLAYED, Kind.GENERATED)
    loss, norm = (names.POLICY_TOTAL_LOSS, names.POLICY_GRAD_NORM) if is_rl else (names.LOSS, names.GRAD_NORM)
    work = generated_work(run.rollouts, case.steps) if case.kind is Kind.GENERATED else material.work
    return Steps(
        ends=tuple(record.time for record in records),
        launch=records[0].time - started,
        losses=tuple(record.values[loss] for record in records),
        grad_norms=tuple(record.values[norm] for record in records),
        work=tuple(work),
    )


def generated_work(store: RolloutStore, steps: int) -> list[Work]:
    """From the responses that the run made."""
    return [
        work_of([len(row["prompt_tokens"]) + len(row["response_tokens"]) for row in store.read_step(step + 1)])
        for step in range(steps)
    ]


def work_of(lengths: Sequence[int]) -> Work:
    return Work(sum(lengths), sum(length**2 for length in lengths))


def environment(threads: int, cache: Path) -> dict[str, str]:
    """Of either side: no network, so many threads a process, an empty cache of tokenised rows, and this checkout.

    The C kernels are those of the user's cache: a machine compiles them once.
    """
    name = f"kernels-{os.getuid()}"
    (kernels := cache_folder() / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    cache.mkdir()
    (cache / name).symlink_to(kernels.absolute())
    fixed = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | fixed | {"OMP_NUM_THREADS": str(threads), "TOGI_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
