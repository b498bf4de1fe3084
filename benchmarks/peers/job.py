"""What a peer's script reads and writes. Runs in the peers' virtual environment: nothing of Togi is imported here."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

IGNORED = -100


@dataclass(frozen=True)
class Job:
    """``batch``: sequences (pairs) of one forward. ``items``: of one optimizer step, in the same unit, over all processes."""

    kind: str
    model: str
    data: str
    out: str
    folder: str
    batch: int
    items: int
    steps: int
    learning_rate: float
    seed: int
    kl: float
    answers: int
    answer_tokens: int
    processes: int
    precision: str
    options: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Job:
        """From the file that the command line names."""
        return cls(**json.loads(Path(sys.argv[1]).read_text()))

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self.data).read_text().splitlines()]

    @property
    def pure_bf16(self) -> bool:
        """bfloat16 weights and no float32 masters."""
        return self.options.get("pure_bf16", False)

    def arguments(self) -> dict[str, Any]:
        """What Togi's side is told too, in the words of Transformers' TrainingArguments."""
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.items // (self.batch * self.processes),
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "bf16": self.precision == "bf16" and not self.pure_bf16,
            "gradient_checkpointing": False,
            "torch_compile": self.options.get("compile", False),
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": self.seed,
            **({"ddp_backend": "gloo"} if self.processes > 1 else {}),
        }

    @property
    def dtype(self) -> torch.dtype:
        """Of the trained weights in memory. In float32 they are cast by autocast, once a forward."""
        return torch.bfloat16 if self.pure_bf16 else torch.float32


@dataclass
class Recorder(TrainerCallback):
    """Ends of steps on the clock that never jumps, the time of day at the first one, losses and norms of gradients.

    ``cpu_ends``: seconds of all threads of this process, which tell more than the clock on a machine that is not idle.
    ``lengths``: of all sequences of each step, where the peer makes them itself.
    """

    ends: list[float] = field(default_factory=list)
    cpu_ends: list[float] = field(default_factory=list)
    first_end: float = 0.0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())
        if len(self.ends) == 1:
            self.first_end = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.grad_norms.append(float(logs["grad_norm"]))

    def write(self, out: str) -> None:
        Path(out).write_text(json.dumps(asdict(self)))


def example(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Tokens, and as labels those of the answer with its EOS token."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    tokens = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [IGNORED] * len(prompt) + tokens[len(prompt) :],
    }
