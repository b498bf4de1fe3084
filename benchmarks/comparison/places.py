"""What both sides stand on: the models of the comparison and the peers' virtual environment, each made once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison.summary import Size
from togi.plan.machine import cache_folder

ROOT = Path(__file__).parents[2]
CACHE = cache_folder()
SOURCE = CACHE / "smollm2-135m-instruct"
PAD = "<|endoftext|>"
SIZES = "size.json"
# The same torch on both sides; the plain index gives the CPU wheel of this version, others bring gigabytes of CUDA.
PACKAGES = (("torch==2.13.0",), ("trl==1.16.0", "transformers", "accelerate", "peft"))


def peers_python() -> Path:
    """The interpreter of the peers' virtual environment, which is made if it is missing."""
    folder = CACHE / "bench-venv"
    done = folder / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in PACKAGES:
            subprocess.run([folder / "bin" / "pip", "install", *packages], check=True)
        done.touch()
    return folder / "bin" / "python"


def model_folder(name: str, *, scalar: bool) -> Path:
    """A model that both sides load: smollm2 or 30m, with its LM head or (``scalar``) with a seeded scalar head.

    The tokenizer pads with another token than EOS: a peer that looks for the last token before the padding finds EOS then.
    """
    folder = CACHE / "bench-models" / (f"{name}-score" if scalar else name)
    if not (folder / SIZES).exists():
        make_model(name, folder, scalar=scalar)
    return folder


def size_of(folder: Path) -> Size:
    return Size(**json.loads((folder / SIZES).read_text()))


def make_model(name: str, folder: Path, *, scalar: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import LlamaForSequenceClassification as Scalar

    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    tokenizer.pad_token = PAD
    torch.manual_seed(0)
    if name == "30m":
        model = AutoModelForCausalLM.from_config(llama(tokenizer, 384, 1024, 6, (6, 3), 65536))
    else:
        model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    if scalar:
        config = model.config
        config.num_labels = 1
        body, model = model.model, Scalar(config)
        model.model.load_state_dict(body.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = model.config
    width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    # An embedding that is no head too is only looked up.
    looked_up = model.get_input_embeddings().weight.numel() if scalar else 0
    parameters = sum(p.numel() for p in model.parameters()) - looked_up
    size = Size(parameters, config.num_hidden_layers, width)
    (folder / SIZES).write_text(json.dumps(asdict(size)))


def llama(tokenizer: Any, width: int, inner: int, layers: int, heads: tuple[int, int], longest: int) -> Any:
    """The config of a Llama with tied embeddings. ``heads``: of queries, and of keys and values."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
