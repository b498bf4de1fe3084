"""togi chat, fed through standard input as a user types: what it prints is the model's own greedy text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import warm
from tests.tiny import STOP, save_tiny_model, tiny_model, tiny_tokenizer
from togi.cli.main import main
from togi.config.infer import REWARD_TEMPLATE
from togi.data.precheck import with_reward
from togi.errors import ModelError
from togi.model.generate import Answering, stream
from togi.model.loading import keep_layout, nf4
from togi.run.start import ONE_TOKENIZER

ROOT = Path(__file__).parents[2]
BANNER = 'Type a message; "clear" starts anew, "exit" ends.'
NEW_TOKENS = 12
PRINTABLE = 94  # the tokenizer's first ids are the printable ASCII bytes


def ascii_model() -> PreTrainedModel:
    """A random model that prefers printable bytes, whose text survives a terminal; with this seed it also stops."""
    model = tiny_model("llama", seed=4).eval()
    with torch.no_grad():
        model.lm_head.weight[PRINTABLE:256] = 0
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_model(tmp_path_factory.mktemp("model"))
    ascii_model().save_pretrained(path)
    return path


def greedy(model: PreTrainedModel, *turns: str) -> str:
    """The model's next answer after user and assistant ``turns``, by Transformers' own generate."""
    tokenizer = tiny_tokenizer()
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=STOP,
        pad_token_id=STOP,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def chat(folder: Path, typed: str, *flags: str) -> subprocess.CompletedProcess[str]:
    words = ["-m", "togi", "chat", "--pretrain", str(folder), "--temperature", "0", "--max_len", str(NEW_TOKENS)]
    return warm.run([sys.executable, *words, *flags], input=typed)


def test_answers_history_clear_and_exit(folder: Path) -> None:
    model = ascii_model()
    first = greedy(model, "hello")
    second = greedy(model, "hello", first, "again")
    anew = greedy(model, "again")
    assert len({first, second, anew}) == 3, "the history must matter"
    done = chat(folder, "hello\n\nagain\nclear\nagain\nexit\nnever read\n")
    assert done.returncode == 0, done.stderr
    # An empty line asks again, and so does "clear": each leaves a bare prompt on the line of the next one.
    assert done.stdout == f"{BANNER}\n> {first}\n> > {second}\n> > {anew}\n> "


def test_weights_in_four_bits(folder: Path) -> None:
    """Transformers' own text of the same quantised model, which is not that of the whole one."""
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(torch.float32)).eval()
    keep_layout(quantised)
    first = greedy(quantised, "hello")
    assert first != greedy(ascii_model(), "hello")
    done = chat(folder, "hello\n", "--load_in_4bit", "--flash_attn", "--disable_fast_tokenizer")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ONE_TOKENIZER}\n{BANNER}\n> {first}\n> \n"


def test_end_of_input_and_a_message_that_is_too_long(folder: Path) -> None:
    """The tiny model sees 512 positions; the refused message must not stay in the history."""
    model = ascii_model()
    first = greedy(model, "hello")
    second = greedy(model, "hello", first, "again")
    done = chat(folder, f"hello\n{'x' * 600}\nagain\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{BANNER}\n> {first}\n> \n> {second}\n> \n"
    assert "togi: The conversation has 6" in done.stderr and "start anew" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_chat_template(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    ascii_model().save_pretrained(bare)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    done = chat(bare, "hello\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"togi: The tokenizer of {bare} has no chat template: use an instruct model, give --tokenizer_chat_template, or talk "
        "in plain text with --no_apply_chat_template.\n"
    )


def continued(text: str, **options: float) -> str:
    """Transformers' own greedy continuation of a text."""
    tokenizer, model = tiny_tokenizer(), ascii_model()
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=STOP, pad_token_id=STOP, **options
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_plain_text_grows_by_the_template_and_repeats_less(folder: Path, tmp_path: Path) -> None:
    """The established way, with a text to start from; under the established module name."""
    (tmp_path / "start.txt").write_text("Two people talk.\n")
    first = continued("Two people talk.\nQ: hello A:", repetition_penalty=1.5)
    second = continued(f"Two people talk.\nQ: hello A:{first}\nQ: again A:", repetition_penalty=1.5)
    assert first != continued("Two people talk.\nQ: hello A:")
    words = ["-m", "togi.cli.interactive_chat", "--pretrain", str(folder), "--greedy_sampling", "--max_len"]
    words += [
        str(NEW_TOKENS),
        "--no_apply_chat_template",
        "--input_template",
        "Q: {} A:",
        "--repetition_penalty",
        "1.5",
    ]
    more = ["--ta_prompt", str(tmp_path / "start.txt")]
    done = warm.run([sys.executable, *words, *more], input="hello\nagain\nclear\nhello\nexit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{BANNER}\n> {first}\n> {second}\n> > {first}\n> "


def test_the_reward_is_asked_for_in_the_words_of_training(folder: Path) -> None:
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    asked = continued(with_reward(REWARD_TEMPLATE, rendered, 3.0))
    assert asked != continued(rendered)
    done = chat(folder, "hello\nexit\n", "--enable_csft", "--csft_prompt", "<rm_score>: 3")
    assert (done.returncode, done.stdout) == (0, f"{BANNER}\n> {asked}\n> "), done.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--ta_prompt x.txt", "--ta_prompt is for plain text: add --no_apply_chat_template"),
        ("--input_template {}", "--input_template is for plain text"),
        ("--no_apply_chat_template --input_template x", "must contain {} exactly once"),
        ("--greedy_sampling --temperature 1", "--greedy_sampling takes the most likely token"),
        ("--csft_prompt 3", "--csft_prompt is only used with --enable_csft"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--pretrain", "m", *flags.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_a_failure_while_generating_ends_the_stream() -> None:
    how = Answering(max_new_tokens=4, temperature=0.0, top_p=1.0, stop_token_ids=(STOP,))
    with pytest.raises(IndexError):
        list(stream(ascii_model(), tiny_tokenizer(), [10_000], how))
    with pytest.raises(ModelError, match="600 tokens"):
        list(stream(ascii_model(), tiny_tokenizer(), [1] * 600, how))


def test_leaving_the_stream_early_ends_the_generation() -> None:
    how = Answering(max_new_tokens=400, temperature=1.0, top_p=1.0, stop_token_ids=(STOP,))
    model = ascii_model()
    with torch.no_grad():
        model.lm_head.weight[STOP] = 0
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    pieces = stream(model, tiny_tokenizer(), [5, 6, 7], how)
    next(pieces)
    pieces.close()
    assert len(calls) < 400
