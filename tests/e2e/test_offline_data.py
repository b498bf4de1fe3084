"""Bad rows in whole commands: left out, named and counted in the run folder, or one sentence before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.offline_world import answer, flags, make_world, train
from togi.cli.main import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def write_rows(path: Path) -> Path:
    """Fourteen good rows; line 3 is blank, line 4 broken, and line 17 has no answer."""
    good = [json.dumps(answer(i)) for i in range(14)]
    path.write_text("\n".join([*good[:2], "", '{"q": ', *good[2:], '{"q": "x"}', ""]))
    return path


def test_bad_rows_are_left_out_and_told_in_the_run_folder(world: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    clean = train(world, "sft", tmp_path / "clean", evaluate=False)
    steps = train(world, "sft", tmp_path / "run", "--dataset", str(rows), "--max_bad_rows", "0.2", evaluate=False)
    assert len(steps) == len(clean) == 4  # fourteen rows in batches of four
    assert sum(step["tokens/step"] for step in steps) == sum(step["tokens/step"] for step in clean)
    report = json.loads((tmp_path / "run" / "data" / "train.json").read_text())
    assert report["sources"][0]["kept"] == 14
    assert report["sources"][0]["dropped"] == {"unreadable": 1, "missing field": 1}
    faults = report["faults"]
    assert (faults["rows"], faults["of"], faults["by_kind"]) == (2, 16, {"unreadable": 1, "missing field": 1})
    sentences = [
        f"Line 4 of {rows} is not valid JSON (Expecting value): repair or remove it.",
        f"Line 17 of {rows} has no field 'a'; it has 'q': set --output_key to one of these.",
    ]
    assert [fault["reason"] for fault in faults["first"]] == sentences
    text = (tmp_path / "run" / "data" / "train.md").read_text()
    assert "2 of 16: 1 unreadable, 1 missing field." in text
    assert all(f"- {sentence}" in text for sentence in sentences)


@pytest.mark.parametrize("limit", [[], ["--max_bad_rows", "0"], ["--max_bad_rows", "0.12"]])
def test_too_many_bad_rows_stop_before_training(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: list[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    run = tmp_path / "run"
    assert main(["sft", *flags(world, "sft", run, "--dataset", str(rows), *limit, evaluate=False)]) == 2
    sentence = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    share = limit[-1] if limit else "0.05"
    assert sentence == (
        f"togi: Line 4 of {rows} is not valid JSON (Expecting value): repair or remove it (the first of 2 faulty rows "
        f"among 16, more than --max_bad_rows {share} allows: correct them, or raise the limit to leave them out)."
    )
    assert not run.exists()


def test_held_out_rows_have_the_same_limit(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    assert main(["sft", *flags(world, "sft", tmp_path / "run", "--eval_dataset", str(rows))]) == 2
    assert "2 faulty rows among 16" in capsys.readouterr().err
