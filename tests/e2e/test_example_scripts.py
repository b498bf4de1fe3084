"""Example scripts on fixed data with a tiny model. What torchrun starts is compared with one process without the feature.

A script of one process is run for its command, which then runs here: the words are the script's, only the start-up is saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.example_scripts import SCRIPTS, commands, run_script
from tests.learn_tools import max_difference
from tests.offline_world import ROOT, values
from tests.tiny import save_tiny_model
from togi.cli.main import main

TINY = "--no_bf16 --max_samples 6 --train_batch_size 4 --max_len 128 --max_tokens_per_gpu 1024 --max_epochs 1"
# Scripts of several processes, with the model, and what turns the feature off without changing a number.
LAUNCHED = {
    "dpo_ring.sh": ("model", "--ring_attn_size 1"),
    "dpo_34b.sh": ("model", "--zero_stage 0 --no_adam_offload --no_ref_offload --no_gradient_checkpointing"),
    "sft_mixtral_lora.sh": ("mixtral", "--zero_stage 0 --no_gradient_checkpointing"),
    "sft_tensor_parallel.sh": ("model", "--ds_tensor_parallel_size 1"),
    "sft_deepspeed.sh": ("model", "--backend fsdp2 --zero_stage 0 --no_adam_offload"),
}
# All that are run here.
EXAMPLES = {
    *LAUNCHED,
    "dpo_compiled.sh",
    "dpo_precomputed.sh",
    "continued_pretraining.sh",
    "sft_resumable.sh",
    "sft_tools.sh",
    "chat.sh",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model", num_attention_heads=4, num_key_value_heads=2)
    save_tiny_model(folder / "mixtral", "mixtral", seed=2)
    return folder


def here(script: str, folder: Path, model: Path, *flags: str, run: Path) -> list[dict[str, float]]:
    """The script's only command in this process, with ``run`` as its OUT; the values of each step."""
    torch.set_num_threads(1)
    (command,) = commands(SCRIPTS / script, folder, *TINY.split(), *flags, MODEL=model, OUT=run, PROCESSES=2, PARTS=2)
    assert main([command.name, *command.flags]) == 0
    return values(run)


def launched(script: str, model: Path, run: Path) -> list[dict[str, float]]:
    """The script as users start it, in two processes."""
    names = {"MODEL": model, "OUT": run, "PROCESSES": 2, "PARTS": 2}
    run_script(script, *TINY.split(), **names, OMP_NUM_THREADS=1)
    return values(run)


def assert_equal(ours: list[dict[str, float]], theirs: list[dict[str, float]], names: Iterable[str]) -> None:
    assert len(ours) == len(theirs) > 1
    for name in names:
        found = [[step[name] for step in steps if name in step] for steps in (ours, theirs)]
        assert found[0] and found[0] == pytest.approx(found[1], rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize("script", LAUNCHED)
def test_two_processes_with_the_feature_equal_one_without(world: Path, tmp_path: Path, script: str) -> None:
    name, off = LAUNCHED[script]
    two = launched(script, world / name, tmp_path / "two")
    one = here(script, tmp_path / "words", world / name, *off.split(), run=tmp_path / "one")
    assert_equal(two, one, ("loss", "eval/loss", "grad_norm", "tokens/seen"))
    if script == "sft_mixtral_lora.sh":
        assert_equal(two, one, ("aux_loss",))
        assert (tmp_path / "two" / "model" / "adapter_model.safetensors").is_file()
        return
    models = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "one"))
    assert max_difference(*models) < 1e-5


def test_a_precomputed_reference_changes_nothing(world: Path, tmp_path: Path) -> None:
    before = here("dpo_precomputed.sh", tmp_path / "a", world / "model", run=tmp_path / "before")
    during = here("dpo.sh", tmp_path / "b", world / "model", run=tmp_path / "during")
    assert_equal(before, during, ("loss", "eval/loss", "reward/margin"))


