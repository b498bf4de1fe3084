"""``togi kd`` against plain Transformers in float64: on the data, on plain text, with an adapter, and on what it generates."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import warm
from tests.offline_world import flags, make_world, train, values, write
from tests.tiny import STOP
from togi.cli.main import main
from togi.run import offline_setup
from togi.run.offline_setup import Student
from togi.sample import Sample

pytestmark = pytest.mark.busy

OWN = ("--rollout_engine", "transformers", "--generate_max_len", "12", "--kd_divergence", "reverse")
LORA = ("--lora_rank", "4", "--target_modules", "q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    write(folder / "texts.jsonl", [{"text": f"the text number {i} is {'so ' * (i % 4)}long"} for i in range(9)])
    return folder


class Pair:
    """Student and teacher in float64, with Transformers' own attention, one sequence at a time."""

    def __init__(self, student: Path, teacher: Path) -> None:
        models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (student, teacher)]
        self.models = [model.eval() for model in models]

    def tokens(self, ids: Sequence[int], start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token from ``start`` on: its negative log-prob, KL(teacher || student) and KL(student || teacher)."""
        with torch.no_grad():
            own, theirs = (m(torch.tensor([list(ids)])).logits[0, start - 1 : -1].log_softmax(-1) for m in self.models)
        entropy = -own.gather(1, torch.tensor(list(ids[start:]))[:, None])[:, 0]
        forward, reverse = (theirs.exp() * (theirs - own)).sum(-1), (own.exp() * (own - theirs)).sum(-1)
        return entropy, forward, reverse


def means(pair: Pair, rows: Sequence[tuple[Sequence[int], int]]) -> tuple[float, float, float]:
    """Over all tokens of all rows: cross-entropy, forward and reverse KL."""
    parts = zip(*(pair.tokens(ids, start) for ids, start in rows), strict=True)
    entropy, forward, reverse = (float(torch.cat(part).mean()) for part in parts)
    return entropy, forward, reverse


def held_out(world: Path) -> list[tuple[list[int], int]]:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    rows = []
    for line in (world / "sft_eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"User: {row['q']}\nAssistant: ")["input_ids"]
        rows.append((prompt + tokenizer(row["a"])["input_ids"] + [STOP], len(prompt)))
    return rows


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_both_terms_are_about_the_tokens_of_the_answer(world: Path, tmp_path: Path, kind: str) -> None:
    """Before and after training, over all held-out rows."""
    steps = train(world, "kd", tmp_path / "run", "--kd_divergence", kind, "--learning_rate", "3e-4")
    for folder, step in ((world / "model", steps[0]), (tmp_path / "run" / "model", steps[-1])):
        entropy, forward, reverse = means(Pair(folder, world / "teacher"), held_out(world))
        distance = forward if kind == "forward" else reverse
        assert step["eval/cross_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert step["eval/kl/teacher"] == pytest.approx(distance, rel=1e-5)
        assert step["eval/loss"] == pytest.approx(0.6 * entropy + 0.4 * distance, rel=1e-5)


def test_plain_text_is_learned_from_its_second_token_on(world: Path, tmp_path: Path) -> None:
    """--pretrain_mode: no template, no end token, and the first token has no prediction."""
    texts = ("--dataset", str(world / "texts.jsonl"), "--input_key", "text", "--pretrain_mode")
    steps = train(world, "kd", tmp_path / "run", *texts, "--train_batch_size", "9", evaluate=False)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    lines = [json.loads(line)["text"] for line in (world / "texts.jsonl").read_text().splitlines()]
    rows = [(tokenizer(text)["input_ids"], 1) for text in lines]
    entropy, forward, _ = means(Pair(world / "model", world / "teacher"), rows)
    assert steps[0]["cross_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert steps[0]["kl/teacher"] == pytest.approx(forward, rel=1e-5)


def test_the_last_message_of_a_chat_is_its_response(world: Path, tmp_path: Path) -> None:
    """Where --output_key names the field of --input_key: the same run as on prompts and responses of their own."""
    rows = [json.loads(line) for line in (world / "sft.jsonl").read_text().splitlines()]
    said = [[{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}] for row in rows]
    write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in said])
    words = ("--apply_chat_template", "--on_policy_share", "0.5", *OWN)
    parted = train(world, "kd", tmp_path / "parted", *words, evaluate=False)
    chats = ("--dataset", str(tmp_path / "chats.jsonl"), "--input_key", "messages", "--output_key", "messages")
    whole = train(world, "kd", tmp_path / "whole", *words, *chats, evaluate=False)
    for name in ("loss", "cross_entropy", "kl/teacher_generated", "length/response"):
        assert [step[name] for step in whole] == [step[name] for step in parted], name


def test_an_adapter_as_the_student(world: Path, tmp_path: Path) -> None:
    """Merged by ``togi merge-lora``, it has the distance from the teacher that the last evaluation says."""
    steps = train(world, "kd", tmp_path / "run", *LORA, "--learning_rate", "1e-2", "--kd_coef", "1")
    merged = tmp_path / "merged"
    assert main(["merge-lora", "--lora_path", str(tmp_path / "run" / "model"), "--output_path", str(merged)]) == 0
    _, forward, _ = means(Pair(merged, world / "teacher"), held_out(world))
    assert steps[-1]["eval/kl/teacher"] == pytest.approx(forward, rel=1e-4)
    assert steps[-1]["eval/kl/teacher"] < steps[0]["eval/kl/teacher"]


# ---- on its own responses


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Sample]]]:
    """The samples of every step, after the student has answered."""
    seen: list[list[Sample]] = []
    answer = Student.answer

    def note(self: Student, samples: Sequence[Sample], step: int) -> tuple[list[Sample], dict[str, float]]:
        result = answer(self, samples, step)
        seen.append(result[0])
        return result

    monkeypatch.setattr(Student, "answer", note)
    yield seen


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_loss_is_the_divergence_on_the_engines_tokens(
    world: Path, tmp_path: Path, answers: list[list[Sample]], share: float
) -> None:
    """The first step, whose student is the model of the folder: the plain formula of both kinds of rows."""
    (step, *_) = train(world, "kd", tmp_path / "run", *OWN, "--on_policy_share", str(share), evaluate=False)
    (samples, *_), pair = answers, Pair(world / "model", world / "teacher")
    own = [sample for sample in samples if sample.values["generated"] == 1]
    assert len(own) == 4 * share
    losses, generated = [], []
    for sample in samples:
        entropy, _, reverse = pair.tokens(sample.tokens.tolist(), sample.prompt_length)
        losses.append(reverse if sample in own else 0.6 * entropy + 0.4 * reverse)
        generated += [reverse] if sample in own else []
    assert step["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert step["kl/teacher_generated"] == pytest.approx(float(torch.cat(generated).mean()), rel=1e-5)
    responses = [sample.tokens[sample.prompt_length :].tolist() for sample in own]
    cut = [len(response) == 12 and response[-1] != STOP for response in responses]
    assert all(STOP not in response[:-1] for response in responses)
    assert all(was_cut or response[-1] == STOP for was_cut, response in zip(cut, responses, strict=True))
    assert step["length/response"] == np.mean([len(response) for response in responses])
    assert step["length/truncated_share"] == np.mean(cut)
    assert step["mismatch/probe_mean_abs"] < 1e-4
    assert ("cross_entropy" in step) == (share < 1)


def test_the_student_comes_nearer_to_the_teacher_on_held_out_prompts(world: Path, tmp_path: Path) -> None:
    steps = train(world, "kd", tmp_path / "run", *OWN, "--on_policy_share", "1", "--max_epochs", "3")
    assert steps[-1]["eval/kl/teacher"] < 0.9 * steps[0]["eval/kl/teacher"]
    assert steps[-1]["kl/teacher_generated"] < steps[1]["kl/teacher_generated"]


def test_the_engine_follows_an_adapter(world: Path, tmp_path: Path) -> None:
    """The probe after every step compares the merged copy in the engine with the adapter in training."""
    steps = train(world, "kd", tmp_path / "run", *OWN, "--on_policy_share", "0.5", *LORA, "--learning_rate", "1e-2")
    assert all(step["mismatch/probe_mean_abs"] < 1e-4 for step in steps[1:])
    assert steps[-1]["eval/loss"] < steps[0]["eval/loss"]


def test_a_resumed_run_generates_the_same(world: Path, tmp_path: Path) -> None:
    """Bit for bit: responses, losses and the final weights."""
    words = (*OWN, "--on_policy_share", "0.5", "--save_steps", "1", "--max_ckpt_num", "9")
    whole = train(world, "kd", tmp_path / "whole", *words, evaluate=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step_{step:08d}")
    part = train(world, "kd", tmp_path / "part", *words, "--load_checkpoint", evaluate=False)
    for name in ("loss", "kl/teacher_generated", "length/response"):
        assert [step[name] for step in part] == [step[name] for step in whole], name
    ends = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert ends[0] == ends[1]


def test_an_engine_with_other_weights_is_not_learned_from(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = offline_setup.whole_tensors

    def spoiled(*args: object) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, tensor.flip(0)) for name, tensor in whole(*args))

    monkeypatch.setattr(offline_setup, "whole_tensors", spoiled)
    assert main(["kd", *flags(world, "kd", tmp_path / "run", *OWN, "--on_policy_share", "1", evaluate=False)]) != 0
    assert "engine and trainer disagree" in " ".join(capsys.readouterr().err.split())
    assert values(tmp_path / "run") == []


@pytest.mark.large
def test_vllm_generates_too(world: Path, tmp_path: Path) -> None:
    """In a process of its own, which vLLM changes: its seeds, its threads."""
    words = ("--on_policy_share", "1", "--generate_max_len", "12", "--vllm_cpu_kv_cache_gb", "0.1")
    command = [sys.executable, "-m", "togi.cli.train_kd", *flags(world, "kd", tmp_path / "run", *words, evaluate=False)]
    done = warm.run(command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    steps = values(tmp_path / "run")
    assert len(steps) == 4
    assert all(step["mismatch/probe_mean_abs"] < 1e-3 for step in steps)
    assert steps[-1]["kl/teacher_generated"] < steps[0]["kl/teacher_generated"]
