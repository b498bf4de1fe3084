"""Data sets of every format come back as they were written, and every mistake is one sentence that names it."""

import csv
import json
import pickle
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from togi.data.items import parse_item
from togi.data.precheck import check_source, check_sources, parse_probs
from togi.data.source import concatenate, interleave, load_mixture, load_source, proportional_shares
from togi.data.tables import BadRow
from togi.errors import DataError

ROWS = [{"input": "1+1", "label": "2"}, {"input": 'Ü, "x"\n?', "label": "y"}, {"input": "", "label": "z"}]
INPUT = {"input_key": "input"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path, rows, new=pyarrow.ipc.new_stream):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "lines.json": lambda path: write_jsonl(path, ROWS),
    "bom.json": lambda path: path.write_text("\ufeff " + json.dumps(ROWS), encoding="utf-8"),
    "a.jsonl": lambda path: write_jsonl(path, ROWS),
    "UPPER.JSONL": lambda path: write_jsonl(path, ROWS),
    "a.csv": lambda path: write_csv(path, ROWS),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "stream.arrow": lambda path: write_arrow(path, ROWS),
    "file.arrow": lambda path: write_arrow(path, ROWS, pyarrow.ipc.new_file),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "folder": lambda path: write_jsonl(path / "part.jsonl", ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_round_trips(tmp_path, name):
    WRITERS[name](tmp_path / name)
    source = load_source(str(tmp_path / name))
    assert len(source.rows) == 3
    assert source.rows.fetch([0, 1, 2]) == ROWS
    assert source.rows.fetch([2, 0]) == [ROWS[2], ROWS[0]]
    copy = pickle.loads(pickle.dumps(source.rows))  # as for other processes
    assert copy.fetch([1, 2]) == ROWS[1:] and [copy.place(i) for i in range(3)] == [
        source.rows.place(i) for i in range(3)
    ]
    assert load_source(str(tmp_path / name)).rows.digest() == copy.digest()
    check_source(str(tmp_path / name), {"input_key": "input", "label_key": "label"})
    with pytest.raises(
        DataError, match="has no field 'lable'; it has 'input', 'label': did you mean --label_key label"
    ):
        check_source(str(tmp_path / name), {"label_key": "lable"})


def test_json_values_are_not_unified(tmp_path):
    rows = [{"label": {"a": 1}}, {"label": {"b": [2]}}, {"label": 3, "extra": None}]
    assert load_source(str(write_jsonl(tmp_path / "x.jsonl", rows))).rows.fetch([0, 1, 2]) == rows


def test_csv_cells_are_text(tmp_path):
    (tmp_path / "x.csv").write_text("input,label\na,007\nNA,\n")
    assert load_source(str(tmp_path / "x.csv")).rows.fetch([0, 1]) == [
        {"input": "a", "label": "007"},
        {"input": "NA", "label": ""},
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_other_rows_have_another_digest(tmp_path, name, monkeypatch):
    WRITERS[name](tmp_path / name)
    digest = load_source(str(tmp_path / name)).rows.digest()
    monkeypatch.setitem(ROWS[1], "label", "Y")
    (tmp_path / "new").mkdir()
    WRITERS[name](tmp_path / "new" / name)
    assert load_source(str(tmp_path / "new" / name)).rows.digest() != digest


def test_files_of_a_folder_follow_each_other(tmp_path):
    write_jsonl(tmp_path / "f" / "a.jsonl", ROWS[:2])
    (tmp_path / "f" / "b.jsonl").write_text("")
    write_jsonl(tmp_path / "f" / "c.jsonl", ROWS[2:])
    rows = load_source(str(tmp_path / "f")).rows
    assert len(rows) == 3 and rows.fetch([2, 0, 1, 2]) == [ROWS[2], *ROWS]
    assert [rows.place(i) for i in (1, 2)] == [f"Line 2 of {tmp_path}/f/a.jsonl", f"Line 1 of {tmp_path}/f/c.jsonl"]


def test_splits_of_folders_and_saved_sets(tmp_path):
    for name, rows in {"train-00000-of-00002": ROWS[:1], "train-00001-of-00002": ROWS[1:], "my_test": ROWS[:2]}.items():
        write_jsonl(tmp_path / "f" / "data" / f"{name}.jsonl", rows)
    train, test = dict(enumerate(ROWS)), dict(enumerate(ROWS[:2]))
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2])
    ).save_to_disk(tmp_path / "s")
    for item in (f"{tmp_path}/f", f"{tmp_path}/f@data", f"{tmp_path}/s"):
        for split, rows in {"train": train, "test": test}.items():
            source = load_source(item, split)
            assert dict(enumerate(source.rows.fetch(range(len(source.rows))))) == rows
            check_source(item, INPUT, split)
        for load in (
            lambda item=item: load_source(item, "dev"),
            lambda item=item: check_source(item, INPUT, "dev"),
        ):
            with pytest.raises(DataError, match=r"has no split 'dev': choose one of '.*', '.*'"):
                load()


