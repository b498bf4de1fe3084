"""DeepSpeed (ZeRO-2) under a plain loop on supervised rows: ``deepspeed_loop.py JOB.json``.

Runs in Togi's own environment, which has DeepSpeed (``togi[deepspeed]``), started by torchrun also for one process. Rows are
padded to the longest of a micro-batch and the model's own loss is used; float32 masters, bfloat16 weights where the comparison is
in bfloat16.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from job import IGNORED, Job, Recorder, example


def main() -> None:
    job, recorder = Job.read(), Recorder()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = [example(row, tokenizer) for row in job.rows()]
    deepspeed.init_distributed("gloo")
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    engine, *_ = deepspeed.initialize(model=model, config=config(job), model_parameters=model.parameters())
    for step in range(job.steps):
        own = rows[step * job.items : (step + 1) * job.items]
        recorder.losses.append(train(engine, own, job, tokenizer.pad_token_id))
        recorder.grad_norms.append(float(engine.get_global_grad_norm()))
        recorder.on_step_end()
    if engine.global_rank == 0:
        recorder.write(job.out)


def config(job: Job) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": job.batch,
        "gradient_accumulation_steps": job.items // (job.batch * job.processes),
        "bf16": {"enabled": job.precision == "bf16"},
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": job.learning_rate, "betas": [0.9, 0.95], "weight_decay": 0.0, "torch_adam": True},
        },
    }


def train(engine: Any, rows: list[dict[str, list[int]]], job: Job, pad: int) -> float:
    """One optimizer step; every micro-batch weighs as many tokens as it has in the loss. Returns the mean loss a token."""
    learned = sum(label != IGNORED for row in rows for label in row["labels"])
    count = job.items // job.batch
    total = torch.zeros(())
    for place in range(engine.global_rank, count, job.processes):
        batch = padded(rows[place * job.batch : (place + 1) * job.batch], pad)
        here = int((batch["labels"] != IGNORED).sum())
        loss = engine(**batch).loss
        # DeepSpeed divides by the number of micro-batches and averages over ranks
        engine.backward(loss * here * count / learned)
        engine.step()
        total += loss.detach().float() * here / learned
    if job.processes > 1:
        torch.distributed.all_reduce(total)
    return float(total)


def padded(rows: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    fillers = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
        for name, filler in fillers.items()
    }


if __name__ == "__main__":
    main()
