"""Tokenised rows in files: made once, in any number of processes, going on after a kill, and never trusted when damaged."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from togi.config.choices import Overlong
from togi.data import shards
from togi.data.encode import encode_rows
from togi.data.faults import Drop
from togi.data.records import RecordSpec, load_pairs, load_sft, load_steps, load_unpaired
from togi.data.rows import PairReader, StepReader, step_labels
from togi.data.shards import FAULT_CODES, Job, Shard, Table, shard_ranges, write_shard
from togi.data.source import load_source
from togi.errors import DataError

PLAIN = {"input_key": "q", "output_key": "a"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch):
    """Shards of four rows, in a cache of the test's own."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    monkeypatch.setenv("TOGI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def made(monkeypatch):
    """The shards that were tokenised in this process."""
    parts = []
    make = Job.make

    def counted(job, part):
        parts.append(part)
        make(job, part)

    monkeypatch.setattr(Job, "make", counted)
    return parts


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(n):
    return [{"q": f"q{i}", "a": "yes " * (1 + i % 3)} for i in range(n)]


def files(tmp_path):
    return sorted((tmp_path / "cache" / "data").glob("*/*.safetensors"))


CASES = {
    "sft": (
        load_sft,
        [{"m": [{"role": r, "content": f"{r}{i}"} for r in ["user", "assistant"] * (1 + i % 2)]} for i in range(9)],
        {"input_key": "m", "apply_chat_template": True, "multiturn": True},
    ),
    "pairs": (
        load_pairs,
        [{"p": f"p{i}", "chosen": "good" * (i % 3 + 1), "rejected": "bad", "margin": i / 7} for i in range(9)],
        {"prompt_key": "p", "margin_loss": True},
    ),
    "unpaired": (load_unpaired, [{**row, "label": i % 2} for i, row in enumerate(answers(9))], PLAIN),
    "steps": (
        load_steps,
        [{"input": "a # " * (i % 3 + 1), "label": [i / 9] * (i % 3 + 1)} for i in range(9)],
        {"placeholder_token": "#", "reward_tokens": ("+", "-"), "max_len": 9, "overlong": Overlong.TRUNCATE},
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_second_run_finds_everything_and_is_equal(tmp_path, tokenizer, made, kind):
    load, rows, settings = CASES[kind]
    path = write(tmp_path / "a.jsonl", [*rows, "{broken\n", {"other": 1}])
    spec = RecordSpec(path, max_bad_rows=0.2, **settings)
    first = load(spec, tokenizer)
    assert made == [range(4), range(4, 8), range(8, 11)] and len(first) == 9
    again = load(spec, tiny_tokenizer())
    assert len(made) == 3
    assert again.fingerprint() == first.fingerprint() and again.report == first.report
    assert again.lengths().tolist() == [sum(len(sample.tokens) for sample in row) for row in first]
    for one, other in zip(first, again, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.tokens.tolist(), a.loss_mask.tolist(), a.prompt_length) == (
                b.tokens.tolist(), b.loss_mask.tolist(), b.prompt_length
            )  # fmt: skip
            assert (a.group_id, a.values) == (b.group_id, b.values) and a.streams.keys() == b.streams.keys()
            for name, stream in a.streams.items():
                np.testing.assert_array_equal(stream, b.streams[name])


def test_a_shard_holds_what_became_of_its_rows(tmp_path, tokenizer):
    """Written and read back: tokens, parts, labels and values to the bit, also of rows without any sequence."""
    spec = RecordSpec("", placeholder_token="#", reward_tokens=("+", "-"), max_len=8)
    kind = step_labels(spec, 0.1, tokenizer)
    rows = [{"input": "a#b#", "label": [0.1, 1]}, {"input": "", "label": []}, {"input": "too long #", "label": [1]}]
    steps = load_source(write(tmp_path / "steps.jsonl", rows)).rows
    pairs = [{"chosen": "ab", "rejected": "ac", "margin": 1 / 3}, {"chosen": "x", "rejected": "x", "margin": 0}]
    pairs = load_source(write(tmp_path / "pairs.jsonl", pairs)).rows
    for source, reader in ((steps, StepReader(spec, kind)), (pairs, PairReader(RecordSpec("", margin_loss=True)))):
        outcomes = list(encode_rows(source, range(len(source)), reader, tokenizer))
        write_shard(tmp_path / "shard", outcomes)
        shard = Shard(tmp_path / "shard")
        assert len(shard) == len(outcomes)
        for row, outcome in enumerate(outcomes):
            assert len(shard.coded(row)) == len(outcome.coded)
            for kept, coded in zip(shard.coded(row), outcome.coded, strict=True):
                assert kept.tokens.tolist() == coded.tokens.tolist() and kept.tokens.dtype == coded.tokens.dtype
                for field in ("runs", "prompt_length", "merged", "labels", "values"):
                    assert getattr(kept, field) == getattr(coded, field)
        assert Table([shard]).sizes_N.tolist() == [sum(len(c.tokens) for c in outcome.coded) for outcome in outcomes]
    write_shard(tmp_path / "none", list(encode_rows(steps, range(1, 2), StepReader(spec, kind), tokenizer)))
    table = Table([Shard(tmp_path / "none"), shard])
    assert table.coded(0) == () and table.coded(1)[1].tokens.tolist() == tokenizer("ac")["input_ids"] + [258]
    assert np.isin(table.drops_N, FAULT_CODES).tolist() == [True, False, True] and [
        row for row, _ in table.faults()
    ] == [0, 2]


def test_processes_make_the_same_as_one(tmp_path, tokenizer, made, monkeypatch):
    load, rows, settings = CASES["pairs"]
    path = write(tmp_path / "a.jsonl", [*rows, "{broken\n", {**rows[0], "chosen": ""}])
    other = write(tmp_path / "b.jsonl", rows[:3])
    spec = RecordSpec(f"{path},{other}", "0.6,0.4", max_bad_rows=0.2, dataset_num_proc=1, **settings)
    one = load(spec, tokenizer)
    assert len(made) == 4  # eleven rows in three shards, and three in one
    monkeypatch.setenv("TOGI_CACHE", str(tmp_path / "other"))
    two = load(dataclasses.replace(spec, dataset_num_proc=2), tokenizer)
    assert len(made) == 5  # one shard is no work for two
    assert two.fingerprint() == one.fingerprint() and two.report == one.report
    names = [sorted(f.name for f in (tmp_path / folder / "data").glob("*/*")) for folder in ("cache", "other")]
    assert names[0] == names[1] and len(names[0]) == 4  # the names hold digests of the bytes
    # What ends the run is told in the same words.
    strict = dataclasses.replace(spec, dataset_num_proc=2, max_len=5, overlong=Overlong.ERROR)
    with pytest.raises(DataError, match=r"^Line \d of .*a.jsonl has \d+ tokens, more than --max_len 5"):
        load(strict, tokenizer)


def test_a_killed_run_goes_on_with_whole_shards(tmp_path, tokenizer, made, monkeypatch):
    path = write(tmp_path / "a.jsonl", answers(18))
    whole = load_sft(RecordSpec(path, **PLAIN), tokenizer)
    monkeypatch.setenv("TOGI_CACHE", str(tmp_path / "cache2"))
    made.clear()
    write_whole = shards.write_shard

    def killed(aside, outcomes):
        if len(made) == 3:
            aside.write_bytes(b"half")
            raise KeyboardInterrupt
        write_whole(aside, outcomes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_shard", killed)
        load_sft(RecordSpec(path, **PLAIN), tokenizer)
    made.clear()
    again = load_sft(RecordSpec(path, **PLAIN), tokenizer)
    assert made == [range(8, 12), range(12, 16), range(16, 18)]
    assert again.fingerprint() == whole.fingerprint() and again.report == whole.report


def test_what_changes_a_sample_is_a_miss_and_nothing_else(tmp_path, tokenizer, made):
    path = write(tmp_path / "a.jsonl", answers(4))
    base = RecordSpec(path, **PLAIN)

    def shards(spec, tokenizer=tokenizer):
        made.clear()
        load_sft(spec, tokenizer)
        return len(made)

    assert shards(base) == 1
    moved = write(tmp_path / "elsewhere" / "b.jsonl", answers(4))
    template, special = tiny_tokenizer(), tiny_tokenizer()
    template.chat_template = CHAT_TEMPLATE + " "
    special.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    for same in (
        {},
        {"seed": 1},
        {"max_bad_rows": 0.3},
        {"dataset_num_proc": 3},
        {"dataset": moved},
        {"split": "test"},
    ):
        assert shards(dataclasses.replace(base, **same)) == 0, same
    for other in ({"max_len": 7}, {"input_template": "{}:"}, {"output_key": "q"}, {"overlong": Overlong.TRUNCATE}):
        assert shards(dataclasses.replace(base, **other)) == 1, other
        assert shards(dataclasses.replace(base, **other)) == 0, other
    assert [shards(base, each) for each in (template, special, template, special)] == [1, 1, 0, 0]
    write(tmp_path / "a.jsonl", [*answers(3), {"q": "q3", "a": "no"}])
    assert shards(base) == 1


def test_max_samples_keeps_whole_shards(tmp_path, tokenizer, made):
    path = write(tmp_path / "a.jsonl", answers(10))
    assert len(load_sft(RecordSpec(path, max_samples=6, **PLAIN), tokenizer)) == 6
    assert made == [range(4), range(4, 6)]
    made.clear()
    assert len(load_sft(RecordSpec(path, **PLAIN), tokenizer)) == 10
    assert made == [range(4, 8), range(8, 10)]


def test_faults_of_a_moved_file_have_its_new_name(tmp_path, tokenizer, made):
    rows = ["\n", *answers(6), {"q": "x"}, {"q": "x", "a": 3}, "[]\n"]
    for name in ("a", "b"):
        path = write(tmp_path / f"{name}.jsonl", rows)
        faults = load_sft(RecordSpec(path, max_bad_rows=0.5, **PLAIN), tokenizer).report.faults
        assert (faults.rows, faults.of) == (3, 9)
        assert faults.by_kind == {"missing field": 1, "wrong type": 1, "unreadable": 1}
        assert [(fault.place, fault.kind) for fault in faults.first] == [
            (f"Line 8 of {path}", Drop.MISSING_FIELD),
            (f"Line 9 of {path}", Drop.WRONG_TYPE),
            (f"Line 10 of {path}", Drop.UNREADABLE),
        ]
        assert faults.first[0].reason == (
            f"Line 8 of {path} has no field 'a'; it has 'q': set --output_key to one of these."
        )
    assert len(made) == 3  # for the first of the two files only


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_made_again(tmp_path, tokenizer, made, damage):
    path = write(tmp_path / "a.jsonl", answers(8))
    first = load_sft(RecordSpec(path, **PLAIN), tokenizer).fingerprint()
    file = files(tmp_path)[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes({"cut": content[:-9], "flipped": content, "empty": b""}[damage])
    made.clear()
    assert load_sft(RecordSpec(path, **PLAIN), tokenizer).fingerprint() == first
    assert made == [range(4, 8)] and len(files(tmp_path)) == 2


def test_the_oldest_sets_are_removed(tmp_path, tokenizer, made, monkeypatch):
    paths = [write(tmp_path / f"{n}.jsonl", answers(n)) for n in (1, 2, 3)]
    for age, path in zip((30, 20), paths, strict=False):
        load_sft(RecordSpec(path, **PLAIN), tokenizer)
        (newest,) = {file.parent for file in files(tmp_path)} - set(made)
        made.append(newest)
        os.utime(newest, (newest.stat().st_atime, newest.stat().st_mtime - age))
    load_sft(RecordSpec(paths[0], **PLAIN), tokenizer)  # used again: the second is the oldest now
    monkeypatch.setattr(shards, "MAX_BYTES", sum(file.stat().st_size for file in files(tmp_path)) * 2 - 1)
    monkeypatch.setattr(shards, "MAX_BYTES", shards.MAX_BYTES // 2 + 200)
    load_sft(RecordSpec(paths[2], **PLAIN), tokenizer)
    made.clear()
    for path, missing in zip(paths, (0, 1, 0), strict=True):
        monkeypatch.setattr(shards, "MAX_BYTES", 10**9)
        load_sft(RecordSpec(path, **PLAIN), tokenizer)
        assert len(made) == missing
        made.clear()


def test_a_cache_that_cannot_be_written(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("TOGI_CACHE", write(tmp_path / "file", ["x"]))
    with pytest.raises(DataError, match=r"^Tokenised rows cannot be kept in .*/file/data/.*set TOGI_CACHE"):
        load_sft(RecordSpec(write(tmp_path / "a.jsonl", answers(1)), **PLAIN), tokenizer)


def test_a_cache_of_another_user(tmp_path, tokenizer, made, monkeypatch):
    """Rows in a folder that cannot be touched are used; those that cannot be read are made again."""
    path = write(tmp_path / "a.jsonl", answers(4))
    first = load_sft(RecordSpec(path, **PLAIN), tokenizer).fingerprint()
    made.clear()

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as read_only:
        read_only.setattr(shards.os, "utime", refused)
        assert load_sft(RecordSpec(path, **PLAIN), tokenizer).fingerprint() == first and made == []
    (theirs,), digest = files(tmp_path), shards._digest
    monkeypatch.setattr(shards, "_digest", lambda file: refused() if file == theirs and not made else digest(file))
    assert load_sft(RecordSpec(path, **PLAIN), tokenizer).fingerprint() == first and made == [range(4)]
    # As the library that writes the files says it.
    theirs.unlink()
    refusal = SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")
    monkeypatch.setattr(shards, "save_file", lambda *_, **__: (_ for _ in ()).throw(refusal))
    with pytest.raises(DataError, match=r"^Tokenised rows cannot be kept in .*Permission denied.*set TOGI_CACHE"):
        load_sft(RecordSpec(path, **PLAIN), tokenizer)


def test_few_files_for_many_rows(monkeypatch):
    assert shard_ranges(range(9)) == [range(4), range(4, 8), range(8, 9)]
    monkeypatch.setattr(shards, "MOST_SHARDS", 2)
    assert shard_ranges(range(9)) == [range(5), range(5, 9)]


MEMORY = """
import sys
from tests.tiny import tiny_tokenizer
from togi.data.records import RecordSpec, load_sft

def peak():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) / 1024

tokenizer = tiny_tokenizer()
for path in sys.argv[1:]:
    before = peak()
    examples = load_sft(RecordSpec(path, input_key="q", output_key="a", dataset_num_proc=1), tokenizer)
    print(len(examples), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.large
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """100,000 rows with 500 characters that are not trained on. They grow by about 20 MB; as Python objects they took 220 MB."""
    for name, count in (("warm", 5000), ("large", 100_000)):
        with (tmp_path / name).with_suffix(".jsonl").open("w") as file:
            file.writelines(
                json.dumps({"q": f"q{i}", "a": "yes", "more": [f"{i} " * 20] * 5}) + "\n" for i in range(count)
            )
    words = [sys.executable, "-c", MEMORY, *(str(tmp_path / f"{name}.jsonl") for name in ("warm", "large"))]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, grown = done.stdout.splitlines()[1].split()
    assert int(rows) == 100_000
    assert float(grown) < 60