def test_folder_mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "mixed" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "mixed" / "more.jsonl", ROWS)
    write_jsonl(tmp_path / "formats" / "a.jsonl", ROWS)
    write_csv(tmp_path / "formats" / "b.csv", ROWS)
    for name, message in {
        "empty": "has no data files",
        "mixed": "more.jsonl names no split",
        "formats": "mixes the formats .csv, .jsonl",
        "empty@sub": "There is no folder",
    }.items():
        with pytest.raises(DataError, match=message):
            load_source(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"input": 1},\n{"input" 2}]', r"^Line 2 of .*a\.json is not valid JSON"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.csv", "input\n", "has no rows"),
        ("a.csv", 'input,label\na,b\n"c,d\ne,f\n', r"^Line 3 of .*a\.csv is not valid CSV \(unexpected end of data"),
        ("a.csv", "input,input\na,b\n", "two columns of the name 'input'"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.arrow", "no arrow", "cannot be read"),
        ("a.txt", "text", "unknown extension .txt"),
        ("a.py", "1/0", "loading script, which Togi never runs"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    for load in (load_source, lambda item: check_source(item, INPUT)):
        with pytest.raises(DataError, match=message) as caught:
            load(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [1, 5000])
def test_a_value_of_a_list_that_python_cannot_hold(tmp_path, rows):
    """Also beyond the head of the file that the first checks read."""
    good = ",".join(['{"input": "some text"}'] * rows)
    digits = "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"
    for value, reason in (("9" * 5000, digits), ("[" * 200_000 + "]" * 200_000, "maximum recursion depth exceeded")):
        (tmp_path / "a.json").write_text(f'[{good},\n{{"input": {value}}}]')
        with pytest.raises(DataError) as error:
            load_source(str(tmp_path / "a.json"))
        assert str(error.value).startswith(f"Line 2 of {tmp_path}/a.json is not valid JSON ({reason}")
        assert str(error.value).endswith("): repair or remove it.")
        if rows == 1:
            with pytest.raises(DataError, match=r"^Line 2 of .*a.json is not valid JSON"):
                check_source(str(tmp_path / "a.json"), INPUT)


@pytest.mark.parametrize(
    "text", ['[{"input": 1},]', '[{"input": 1} {"input": 2}]', '[{"input": 1}] x', '[{"input": 1}']
)
def test_a_list_that_is_no_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"^Line 1 of .*a.json is not valid JSON"):
        load_source(str(tmp_path / "a.json"))


BAD = [
    # JSONL: blank lines count as lines of the file, not as rows
    ("a.jsonl", b'{"input": 1}\n\n{"input": \n{"input": 2}', "Line 3 of {} is not valid JSON (Expecting value)"),
    ("a.jsonl", b'{"input": 1}\n  \n\n[1]\n{"input": 2}\n', "Line 4 of {} is of type list, not an object"),
    (
        "a.jsonl",
        b'{"input": 1}\n{"input": "\xff"}\n \t{"input": 2} \n',
        "Line 2 of {} is not UTF-8 text (invalid start",
    ),
    ("a.jsonl", b'\xef\xbb\xbf{"input": 1}\r\n{"input"}\r\n{"input": 2}\r\n', "Line 2 of {} is not valid JSON"),
    ("a.json", b'{"input": 1}\nnull\n{"input": 2}', "Line 2 of {} is of type NoneType"),
    ("a.json", b' [{"input": 1} , 7,\n{"input": 2}]\n', "Item 1 of the list in {} is of type int, not an object"),
    # CSV: a record may go over lines, and is called by its first
    ("a.csv", b'input,label\n1,"x\ny"\n\n3\n2,z\n', "Line 5 of {} has 1 cells but the first line names 2 columns"),
    ("a.csv", b'input,label\r\n1,b\r\n"a"b,c\r\n2,z', "Line 3 of {} is not valid CSV (',' expected after '\"')"),
    ("a.csv", b"\xef\xbb\xbfinput,label\n1,b\n\xff,c\n2,z\n", "Line 3 of {} is not UTF-8 text"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_bad_row_stands_in_its_place_and_the_others_can_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    rows = load_source(str(path)).rows
    first, bad, last = rows.fetch([0, 1, 2])
    assert len(rows) == 3 and (str(first["input"]), str(last["input"])) == ("1", "2")
    sentence = f"{rows.place(1)} {bad.reason}"
    assert sentence.startswith(message.format(path))
    assert [type(row) for row in rows.fetch([2, 1])] == [dict, BadRow]
    check_source(str(path), INPUT, every_row=False)
    with pytest.raises(DataError) as caught:
        check_source(str(path), INPUT)
    assert str(caught.value) == sentence


def test_precheck_leaves_single_rows_to_be_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"p": 1}, {"input": 1}])
    check_source(str(path), INPUT, every_row=False)
    with pytest.raises(
        DataError, match=r"^Line 1 of .*a.jsonl has no field 'inputs'.*did you mean --input_key input\?"
    ):
        check_source(str(write_jsonl(path, [{"input": 1}, {"p": 1}])), {"input_key": "inputs"}, every_row=False)
    path.write_text('{"broken\n[]\n')
    with pytest.raises(DataError, match=r"^Line 1 of .*a.jsonl is not valid JSON"):
        check_source(str(path), INPUT, every_row=False)


