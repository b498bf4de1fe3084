"""Models that do not fit their tokenizer, their lengths or their dropout, in every command: refused at the start, or harmless."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.offline_world import answer, flags, make_world, pair, steps, values, verdict, write
from tests.rl_world import GRPO, HF, metrics, train
from tests.tiny import VOCAB, save_tiny_model, tiny_model, tiny_tokenizer
from togi.cli.main import main
from togi.config.tools import ServeRMConfig
from togi.data.chat import check_tokens, check_vocabulary
from togi.errors import ModelError
from togi.reward.wire import Complaint
from togi.run.serve_rm import ServedModel

DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
ADDED = "<42>"  # with 260 tokens before <0>
REFUSED = (
    f"The tokenizer has 303 tokens and the embedding of {{}} has {VOCAB} rows, none for '<42>' (302): use the tokenizer that the "
    "model was made with, or enlarge the embedding (model.resize_token_embeddings(303) in Transformers) and save the model."
)
KINDS = {"sft": answer, "kd": answer, "rm": pair, "dpo": pair, "kto": verdict, "prm": steps}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` and ``teacher`` as ever, ``small`` whose tokenizer is larger than itself, and ``gpt2`` with dropout."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    save_tiny_model(folder / "gpt2", "gpt2", **DROPOUT)
    save_tiny_model(folder / "small")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(43)], special_tokens=True)
    tokenizer.save_pretrained(folder / "small")
    save_tiny_model(folder / "short", "gpt2", max_position_embeddings=64)
    for command, row in KINDS.items():
        rows = [{key: _with_token(value) for key, value in row(i).items()} for i in range(8)]
        write(folder / f"{command}_added.jsonl", rows)
    write(folder / "prompts.jsonl", [{"prompt": f"write number {i}", "letter": "e"} for i in range(8)])
    (folder / "reward.py").write_text(
        "def reward_func(queries, prompts, labels):\n    return [sum(map(ord, query)) % 7 for query in queries]\n"
    )
    return folder


def _with_token(value: object) -> object:
    return f"{ADDED} {value}" if isinstance(value, str) else value


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1].removeprefix("togi: ")


@pytest.mark.parametrize("command", KINDS)
def test_rows_with_a_token_that_the_model_does_not_know(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = ["--pretrain", str(world / "small"), "--dataset", str(world / f"{command}_added.jsonl")]
    assert main([command, *flags(world, command, tmp_path / "run", *more, evaluate=False)]) == 2
    assert last_line(capsys) == REFUSED.format(world / "small")
    assert not (tmp_path / "run").exists()


def test_rows_without_such_a_token_are_trained_on(world: Path, tmp_path: Path) -> None:
    """Published models have tokenizers with tokens that no text becomes; the last id of an embedding is no fault either."""
    more = ["--pretrain", str(world / "small"), "--save_path", str(tmp_path / "model")]
    assert main(["sft", *flags(world, "sft", tmp_path / "run", *more)]) == 0
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(43)], special_tokens=True)
    check_tokens(tokenizer, "m", VOCAB, lambda: VOCAB - 1)
    check_tokens(tiny_tokenizer(), "m", 260, lambda: pytest.fail("there is nothing to look for"))
    with pytest.raises(ModelError):
        check_tokens(tokenizer, "m", VOCAB, lambda: VOCAB)


def test_tokens_of_the_template_and_of_ends_are_found_at_once() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(43)], special_tokens=True)
    check_vocabulary(tokenizer, "m", VOCAB, apply_chat_template=True)
    tokenizer.chat_template = ADDED + str(tokenizer.chat_template)
    check_vocabulary(tokenizer, "m", VOCAB, apply_chat_template=False)
    for change, templated in ((lambda: None, True), (lambda: setattr(tokenizer, "eos_token", ADDED), False)):
        change()
        with pytest.raises(ModelError) as error:
            check_vocabulary(tokenizer, "m", VOCAB, apply_chat_template=templated)
        assert str(error.value) == REFUSED.format("m")


@pytest.mark.parametrize(
    "words",
    ["generate --prompt_max_len 64 --max_new_tokens 8", "rm --output_key a --max_len 96"],
    ids=["generate", "rm"],
)
def test_a_file_of_prompts_or_outputs(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    data = ["--dataset", str(world / "sft_added.jsonl"), "--input_key", "q"]
    paths = ["--pretrain", str(world / "small"), "--output_path", str(tmp_path / "out.jsonl")]
    assert main(["infer", *paths, *data, "--eval_task", *words.split()]) == 2
    assert last_line(capsys) == REFUSED.format(world / "small")


def test_a_conversation(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = iter([f"hello {ADDED}", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", "--pretrain", str(world / "small"), "--max_len", "4"]) == 0
    assert last_line(capsys) == REFUSED.format(world / "small")


def test_a_served_reward_model(tmp_path: Path) -> None:
    """Queries are the clients': each is refused by itself."""
    from transformers import AutoModelForSequenceClassification

    tiny_model("gpt2", max_position_embeddings=16).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(43)], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    served = ServedModel(ServeRMConfig(reward_pretrain=str(tmp_path)))
    assert served.tokens_of(["ab"]) == [tiny_tokenizer()("ab")["input_ids"]]
    for query, told in (
        (f"ab{ADDED}", "model cannot read query 1: '<42>' has no row among the 300 of its embedding"),
        ("a" * 17, "model cannot read query 1: it has 17 tokens, and the model 16 positions"),
    ):
        with pytest.raises(Complaint) as refusal:
            served.tokens_of(["ab", query])
        assert refusal.value.what == told


