"""Public data in its own shape loads with the obvious flags. TOGI_SHARED_DATA names the folder that holds it."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.shared_data import shared_file
from tests.tiny import tiny_tokenizer
from togi.data.records import RecordSpec, load_pairs, load_sft, load_steps, load_unpaired

PROMPTED = {"prompt_key": "prompt"}
PLAIN = {**PROMPTED, "input_template": "User: {}\nAssistant: "}
CHAT = {"apply_chat_template": True}
MESSAGES = {"input_key": "messages", **CHAT}
COMPLETION = {"input_key": "prompt", "output_key": "completion"}
# Loader, file, settings, rows that are used, faults
SETS = [
    (load_pairs, "oasst/pairs_test", {**PROMPTED, **CHAT}, 64, {}),  # lists of messages with string answers
    (load_pairs, "ultrafeedback/pairs_test", PLAIN, 80, {}),
    (load_pairs, "gsm8k_solutions/pairs_test", PLAIN, 110, {}),
    (load_pairs, "truthfulqa/pairs_test", {**PROMPTED, **CHAT}, 80, {}),
    (load_pairs, "persona_yes_no/pairs_test", PROMPTED, 200, {}),
    (load_pairs, "llmbar/test", PROMPTED, 260, {}),
    (load_pairs, "pandalm/test", PROMPTED, 432, {"empty answer": 19}),
    (load_pairs, "hh_sample/test", {}, 38, {}),  # whole dialogues as strings
    (load_unpaired, "gsm8k_solutions/unpaired_test", COMPLETION, 480, {}),
    (load_unpaired, "truthfulqa/unpaired_train", {**COMPLETION, **CHAT}, 1992, {"empty answer": 8}),
    (load_sft, "oasst/sft_test", {**MESSAGES, "multiturn": True}, 23, {}),
    (load_sft, "fastchat_identity/sft_test", MESSAGES, 80, {}),
    (load_sft, "tool_calls/sft_test", {**MESSAGES, "multiturn": True}, 30, {}),
    (load_sft, "self_instruct/sft_test", {"input_key": "instruction", "output_key": "output"}, 27, {}),
    (load_sft, "gsm8k/test", {"input_key": "prompt", "output_key": "solution"}, 400, {}),
]


@pytest.mark.parametrize(
    ("load", "name", "settings", "used", "faults"), SETS, ids=lambda value: getattr(value, "__name__", str(value)[:30])
)
def test_a_set_loads(load, name, settings, used, faults):
    path, tokenizer = shared_file(f"{name}.jsonl"), tiny_tokenizer()
    if name.startswith("tool_calls"):  # the tiny one's template leaves tool calls out, which is a fault of the row
        tokenizer.chat_template = (Path(__file__).parents[1] / "templates" / "qwen3.jinja").read_text()
    examples = load(RecordSpec(str(path), max_len=100_000, **settings), tokenizer)
    assert len(examples) == used
    assert examples.report.faults.by_kind == faults
    assert examples.report.picked == used + sum(faults.values())


@pytest.fixture(scope="module")
def converter():
    file = Path(__file__).parents[2] / "examples" / "prm_rows.py"
    spec = importlib.util.spec_from_file_location("prm_rows", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_step_labels_become_rows_by_hand(converter):
    row = {"prompt": "1+1?", "steps": ["one", "three", "four"], "labels": [True, False, None]}
    assert converter.convert(row, "#") == {"text": "1+1?\none #\nthree #", "labels": ["+", "-"]}
    row = {"input": "1+1? a - b ки\nc ки", "label": "1+1? a - b +\nc -"}
    assert converter.convert(row, "#") == {"text": "1+1? a - b #\nc #", "labels": ["+", "-"]}
    for bad, marker in (({**row, "label": "1+1? a"}, "#"), ({**row, "label": "1+1? a - c +\nc -"}, "#"), (row, "a")):
        with pytest.raises(ValueError, match=r"the texts differ|is in the text already"):
            converter.convert(bad, marker)


@pytest.mark.parametrize(("name", "used"), [("test", 240), ("format_math_shepherd", 7)])
def test_step_labels_load(tmp_path, converter, name, used):
    lines = shared_file(f"step_labels/{name}.jsonl").read_text(encoding="utf-8").split("\n")
    # The marker is a special token, so that no text can merge with it.
    rows = [converter.convert(json.loads(line), "<|endoftext|>") for line in lines if line]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"placeholder_token": "<|endoftext|>", "reward_tokens": ("+", "-"), "max_len": 100_000}
    spec = RecordSpec(str(tmp_path / "a.jsonl"), input_key="text", label_key="labels", **settings)
    examples = load_steps(spec, tiny_tokenizer())
    assert len(examples) == used == len(rows)
    assert examples.report.faults.rows == 0
    for row, (sample,) in zip(rows, examples, strict=True):
        assert int(sample.loss_mask.sum()) == len(row["labels"])