def test_blank_lines_are_no_rows(tmp_path):
    rows = [{"input": "x" * n} for n in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" * (1 + row["input"].count("x") % 3) for row in rows))
    found = load_source(str(path)).rows
    assert found.fetch(range(40)) == rows
    lines = [number for number, line in enumerate(path.read_text().split("\n"), start=1) if line]
    assert [found.place(i) for i in range(40)] == [f"Line {line} of {path}" for line in lines]


@pytest.mark.parametrize("item", ["no/such/file.jsonl", "./nothing", "/nothing", "a/b/c", "two words"])
def test_missing_local_data(item):
    for load in (load_source, lambda item: check_source(item, {})):
        with pytest.raises(DataError, match="There is no file or folder"):
            load(item)


@pytest.mark.parametrize(
    ("name", "column", "shown"),
    [
        ("a.parquet", pyarrow.array([[("k", "v")]], pyarrow.map_(pyarrow.string(), pyarrow.string())), "map<"),
        ("a.arrow", pyarrow.array([b"0" * 16], pyarrow.uuid()), "extension<arrow.uuid>"),
        ("a.arrow", pyarrow.array([pyarrow.MonthDayNano([1, 2, 3])]), "month_day_nano_interval"),
    ],
)
def test_a_column_of_a_type_that_datasets_does_not_know(tmp_path, name, column, shown):
    table, path = pyarrow.table({"input": ["x"], "meta": column}), tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError) as caught:
        load_source(str(path))
    assert f"{path} has the column 'meta' of the type {shown}" in str(caught.value)


def test_tables_of_a_folder_with_other_columns(tmp_path):
    """And what the message advises: each as a set of its own."""
    for number, more in enumerate(({}, {"more": 1})):
        table = pyarrow.Table.from_pylist([{"input": "x", **more}])
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
    with pytest.raises(DataError, match=r"0\.parquet and .*1\.parquet have different columns or types.*give each as"):
        load_source(str(tmp_path))
    assert len(load_mixture(f"{tmp_path / '0.parquet'},{tmp_path / '1.parquet'}", None)) == 2


def test_a_cache_of_tables_that_cannot_be_written(tmp_path, monkeypatch):
    WRITERS["a.parquet"](tmp_path / "a.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "a.parquet" / "cache")
    with pytest.raises(DataError, match=r"The Hugging Face cache .*/a.parquet/cache cannot be written .* set HF_HOME"):
        load_source(str(tmp_path / "a.parquet"))


def test_hub_name_offline(monkeypatch):
    check_source("owner/name@sub", INPUT)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="owner/name is neither a local file or folder nor a hub data set") as caught:
        load_source("owner/name")
    assert "\n" not in str(caught.value)