def test_compiled_layers_that_partly_recompute_change_nothing(world: Path, tmp_path: Path) -> None:
    """A budget of 100 tokens, below the tokens of each pack, so that some layers recompute and others do not."""
    torch.compiler.reset()
    off = ("--no_torch_compile", "--no_gradient_checkpointing", "--gradient_checkpointing_above", "0")
    budget = ("--gradient_checkpointing_above", "100")
    with_it = here("dpo_compiled.sh", tmp_path / "a", world / "model", *budget, run=tmp_path / "with")
    without = here("dpo_compiled.sh", tmp_path / "b", world / "model", *off, run=tmp_path / "without")
    assert_equal(with_it, without, ("loss", "eval/loss", "grad_norm", "reward/margin"))
    assert with_it[1]["compile/seconds"] > 0 and with_it[1]["tokens/step"] > 100
    assert "compile/seconds" not in without[1]


def test_continued_pre_training_learns_every_token_of_plain_text(world: Path, tmp_path: Path) -> None:
    """The held-out loss before training, by plain Transformers: all tokens but the first, no template, no end token."""
    steps = here("continued_pretraining.sh", tmp_path / "words", world / "model", run=tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    losses = []
    for line in (ROOT / "examples" / "data" / "text" / "test.jsonl").read_text().splitlines():
        ids = torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"])
        with torch.no_grad():
            table = model(ids[None]).logits[0, :-1].log_softmax(-1)
        losses.append(-table.gather(1, ids[1:, None]).squeeze(1))
    assert steps[0]["eval/loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def test_a_long_run_goes_on_and_keeps_its_best_model(world: Path, tmp_path: Path) -> None:
    """Four steps; all that came after the checkpoint of step 2 is lost, and the same command makes it again."""
    run, flags = tmp_path / "run", ("--train_batch_size", "2", "--max_samples", "8", "--lr_decay_ratio", "0.5")
    whole = here("sft_resumable.sh", tmp_path / "words", world / "model", *flags, run=run)
    assert [i for i, step in enumerate(whole) if "eval/loss" in step] == [0, 2, 4]
    assert [step["lr"] for step in whole[1:]] == pytest.approx([0, 2e-5, 2e-5, 1e-5])  # it falls in the last two
    best = json.loads((run / "checkpoints" / "best" / "best.json").read_text())
    assert best["value"] == min(step["eval/loss"] for step in whole if "eval/loss" in step)
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    shutil.rmtree(run / "model")
    again = here("sft_resumable.sh", tmp_path / "words", world / "model", *flags, run=run)
    assert [step["loss"] for step in again[1:]] == [step["loss"] for step in whole[1:]]
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_a_conversation(world: Path) -> None:
    done = run_script(
        "chat.sh",
        *("--no_bf16", "--max_len", "4", "--greedy_sampling"),
        stdin="hello\nclear\nhello\nexit\n",
        MODEL=world / "model",
        OMP_NUM_THREADS=1,
    )
    first, again, end = done.stdout.split("\n> ")[1:]
    assert first and again == f"> {first}" and end == "", "a cleared conversation starts anew"


def test_rows_in_every_form_become_the_same_conversation(world: Path, tmp_path: Path) -> None:
    """The same four turns in three forms: the call and the last answer are learned, and what was read otherwise is counted."""
    run = tmp_path / "run"
    here("sft_tools.sh", tmp_path / "words", world / "model", "--max_len", "512", run=run)
    report = json.loads((run / "data" / "train.json").read_text())
    sums = [(431, 254), (504, 766), (149, 174)]
    for example, (a, b) in zip(report["examples"], sums, strict=True):
        call = json.dumps({"name": "add", "arguments": {"a": a, "b": b}})
        assert example.endswith(
            f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n⟦<call>{call}</call><|im_end|>⟧\n"
            f"<|im_start|>tool\n{a + b}<|im_end|>\n<|im_start|>assistant\n⟦{a} + {b} = {a + b}.<|im_end|>⟧"
        )
        assert example.startswith('<|im_start|>system\nTools: [{"name": "add", "description": "Add two numbers."')
    said = [warning.partition(" of 6 rows ")[::2] for warning in report["warnings"] if " of 6 rows " in warning]
    # Two rows of each form; ShareGPT's tools and the third form's messages are text.
    assert [(count, text.split()[:2]) for count, text in said] == [
        ("2", ["have", "from"]),
        ("4", ["call", "a"]),
        ("4", ["hold", "messages"]),
        ("2", ["have", "content"]),
    ]