@pytest.mark.parametrize("command", KINDS)
def test_lengths_beyond_learned_positions(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = ["--pretrain", str(world / "short"), "--max_len", "65"]
    assert main([command, *flags(world, command, tmp_path / "run", *more, evaluate=False)]) == 2
    assert last_line(capsys) == f"--max_len 65 is more than the 64 positions of {world / 'short'}: lower it."


def test_dpo_begins_at_ln_2_with_dropout_of_every_kind(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With weights that do not change policy and reference are one model: log-ratios are 0 in every step."""
    more = ["--pretrain", str(world / "gpt2"), "--learning_rate", "0"]
    assert main(["dpo", *flags(world, "dpo", tmp_path / "run", *more)]) == 0
    losses = [
        step["preference/loss"] if "preference/loss" in step else step["loss"] for step in values(tmp_path / "run")[1:]
    ]
    assert losses == pytest.approx([math.log(2)] * 4, abs=1e-6)
    told = "attn_pdrop 0.1, embd_pdrop 0.1, resid_pdrop 0.1 in its config.json, 0 in that of the trained model"
    assert f"{world / 'gpt2'}: dropout is off in training ({told})" in caplog.messages
    written = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert {key: written[key] for key in DROPOUT} == dict.fromkeys(DROPOUT, 0.0)


def test_rl_ratios_are_1_with_dropout_of_every_kind(world: Path, tmp_path: Path) -> None:
    """Two optimizer steps a rollout at rate 0: old log-probs come from a pass of their own, and the ratios are exactly 1."""
    more = ["--pretrain", str(world / "gpt2"), "--actor_learning_rate", "0", "--train_batch_size", "8"]
    train(world, tmp_path / "run", *GRPO, *HF, *more)
    for record in metrics(tmp_path / "run"):
        assert record["values"]["policy/ratio_max"] == 1.0
        assert record["values"]["policy/ppo_kl"] == 0.0


def test_rl_sends_adapters_of_conv1d_layers(world: Path, tmp_path: Path) -> None:
    """The engine's model is the trainer's after each update that it makes of A and B."""
    more = [
        "--pretrain",
        str(world / "gpt2"),
        "--actor_learning_rate",
        "1e-2",
        "--lora_rank",
        "4",
        "--lora_alpha",
        "32",
    ]
    train(world, tmp_path / "run", *GRPO, *HF, *more)
    records = [record["values"] for record in metrics(tmp_path / "run")]
    assert len(records) == 2
    assert all(values["policy/grad_norm"] > 0 and values["mismatch/probe_mean_abs"] < 1e-5 for values in records)


def test_an_adapter_of_another_rank(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["sft", *flags(world, "sft", tmp_path / "run", "--save_steps", "2", evaluate=False)]
    assert main([*run, "--lora_rank", "4"]) == 0
    folder = tmp_path / "run" / "checkpoints" / "step_00000004"
    for words, rank in ((["--lora_rank", "8"], 8), ([], 0)):
        capsys.readouterr()
        assert main([*run, *words, "--load_checkpoint"]) == 2
        assert last_line(capsys) == (
            f"The checkpoint {folder} has an adapter of rank 4, but --lora_rank is {rank} here: go on with --lora_rank 4, or "
            "choose another --ckpt_path."
        )


def test_every_linear_layer_of_gpt2_gets_an_adapter(world: Path, tmp_path: Path) -> None:
    """It learns, and the merged model answers like the adapter (which merging proves)."""
    more = ["--pretrain", str(world / "gpt2"), "--lora_rank", "4"]
    assert main(["sft", *flags(world, "sft", tmp_path / "run", *more)]) == 0
    losses = [step["eval/loss"] for step in values(tmp_path / "run") if "eval/loss" in step]
    assert losses[-1] < losses[0]
    merged = tmp_path / "merged"
    assert main(["merge-lora", "--lora_path", str(tmp_path / "run" / "model"), "--output_path", str(merged)]) == 0
    again = ["--pretrain", str(merged), "--learning_rate", "0"]
    assert main(["sft", *flags(world, "sft", tmp_path / "again", *again)]) == 0
    (first, *_) = [step["eval/loss"] for step in values(tmp_path / "again") if "eval/loss" in step]
    assert first == pytest.approx(losses[-1], rel=1e-4)