def test_items(tmp_path):
    path = write_jsonl(tmp_path / "a@b.jsonl", ROWS)
    assert parse_item(f" {path} ").path == path
    assert (parse_item("owner/set@sub").location, parse_item("owner/set@sub").data_dir) == ("owner/set", "sub")
    with pytest.raises(DataError, match="remove @x"):
        parse_item(f"{path}@x")
    with pytest.raises(DataError, match="empty entry"):
        check_sources(f"{path},", INPUT)


def test_precheck_names_the_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": 1}, {"p": 1}])
    with pytest.raises(
        DataError, match=r"^Line 2 of .*a.jsonl has no field 'q'; it has 'p': set --input_key to one of these"
    ):
        check_source(str(path), {"input_key": "q"})


def test_precheck_reads_only_the_head_of_a_large_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join(json.dumps({"input": "x" * 300_000}) for _ in range(8)) + ', {"broken')
    check_source(str(path), INPUT)
    path.write_text("[" + json.dumps({"input": "x" * 5_000_000}) + "]")
    check_source(str(path), INPUT)
    with pytest.raises(DataError, match="no field 'label'"):
        check_source(str(path), {"label_key": "label"})


def test_precheck_imports_nothing_heavy(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    code = (
        "import sys; from togi.data.precheck import check_source; check_source(sys.argv[1], {'input_key': 'input'});"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_probabilities():
    assert parse_probs("0.25,0.75", 2) == [0.25, 0.75]
    assert sum(parse_probs("0.333,0.333,0.333", 3)) == pytest.approx(1)
    for text, message in {
        "1": "1 numbers for 2 data sets",
        "0.5,0.4": "sum to 0.9",
        "1.5,-0.5": "must all be positive",
        "nan,1": "must all be positive",
        "a,b": "must be comma-separated numbers",
    }.items():
        with pytest.raises(DataError, match=message):
            parse_probs(text, 2)


def test_concatenation_shares_max_samples():
    assert proportional_shares([6, 3, 1], 10) == [6, 3, 1]
    assert proportional_shares([60, 30, 10], 10) == [6, 3, 1]
    assert proportional_shares([5, 5, 5], 4) == [2, 1, 1]
    assert proportional_shares([1000, 1], 10) == [9, 1]
    assert proportional_shares([1000, 1, 1], 2) == [2, 0, 0]
    assert concatenate([2, 4], 3).tolist() == [[0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize(("sizes", "probs", "seed"), [([3, 7], [0.5, 0.5], 1), ([900, 40, 1200], [0.2, 0.1, 0.7], 42)])
def test_interleave_equals_datasets(sizes, probs, seed):
    sets = [datasets.Dataset.from_list([{"s": s, "r": r} for r in range(size)]) for s, size in enumerate(sizes)]
    expected = datasets.interleave_datasets(sets, probs, seed=seed, stopping_strategy="all_exhausted")
    places = interleave(sizes, probs, seed, 10**8)
    assert places.tolist() == [[row["s"], row["r"]] for row in expected]
    assert interleave(sizes, probs, seed, 5).tolist() == places[:5].tolist()


def test_mixture_of_sets_with_different_columns(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"input": "a", "label": 1}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"input": "b", "label": {"x": []}}, {"input": "c", "label": None}])
    plain = load_mixture(f"{a},{b}", None)
    assert [pick.id for pick in plain.picks] == ["0:0", "1:0", "1:1"]
    mixed = load_mixture(f"{a},{b}", "0.9,0.1", seed=0)
    ids = [pick.id for pick in mixed.picks]
    assert len(set(ids)) == len(ids)
    repeats = sum(pick.source == 0 for pick in mixed.picks)
    assert [i for i in ids if i.startswith("0:")] == ["0:0", *(f"0:0#{n}" for n in range(1, repeats))]
    assert mixed.rows_used(0) == range(1) and mixed.rows_used(1) == range(2)
    with pytest.raises(DataError, match="for 2 data sets"):
        load_mixture(f"{a},{b}", "1.0")
