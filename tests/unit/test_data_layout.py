"""Files that are not rows as they stand get one sentence, at a first look and when loaded, and its advice works."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from togi.data.items import parse_items
from togi.data.precheck import check_source, check_sources
from togi.data.source import load_mixture, load_source
from togi.errors import DataError

ROWS = [{"prompt": "Who?", "answer": "Tom."}, {"prompt": "Where?", "answer": "Here."}]
KEYS = {"input_key": "prompt", "output_key": "answer"}
MESSAGES = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]
AS_RECORDS = (
    "{} is one object that holds a whole table: write one object a line (pandas: `to_json(path, orient='records', "
    "lines=True)`)."
)
COMMAS = (
    "{} separates its columns by %s, not by commas: write it with commas (pandas: `to_csv(path, index=False)`), or as "
    ".jsonl."
)
LFS = "{} holds only a Git LFS pointer, not the data: fetch the data with `git lfs pull`."
UTF16 = "{} is UTF-16 text, as some programs export it: save it as UTF-8 (in Excel: CSV UTF-8)."
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
COLUMNS = {key: [row[key] for row in ROWS] for key in ("prompt", "answer")}
NUMBERED = {key: {str(i): value for i, value in enumerate(values)} for key, values in COLUMNS.items()}
TABLES = (
    NUMBERED,
    COLUMNS,
    {str(i): row for i, row in enumerate(ROWS)},
    {"columns": ["prompt", "answer"], "index": [0, 1], "data": [list(row.values()) for row in ROWS]},
)
FOREIGN = [
    *(
        (name, bytes(4096), "{} begins with zero bytes, so it holds no text: write or copy it again.")
        for name in ("a.jsonl", "a.json", "a.csv")
    ),
    *(("a.json", json.dumps(table, indent=indent).encode(), AS_RECORDS) for table in TABLES for indent in (None, 1)),
    ("a.jsonl", json.dumps(NUMBERED).encode(), AS_RECORDS),
    *(
        (
            "a.json",
            json.dumps({"version": "1", "data": ROWS}, indent=indent).encode(),
            "{} is one object with rows in 'data': make a list of rows the whole file, or write one row a line.",
        )
        for indent in (None, 2)
    ),
    (
        "a.json",
        json.dumps({"train": ROWS, "test": ROWS}).encode(),
        "{} is one object with rows in 'train', 'test': make a list of rows the whole file, or write one row a line.",
    ),
    *(
        (
            name,
            "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
            "The first object of {} goes over 4 lines: write one object a line (`jq -c . FILE`), or a list of them.",
        )
        for name, rows in (("a.json", ROWS[:1]), ("a.json", ROWS), ("a.jsonl", ROWS))
    ),
    *(
        (
            "a.jsonl",
            json.dumps(ROWS, indent=indent).encode(),
            "{} is one JSON list: let its name end in .json, or write one object a line (`jq -c .[] FILE`).",
        )
        for indent in (None, 2)
    ),
    *(
        ("a.csv", f"prompt{mark}answer\nWho, then?{mark}Tom.\n".encode(), COMMAS % name)
        for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars"))
    ),
    ("a.tsv", b"prompt\tanswer\n", "{} is separated by tabs: write it with commas as .csv, or as .jsonl."),
    ("a.csv", "prompt,answer\na,b\n".encode("utf-16"), UTF16),
    ("a.jsonl", json.dumps(ROWS[0]).encode("utf-16"), UTF16),
    ("a.csv", "prompt,answer\na,b\n".encode("utf-16-le"), UTF16),
    ("a.csv", b"prompt,answer,prompt\na,b,c\n", "{} has two columns of the name 'prompt' in its first line: rename one of them."),
    *((f"a.{name}", POINTER, LFS) for name in ("jsonl", "json", "csv", "parquet", "arrow")),
    ("a.jsonl", gzip.compress(json.dumps(ROWS[0]).encode(), mtime=0), "{} is compressed: unpack it."),
    ("a.jsonl.gz", b"", "{} is compressed: unpack it."),
    ("a.json.zst", b"", "{} is compressed: unpack it."),
    ("a.xlsx", b"PK\x03\x04", "{} is a workbook: export it as CSV UTF-8."),
    ("a.csv", b"PK\x03\x04", "{} is a ZIP archive or an Excel workbook: unpack it, or export it as CSV UTF-8."),
    ("a.jsonl", b"\n<!DOCTYPE html>", "{} is a web page, not data: download the file itself."),
    ("a.jsonl", b"PAR1", "{} is binary data of the format .parquet: let its name end in .parquet."),
    ("a.txt", b"text", "{} has the unknown extension .txt: data files end in .json, .jsonl, .csv, .parquet, .arrow."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence"), FOREIGN)
def test_one_sentence_at_first_sight(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        check_source(str(path), KEYS, every_row=False)
    assert str(caught.value) == sentence.format(path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"), [case for case in FOREIGN if "rows in" not in case[2] or b"\n" in case[1]]
)
def test_the_same_when_loaded(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    """But for an object on one line, which is a row as long as nobody says which fields it should have."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_source(str(path))
    assert str(caught.value) == sentence.format(path)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": "Who?", "answer": "Tom.", "tools": [{"name": "f"}]}, KEYS),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, {"input_key": "messages"}),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, {"chosen_key": "chosen"}),
        ({"data": ROWS}, {"input_key": "data"}),
    ],
)
def test_one_row_on_one_line_is_a_row(tmp_path: Path, row: dict[str, object], keys: dict[str, str]) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps(row))
        check_source(str(tmp_path / name), keys)
        assert load_source(str(tmp_path / name)).rows.fetch([0]) == [row]


