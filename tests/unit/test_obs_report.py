"""The page stands alone, shows what was stored, and nothing a model wrote can act in it."""

import json
import math
import re
import tomllib
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import pytest

from tests.run_rows import ARGV, KEY, VALUES, row
from togi.errors import DataError
from togi.obs import names
from togi.obs.metrics import StepRecord
from togi.obs.report import Limits, chart_table, spread_order, write_report
from togi.obs.rollout_store import Split
from togi.obs.run_dir import HeldOutRow, Resolved, RunDirectory, write_held_out
from togi.obs.sinks import Recorder

PACKAGE = Path(__file__).parents[2] / "togi"
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- \u2028 & @@DATA@@"


class Page(HTMLParser):
    """Collects every element, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._in_script = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data


@pytest.fixture
def run(tmp_path):
    run = RunDirectory.create(tmp_path / "<b>run", "train_ppo_ray", ARGV, VALUES)
    recorder = Recorder(run.metrics_path, [])
    for step in range(1, 5):
        values = {names.REWARD_MEAN: step / 4, names.KL_REFERENCE: math.nan if step == 2 else 0.5, "my/own": 1.0}
        if step == 4:
            values |= {names.EVAL_REWARD: 0.5, names.EVAL_REWARD_STDERR: 0.125}
        recorder.write(StepRecord(step, values, {"generate": 2.0, "train": 1.0}))
        run.rollouts.write(step, Split.TRAIN, [row(index, text=ATTACK) for index in range(6)])
    recorder.close()
    return run


def page_of(run, limits=None):
    text = write_report(run.root, limits).read_text()
    page = Page(text)
    return text, page, json.loads(page.scripts[0])


def test_the_page_loads_nothing_and_forbids_connections(run):
    text, page, _ = page_of(run)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    (policy,) = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert 4e6 < len(text) < 6e6


def test_what_a_model_wrote_cannot_leave_its_place(run):
    text, page, data = page_of(run)
    assert len(page.scripts) == 3
    assert "alert(1)</script>" not in text
    assert "\u2028" not in page.scripts[0]
    assert data["rollouts"][0]["rows"][0]["response"] == ATTACK
    assert page.scripts[2].count("innerHTML") == 0 and "insertAdjacentHTML" not in page.scripts[2]
    assert "<b>" not in text[: text.index("<style>")]


def test_rows_of_the_data_and_of_evaluations_are_on_the_page_as_text(run):
    (run.root / "data").mkdir()
    (run.root / "data" / "train.json").write_text(json.dumps({"title": ATTACK, "examples": [ATTACK, "x" * 50]}))
    pair = HeldOutRow("worst", "reward", (ATTACK, "b"), (-0.25, math.nan))
    for step in (0, 2, 4):
        write_held_out(run.root, step, [pair, HeldOutRow("best", "reward", ("c", "d"), (1.0, 0.5))])
    text, page, data = page_of(run, Limits(text_characters=40, evaluations=2))
    assert len(page.scripts) == 3 and "alert(1)</script>" not in text
    cut = f"{ATTACK[:40]} […]"
    assert data["examples"] == [{"title": ATTACK, "texts": [cut, "x" * 40 + " […]"]}]
    assert [part["step"] for part in data["held_out"]] == [0, 4]
    assert data["held_out"][1]["rows"] == [
        {"place": "worst", "number": "reward", "texts": [cut, "b"], "values": [-0.25, None]},
        {"place": "best", "number": "reward", "texts": ["c", "d"], "values": [1.0, 0.5]},
    ]


def test_a_broken_file_is_named_and_left_out(run, caplog):
    """Such as one that an older version was killed in."""
    write_held_out(run.root, 2, [HeldOutRow("best", "reward", ("c", "d"), (1.0, 0.5))])
    (run.root / "data").mkdir()
    broken = [run.root / "data" / "train.json", run.root / "held_out" / "step_00000001.json"]
    for path in broken:
        path.write_text('[{"place": "wor')
    run.status_path.write_text("")
    _, _, data = page_of(run)
    assert data["examples"] == [] and [part["step"] for part in data["held_out"]] == [2]
    assert data["state"]["name"] == "failed" and f"{run.status_path} cannot be read" in data["state"]["message"]
    for path in broken:
        assert f"{path} cannot be read and is left out" in caplog.text


def test_the_page_holds_the_curves_and_the_rollouts(run):
    _, _, data = page_of(run)
    assert data["steps"] == [1, 2, 3, 4]
    assert data["series"][names.REWARD_MEAN] == [0.25, 0.5, 0.75, 1.0]
    assert data["series"][names.KL_REFERENCE] == [0.5, None, 0.5, 0.5]
    assert data["series"][names.EVAL_REWARD_STDERR] == [None, None, None, 0.125]
    charts = {chart["title"]: chart["names"] for chart in data["charts"]}
    assert charts["Reward"] == [names.REWARD_MEAN, names.EVAL_REWARD]
    assert charts["Time by phase"] == ["time/generate", "time/train"]
    assert set(data["explain"]) == set(data["series"])
    assert data["headlines"][0] == {"name": names.REWARD_MEAN, "first": 0.25, "last": 1.0}
    shown = data["rollouts"][3]["rows"][5]
    # advantages 1.5, 0.0, 1.5 with the middle token not the policy's: mean 1.5, not 1.0
    assert (shown["index"], shown["reward"], shown["tokens"], shown["advantage"]) == (5, 0.1, 2, 1.5)
    assert shown["components"] == {"format": 1.0, "correct": -0.1}
    assert data["notes"] == []


def test_no_secret_reaches_the_page(run):
    text, _, data = page_of(run)
    assert KEY not in text and "secret-word" not in text
    assert ["use_wandb", "<redacted>", "command line"] in data["config"]


def test_what_is_left_out_is_said(run):
    run.rollouts.write(9, Split.EVAL, [row(text="x" * 5000)])
    _, _, data = page_of(run, Limits(points=2, rollouts_per_step=4, text_characters=100, rollout_bytes=2500))
    assert data["steps"] == [1, 3, 4]
    shown = [part["step"] for part in data["rollouts"]]
    assert shown[0] == 1 and shown[-1] == 9 and len(shown) < 5
    assert all(len(part["rows"]) <= 4 for part in data["rollouts"])
    notes = " ".join(data["notes"])
    assert f"Rollouts of {len(shown)} of 5 files" in notes
    assert "At most 4 rollouts" in notes and "1 texts are cut after 100 characters" in notes
    assert "3 of 4 steps" in notes


# One prompt a step, two slots. Prompt 1 is filtered out; a kill at 114 ends the work on prompt 3, which then starts again.
LEDGER = [
    (100, "queued", [0, 1], {}),
    (101, "running", [0], {}),
    (102, "running", [1], {}),
    (105, "done", [0], {"generated": 104, "versions": [0, 0], "lengths": [3, 5]}),
    (105, "trained", [0], {"step": 1, "version": 0}),
    (107, "published", [], {"version": 1}),
    (107, "queued", [2], {}),
    (108, "running", [2], {}),
    (109, "filtered", [1], {"generated": 108.5, "versions": [0, 1], "lengths": [7, 7]}),
    (109, "queued", [3], {}),
    (110, "running", [3], {}),
    (111, "done", [2], {"stored": True, "versions": [1, 1], "lengths": [4, 2]}),
    (112, "trained", [2], {"step": 2, "version": 1}),
    (114, "published", [], {"version": 2}),
    (120, "resumed", [], {"version": 2}),
    (121, "queued", [3], {}),
    (123, "running", [3], {}),
    (126, "checkpoint", [], {"version": 2}),
]
OF_0, OF_1, OF_2, OF_3 = "prompt 0", "prompt 1", "prompt 2", "prompt 3"
DONE_0, DONE_1, DONE_2 = (
    f"{OF_0}, versions 0 to 0, at most 5 tokens",
    f"{OF_1}, versions 0 to 1, at most 7 tokens",
    f"{OF_2}, versions 1 to 1, at most 4 tokens",
)
SPANS = [
    ["queued", 0, 0, 1, OF_0],
    ["queued", 1, 0, 2, OF_1],
    ["generating", 0, 1, 4, DONE_0],
    ["rewards", 0, 4, 5, DONE_0],
    ["waiting", -1, 0.5, 5, "step 1"],  # 4.5 seconds, as measured
    ["training", 0, 5, 7, DONE_0],
    ["training", -1, 5, 7, "step 1"],
    ["queued", 0, 7, 8, OF_2],  # in the slot of prompt 0
    ["generating", 1, 2, 8.5, DONE_1],
    ["rewards", 1, 8.5, 9, DONE_1],
    ["queued", 1, 9, 10, OF_3],  # in the slot of prompt 1
    ["generating", 0, 8, 11, DONE_2],
    ["ready", 0, 11, 12, DONE_2],
    ["waiting", -1, 7, 12, "step 2"],  # at most since the last version
    ["training", 0, 12, 14, DONE_2],
    ["training", -1, 12, 14, "step 2"],
    ["generating", 1, 10, 14, OF_3],
    ["queued", 0, 21, 23, OF_3],
    ["generating", 0, 23, 26, OF_3],
]


def ledger_lines():
    return [json.dumps({"time": at, "event": event, "prompts": n, **facts}) for at, event, n, facts in LEDGER]


def asynchronous(folder, staleness=1):
    run = RunDirectory.create(folder, "rl", ARGV, VALUES | {"max_staleness": Resolved(staleness, "command line")})
    recorder = Recorder(run.metrics_path, [])
    for step, waited in ((1, 4.5), (2, 60.0)):
        recorder.write(StepRecord(step, {names.STALENESS_LENGTH: 0.5}, {"generating": waited, "syncing weights": 1.0}))
    recorder.close()
    return run


def test_slots_and_trainer_of_an_asynchronous_run_are_drawn(tmp_path):
    run = asynchronous(tmp_path / "run")
    run.ledger_path.write_text("\n".join(ledger_lines()) + "\n")
    _, page, data = page_of(run)
    assert sorted(data["gantt"]["spans"]) == sorted(SPANS)
    assert data["gantt"]["lines"] == [[7, "version 1"], [14, "version 2"], [20, "resumed at version 2"]]
    assert data["gantt"]["left"] == [[9, 1, "prompt 1 filtered"]]
    assert {kind for kind, *_ in SPANS} == set(re.findall(r'\["(\w+)", "#\w+"\]', page.scripts[2]))
    assert [c["title"] for c in data["charts"] if "length" in c["title"]] == ["Trained length over offered length"]


def test_only_the_last_steps_are_drawn(tmp_path):
    """From the line before the last two; the times of what began earlier are cut."""
    run = asynchronous(tmp_path / "run")
    run.ledger_path.write_text("\n".join(ledger_lines()))
    _, _, data = page_of(run, Limits(gantt_steps=2))
    later = [[kind, row, max(since - 7, 0), end - 7, text] for kind, row, since, end, text in SPANS if end > 7]
    assert sorted(data["gantt"]["spans"]) == sorted(later)
    assert data["gantt"]["lines"] == [[7, "version 2"], [13, "resumed at version 2"]]
    # Two spans: those after the last but two, which ended at 14.
    _, _, data = page_of(run, Limits(gantt_spans=2))
    assert data["gantt"]["spans"] == [["queued", 0, 7, 9, OF_3], ["generating", 0, 9, 12, OF_3]]
    # From the middle of a line on: what was queued before is not known.
    size = sum(len(line) + 1 for line in ledger_lines()[-4:])
    _, _, data = page_of(run, Limits(ledger_bytes=size + 20))
    assert data["gantt"]["spans"] == [["queued", 0, 0, 2, OF_3], ["generating", 0, 2, 5, OF_3]]


def test_a_broken_ledger_breaks_no_page(tmp_path):
    run = asynchronous(tmp_path / "run")
    assert page_of(run)[2]["gantt"] is None
    run.ledger_path.write_bytes(b"\xff\x00 no JSON\n")
    assert page_of(run)[2]["gantt"] is None
    strange = ['{"time": 106, "event": "don', "[]", "3", '{"time": "soon", "event": "done", "prompts": [0]}']
    strange += ['{"time": 106, "event": "done", "prompts": [0], "generated": "x"}', '{"time": 106, "event": "done"}']
    strange += ['{"time": 106, "event": "queued", "prompts": [[1]]}', '{"time": 1e999, "event": "no", "prompts": []}']
    lines = ledger_lines()
    run.ledger_path.write_text("\n".join([*lines[:5], *strange, *lines[5:]]) + '\n{"ti')
    assert sorted(page_of(run)[2]["gantt"]["spans"]) == sorted(SPANS)
    run.ledger_path.unlink()
    run.ledger_path.mkdir()
    assert page_of(run)[2]["gantt"] is None


def test_a_synchronous_run_has_no_slots_to_draw(tmp_path):
    run = asynchronous(tmp_path / "run", staleness=0)
    run.ledger_path.write_text("\n".join(ledger_lines()))
    assert page_of(run)[2]["gantt"] is None


def test_the_order_of_steps_spreads_from_the_ends():
    assert list(spread_order(0)) == []
    assert list(spread_order(1)) == [0]
    assert list(spread_order(9)) == [8, 0, 4, 2, 6, 1, 3, 5, 7]
    assert sorted(spread_order(100)) == list(range(100))
    assert list(islice(spread_order(1001), 5)) == [1000, 0, 500, 250, 750]


def test_a_run_that_has_only_begun_has_a_page_and_another_folder_has_none(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "train_sft", ARGV, VALUES)
    _, _, data = page_of(run)
    assert (data["steps"], data["rollouts"], data["charts"]) == ([], [], [])
    with pytest.raises(DataError, match="is not the folder of a run"):
        write_report(tmp_path)


def test_the_table_of_charts_knows_its_kinds():
    assert {chart.get("kind", "lines") for chart in chart_table()["charts"]} == {"lines", "log lines", "stacked"}


def test_a_wheel_holds_every_file_that_is_no_python():
    patterns = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "togi"
    ]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    every = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert every == packed
    assert PACKAGE / "obs/page/report.js" in packed
