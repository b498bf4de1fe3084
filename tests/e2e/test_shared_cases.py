"""Situations that users met, which lie outside the repository: TOGI_SHARED_CASES names their folder, a folder each.

Each is run as its ``cmd.sh`` says, in a copy. What is right is here; permanent tests of the same kinds have rows of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("TOGI_SHARED_CASES", "no such folder"))
EXAMPLE = "⟦{}<|end|></s>⟧"
CALLED = '<|assistant|>⟦<call>find_ball {"color": "red"}</call><|end|>⟧'


@dataclass(frozen=True)
class Right:
    """The exit status; patterns that the output and the data reports together hold; and one that they do not."""

    status: int
    patterns: tuple[str, ...]
    never: str | None = None


def trains(*texts: str, never: str | None = None) -> Right:
    return Right(0, tuple(re.escape(text) for text in texts), never)


def refused(*patterns: str) -> Right:
    return Right(2, patterns, "Traceback|would be random")


TOOLS = '<|tools|>[{"type": "function", "function": {"name": "find_ball"'
CASES = {
    "01a-tools-list": trains(TOOLS, CALLED),
    "01c-no-content-key": trains(TOOLS, CALLED),
    "01d-args-json-text": trains(TOOLS, CALLED),
    "01e-dpo-tools-dict-answer": trains(TOOLS, EXAMPLE.format("It is under the tree.")),
    "02a-parquet-filled-arguments": trains(CALLED, never=r"⟦<call>[^⟧]*null"),
    "03a-dpo-system-in-answers": trains(
        "```\n<|system|>Be kind.<|end|>\n<|user|>Tell a story about Tom.<|end|>\n<|assistant|>⟦Tom was happy",
        "8 of 8 rows repeat",
    ),
    "03c-dpo-prompt-spaces": trains(
        "```\n<|user|>Tell a story about Tom.<|end|>\n<|assistant|>⟦Tom was happy", "8 of 8 rows repeat"
    ),
    "04a-sharegpt": trains(
        "<|user|>Who is Tom?<|end|>\n<|assistant|>⟦Tom is a child.", "8 of 8 rows have from and value"
    ),
    "04e-role-Assistant-capital": trains("<|assistant|>⟦Tom is a child.<|end|>⟧", "⟦Yes.", "8 of 8 rows call a role"),
    "05d-r1-template": refused(r"without the generation prompt '<\|assistant\|><think>\\n'"),
    "05e-reasoning-content-chatml": trains(
        "8 of 8 rows have reasoning beside the content that the chat template leaves out"
    ),
    "07a-kto-csv-True": trains("model:"),
    "08g-rl-half-emoji-label": refused(r"Line 1 of d.jsonl: the field 'answer' has half a character \(\\ud83d\)"),
    "08h-semicolon-csv": refused("semicolon"),
    "08i-json-columns": refused("one object that holds a whole table"),
    "08k-nan-json": refused("NaN"),
    "12b-rl-json-string": trains(
        "<|user|>Who is Tom?<|end|>\n<|assistant|>", "8 of 8 rows hold messages or tools as text"
    ),
    "13a-rl-answer-in-prompt": trains(
        "<|user|>Who is Tom?<|end|>\n<|assistant|>\n```", "8 of 8 rows end with the assistant's answer"
    ),
    "16-merge-both": Right(0, (r"largest difference of logits \d(\.\d+)?e-0[5-9]|largest difference of logits 0\.0",)),
    "16-merge-embed": Right(0, (r"largest difference of logits \d(\.\d+)?e-0[5-9]|largest difference of logits 0\.0",)),
    "16-merge-grown": Right(0, (r"largest difference of logits \d(\.\d+)?e-0[5-9]|largest difference of logits 0\.0",)),
    "17a-tokenizer-larger": refused("514", "512"),
    "17b-rl-tokenizer-larger": refused("514", "512"),
    "19-gemma3-vision": Right(2, ("gemma3",), "Traceback"),
    "19-gpt2": Right(0, (r"plain Transformers: loss", "attn_pdrop 0.1"), "Traceback"),
    "19-gpt2-advice": Right(0, (r"plain Transformers: loss",), "Traceback"),
    "19w-gpt2-rl-ratio": Right(0, (r'"policy/ratio_max": 1\.0\b', r"resid_pdrop"), "Traceback"),
    "19x-gpt2-too-long": refused("--max_len 256 is more than the 64 positions"),
    "19z-gpt2-lora": Right(0, ("merged",), "Traceback"),
    "26b-comma-path": refused("comma"),
    "27a-parts": trains(EXAMPLE.format("A child."), "8 of 8 rows have content in parts of text"),
    "28a-user-null": refused(r"has content that is null in its message 0 \(role user\)"),
    "28b-content-number": refused(r"has content that is the number 7 in its message 1 \(role assistant\)"),
    "30a-im-end-stops": Right(0, (r'"output": "Tom is a happy child.<\|im_end\|>".*"finish_reason": "stop"',)),
    "34a-serve-rm-model": Right(0, (r"half .ud83d.* -> \(4\d\d, .*half of a surrogate pair",)),
    "38b-file-size-limit": Right(0, ("rc [12]", "File too large"), "Traceback"),
    "40a-dropout-dpo": Right(0, ("resid_pdrop",), "Traceback"),
}
# Rows that are longer than their command allows once their tools are shown, and a command that asks for more positions than its
# model has. Each is refused for that first, so that what it is about is seen with the length mended.
LENGTHS = {
    **dict.fromkeys(("01a", "01c", "01d", "01e", "02a"), ("--max_len 256", "--max_len 512")),
    "19-gpt2": ("--max_len 128", "--max_len 64"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not FOLDER.is_dir():
        pytest.skip("set TOGI_SHARED_CASES to the folder of the cases")
    made = tmp_path_factory.mktemp("models") / "models"
    subprocess.run([sys.executable, FOLDER / "make_models.py", stories(), made], check=True, capture_output=True)
    return made


def stories() -> Path:
    return FOLDER.parent / "data" / "stories260k"


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the shared cases are not there")
def test_every_case_is_known() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_case(models: Path, tmp_path: Path, name: str) -> None:
    right, folder = CASES[name], tmp_path / name
    shutil.copytree(FOLDER / name, folder, copy_function=shutil.copyfile)
    for beginning, change in LENGTHS.items():
        if name.startswith(beginning):
            command = folder / "cmd.sh"
            command.write_text(command.read_text().replace(*change))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {
        "STORIES": str(stories().resolve()),
        "MODELS": str(models),
        "PATH": path,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(["sh", "cmd.sh"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    reports = [report.read_text() for report in folder.glob("run/data/*.md")]
    said = "\n".join([done.stdout, done.stderr, *reports])
    assert done.returncode == right.status, said
    for pattern in right.patterns:
        assert re.search(pattern, said), f"no {pattern!r} in {said}"
    assert right.never is None or not re.search(right.never, said), said
