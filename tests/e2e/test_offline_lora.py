"""LoRA and QLoRA in the supervised and preference commands, end to end: learn, save, merge, load in plain Transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.offline_world import DATA, flags, make_world, train
from togi.cli.main import main

LORA = ("--lora_rank", "4", "--lora_alpha", "8", "--learning_rate", "3e-3")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("bits", [(), ("--load_in_4bit",)], ids=["lora", "qlora"])
@pytest.mark.parametrize("command", DATA)
def test_an_adapter_learns_and_merges(world: Path, tmp_path: Path, command: str, bits: tuple[str, ...]) -> None:
    """PEFT over the base and the merged model give equal outputs; the base's files are as before."""
    before = (world / "model" / "model.safetensors").read_bytes()
    run, merged = tmp_path / "run", tmp_path / "merged"
    steps = train(world, command, run, "--max_epochs", "3", *LORA, *bits)
    assert steps[-1]["eval/loss"] < steps[0]["eval/loss"]
    assert (world / "model" / "model.safetensors").read_bytes() == before
    scalar = ["--is_rm"] if command == "rm" else []
    words = ["merge-lora", "--lora_path", str(run / "model"), "--output_path", str(merged), *scalar]
    assert main(words) == 0
    kind = AutoModelForSequenceClassification if command == "rm" else AutoModelForCausalLM
    more = {"num_labels": 1} if command == "rm" else {}
    with_peft = PeftModel.from_pretrained(kind.from_pretrained(world / "model", **more), run / "model").eval()
    plain = kind.from_pretrained(merged).eval()
    inputs = AutoTokenizer.from_pretrained(merged)("abc def", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, with_peft(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_refused_as_a_base(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(world, "sft", run, *LORA)
    words = flags(world, "sft", tmp_path / "next")
    words[words.index("--pretrain") + 1] = str(run / "model")
    assert main(["sft", *words]) == 2
    assert "is a LoRA adapter, not a model: merge it into its base with togi merge-lora" in capsys.readouterr().err