def test_a_long_first_line_is_no_table(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 3_000_000, "answer": 'y "' * 10}, ROWS[0]]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    check_source(str(path), KEYS)
    assert load_source(str(path)).rows.fetch([1, 0]) == rows[::-1]


def test_the_advice_works(tmp_path: Path) -> None:
    """What the sentences say to do, done."""
    pandas = pytest.importorskip("pandas")
    frame, path = pandas.DataFrame(ROWS), tmp_path / "a.jsonl"
    frame.to_json(path, orient="records", lines=True)
    assert load_source(str(path)).rows.fetch([0, 1]) == ROWS
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert load_source(str(tmp_path / "a.csv")).rows.fetch([0, 1]) == ROWS
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=2))
    assert load_source(str(tmp_path / "list.json")).rows.fetch([0, 1]) == ROWS


def test_a_folder_of_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        check_source(str(tmp_path), KEYS)
    assert str(caught.value) == (
        f"The folder {tmp_path} has no data files (.json, .jsonl, .csv, .parquet, .arrow): train.jsonl.gz is compressed: "
        "unpack it."
    )


def test_a_column_name_with_a_space_is_quoted_for_the_shell(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w") as file:
        csv.writer(file).writerows([["prompt", " answer"], ["a", "b"]])
    with pytest.raises(DataError) as caught:
        check_source(str(tmp_path / "a.csv"), KEYS)
    assert str(caught.value) == (
        f"Line 2 of {tmp_path}/a.csv has no field 'answer'; it has 'prompt', ' answer': did you mean --output_key ' answer'?"
    )


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        check_source(str(tmp_path / "a.parquet"), {"input_key": "prompt"})
    assert str(caught.value) == f"{tmp_path}/a.parquet has two columns of the name 'prompt': rename one of them."


def test_a_comma_in_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a,b", "x"):
        Path(folder).mkdir()
        Path(folder, "c.jsonl").write_text(json.dumps(ROWS[0]))
    here = (
        "has a comma in its name, and commas separate data sets: rename it, or give a link to it (ln -s) without one."
    )
    cases = {
        "a,b/c.jsonl": f"a,b/c.jsonl {here}",
        "x/c.jsonl,a,b/c.jsonl": f"a,b/c.jsonl {here}",
        "a,b": f"a,b {here}",
        "x/c.jsonl,y/d.jsonl": (
            "There is no file or folder y/d.jsonl: check the path, and the commas in 'x/c.jsonl,y/d.jsonl', which separate "
            "data sets."
        ),
    }
    for text, sentence in cases.items():
        for read in (parse_items, lambda text: check_sources(text, KEYS), lambda text: load_mixture(text, None)):
            with pytest.raises(DataError) as caught:
                read(text)
            assert str(caught.value) == sentence
    subprocess.run(["ln", "-s", "a,b", "ab"], check=True)
    assert len(load_mixture("x/c.jsonl,ab/c.jsonl", None)) == 2
