"""The ledger: which stored groups may be used after a resume, what is removed, and the log that must add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from togi.errors import DataError
from togi.obs.run_dir import RunDirectory
from togi.pump.experience import ScoredGroup
from togi.pump.ledger import Event, Ledger, balance, read
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score

PROMPT = Prompt("p", (1,), "text", {"answer": 1}, "sums", {"difficulty": 1}, ({"role": "user", "content": "Q"},))


def group(*versions: int, prompt: Prompt = PROMPT) -> ScoredGroup:
    count = len(versions)
    rollout = Rollout(prompt, "g", (7,) * count, (True,) * count, (0.0,) * count, "", FinishReason.STOP, versions)
    return ScoredGroup((rollout,), (Score(Outcome.SCORE, 1.0),))


def ledger(folder: Path, origin: str = "") -> Ledger:
    """Of another life, each time."""
    return Ledger(RunDirectory(folder), origin=origin, stores=True)


def with_checkpoints(folder: Path, *versions: int) -> Ledger:
    made = ledger(folder)
    for version in versions:
        made.write(Event.CHECKPOINT, version=version)
    return made


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "ledger").rglob("*.parquet"))


def test_tokens_of_lost_weights_are_never_trained(tmp_path: Path) -> None:
    """What version 3 sampled is worth nothing after a resume from version 2, also when the run has come to another version 3."""
    first = with_checkpoints(tmp_path, 2, 3, 4)
    first.keep(5, PROMPT, group(2, 3))
    first.keep(6, PROMPT, group(1, 2))
    unknown = ledger(tmp_path)
    assert unknown.kept(6, PROMPT) is None  # not resumed: nothing is known of what lies there
    second = ledger(tmp_path)
    second.resume(2)
    assert (second.kept(5, PROMPT), second.stored(), files(tmp_path)) == (None, [6], ["step_000006.parquet"])
    third = ledger(tmp_path)
    third.resume(4)
    assert third.kept(5, PROMPT) is None
    found = third.kept(6, PROMPT)
    assert found is not None and found.rollouts[0].versions == (1, 2)


def test_groups_of_lost_weights_go_also_where_the_settings_have_changed(tmp_path: Path) -> None:
    """Settings A, then B from an older checkpoint, then A again."""
    with_checkpoints(tmp_path, 2, 4)
    ledger(tmp_path, "A").keep(5, PROMPT, group(3))
    ledger(tmp_path, "B").resume(2)
    last = ledger(tmp_path, "A")
    last.resume(4)
    assert last.kept(5, PROMPT) is None


def test_what_was_stored_before_a_run_went_on_elsewhere_is_lost(tmp_path: Path) -> None:
    """The checkpoint of version 8 was written by a run in another folder, from weights that this one does not know."""
    first = with_checkpoints(tmp_path, 4)
    first.keep(5, PROMPT, group(5))
    back = ledger(tmp_path)
    back.resume(8)
    assert (back.kept(5, PROMPT), files(tmp_path)) == (None, [])


def test_a_stored_group_is_used_for_its_prompt_only(tmp_path: Path) -> None:
    """With the same id and text, but another label, data source, row or messages, it is generated and scored anew."""
    with_checkpoints(tmp_path, 3).keep(5, PROMPT, group(3))
    resumed = ledger(tmp_path)
    resumed.resume(3)
    found = resumed.kept(5, PROMPT)
    assert found is not None and found.scores == group(3).scores
    changes: list[dict[str, object]] = [
        {"id": "q"},
        {"tokens": (2,)},
        {"label": {"answer": 2}},
        {"label": {"answer": "1"}},
        {"datasource": "words"},
        {"row": {"difficulty": 2}},
        {"messages": ()},
    ]
    for change in changes:
        assert resumed.kept(5, replace(PROMPT, **change)) is None, change  # type: ignore[arg-type]
    assert resumed.kept(6, PROMPT) is None
    # What is made in its place replaces it.
    other = replace(PROMPT, label="right")
    resumed.keep(5, other, group(4, prompt=other))
    assert (resumed.stored(), files(tmp_path)) == ([5], ["step_000005.parquet"])
    again = ledger(tmp_path)
    again.write(Event.CHECKPOINT, version=4)
    again.resume(4)
    assert again.kept(5, PROMPT) is None and again.kept(5, other) is not None


def test_forgotten_and_damaged_groups_are_generated_again(tmp_path: Path) -> None:
    first = with_checkpoints(tmp_path, 3)
    for number in (5, 6):
        first.keep(number, PROMPT, group(3))
    first.forget([5])
    assert (first.stored(), files(tmp_path)) == ([6], ["step_000006.parquet"])
    resumed = ledger(tmp_path)
    resumed.resume(3)
    [file] = (tmp_path / "ledger").rglob("*.parquet")
    file.write_bytes(b"damaged")
    assert resumed.kept(6, PROMPT) is None
    third = ledger(tmp_path)
    third.resume(3)
    assert (third.stored(), files(tmp_path)) == ([], [])
    assert not list((tmp_path / "ledger").iterdir())


def test_a_run_that_goes_on_in_another_folder_adds_up(tmp_path: Path) -> None:
    """Resumed from version 4, killed, resumed from there once more, then from its own checkpoint."""
    for version in (4, 4):
        moved = ledger(tmp_path)
        moved.resume(version)
        for event in (Event.QUEUED, Event.RUNNING, Event.DONE, Event.TRAINED):
            moved.write(event, [16])
    moved.write(Event.QUEUED, [17])
    moved.write(Event.CHECKPOINT, version=5)
    ledger(tmp_path).resume(5)
    assert balance(read(tmp_path / "ledger.jsonl")) == {16: Event.TRAINED}


def test_a_ledger_that_does_not_add_up_is_found() -> None:
    line = {"prompts": [1], "time": 0.0}
    with pytest.raises(DataError, match="prompt 1 trained after it was queued"):
        balance([{**line, "event": "queued"}, {**line, "event": "trained"}])
    with pytest.raises(DataError, match="does not have the checkpoint of version 3 that it goes on from"):
        balance([{**line, "event": "queued"}, {**line, "event": "resumed", "version": 3}])
    twice = [{**line, "event": event} for event in ("queued", "running", "done", "trained", "trained")]
    with pytest.raises(DataError, match="prompt 1 trained after it was trained"):
        balance(twice)


def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path: Path) -> None:
    ledger = Ledger(RunDirectory(tmp_path), origin="", stores=True)
    ledger.write(Event.QUEUED, [0])
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "runn')
    ledger.resume(0)
    assert [line["event"] for line in read(tmp_path / "ledger.jsonl")] == ["queued", "resumed"]
