"""``report.html``: one page with a run's curves and rollouts, which needs no network and no server.

``write_report`` reads only the run directory, so the page can be refreshed during a run or made long after it. All data
are embedded as JSON and shown as text by the page's script, so nothing a model wrote can act as HTML. Markup, style,
script and the table of charts are files in ``page/``.
"""

import json
import math
import secrets
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from heapq import heappop, heappush
from itertools import compress, islice
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from jinja2.utils import htmlsafe_json_dumps

from togi.obs import names
from togi.obs.metrics import StepRecord, all_values, read_records
from togi.obs.rollout_store import RolloutStore, Row
from togi.obs.run_dir import RunDirectory, RunInfo, State, Status, read_data_reports, read_held_out
from togi.obs.way_out import left_out, tolerated, way_out, write_atomically


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a page. ``text_characters``: of one prompt or response; ``rollout_bytes``: of all rollouts.

    The picture of an asynchronous run has the last ``gantt_steps`` in at most ``gantt_spans`` spans, from the last
    ``ledger_bytes`` of the ledger.
    """

    points: int = 2000
    rollouts_per_step: int = 64
    text_characters: int = 8000
    rollout_bytes: int = 8_000_000
    evaluations: int = 24
    gantt_steps: int = 12
    gantt_spans: int = 6000
    ledger_bytes: int = 4_000_000


_COLUMNS = (
    *("group_id", "sample_index", "datasource", "prompt_text", "response_text", "label", "response_mask", "reward"),
    *(
        "components",
        "advantages",
        "outcome",
        "finish_reason",
        "policy_version",
        "filtered",
        "messages",
        "counts",
        "forks",
    ),
)


def write_report(root: Path, limits: Limits | None = None) -> Path:
    """Write (or refresh, atomically) ``report.html`` of the run in ``root`` and return its path.

    About 5 MB, most of it the plotting library. Raises ``DataError`` if the folder holds no run.
    """
    from plotly.offline import get_plotlyjs

    run = RunDirectory(root)
    template = Environment(loader=PackageLoader("togi.obs", "page"), autoescape=True).get_template("report.html.j2")
    text = template.render(
        title=f"Togi: {root.resolve().name}",
        nonce=secrets.token_urlsafe(16),
        style=names.part_of_page("report.css"),
        script=names.part_of_page("report.js"),
        plotly=get_plotlyjs(),
        data=_embedded(_page_data(run, limits or Limits())),
    )
    write_atomically(run.report_path, text)
    return run.report_path


def chart_table() -> dict[str, Any]:
    """``page/charts.yaml``: names of headlines, and charts with a title, patterns of the metrics, a unit and a kind."""
    return dict(yaml.safe_load(names.part_of_page("charts.yaml")))


def _page_data(run: RunDirectory, limits: Limits) -> dict[str, object]:
    info, status = run.read_info(), run.read_status()
    records = read_records(run.metrics_path)
    # Thin first: everything below is made of the steps that are shown.
    shown = _thinned(records, limits.points)
    table = chart_table()
    series = _series(shown)
    rollouts, notes = _rollouts(run.rollouts, limits)
    if len(shown) < len(records):
        notes.append(f"The curves show {len(shown)} of {len(records)} steps, evenly chosen; all are in metrics.jsonl.")
    return {
        "facts": _facts(run, info, status, records),
        "state": {"name": status.state, "message": status.message},
        "failure": run.failure_path.read_text(encoding="utf-8") if run.failure_path.is_file() else "",
        "headlines": [{"name": name, **_ends(series[name])} for name in table["headlines"] if name in series],
        "steps": [record.step for record in shown],
        "series": series,
        "charts": _charts(table["charts"], series),
        "gantt": _gantt(run, info, records, limits),
        "explain": {name: names.explain(name) for name in series},
        "rollouts": rollouts,
        "examples": _examples(run.root, limits),
        "held_out": _held_out(run.root, limits),
        "notes": notes,
        "config": [[name, _short(item["value"]), item["source"]] for name, item in info.values.items()],
    }


def _examples(root: Path, limits: Limits) -> list[dict[str, object]]:
    """The examples of the data reports, by set."""
    parts = []
    for report in read_data_reports(root).values():
        texts = [_cut(text, limits.text_characters) for text in report["examples"]]
        parts.append({"title": report["title"], "texts": texts})
    return parts


def _held_out(root: Path, limits: Limits) -> list[dict[str, object]]:
    """The held-out rows of evaluations, by step, evenly chosen."""
    rows = read_held_out(root)
    steps = sorted(list(rows)[index] for index in islice(spread_order(len(rows)), limits.evaluations))
    return [
        {
            "step": step,
            "rows": [
                asdict(row)
                | {
                    "texts": [_cut(text, limits.text_characters) for text in row.texts],
                    "values": [_number(value) for value in row.values],
                }
                for row in rows[step]
            ],
        }
        for step in steps
    ]


def _facts(run: RunDirectory, info: RunInfo, status: Status, records: Sequence[StepRecord]) -> list[list[str]]:
    """Label and text of each line at the top. Times are sent as "@seconds" and shown in the reader's time zone."""
    model = info.values.get("pretrain", {"value": ""})["value"]
    tokens = [record.values[names.TOKENS_SEEN] for record in records if names.TOKENS_SEEN in record.values]
    facts = [
        ["Command", f"togi {info.command}"],
        ["Model", str(model or "")],
        ["Started", f"@{info.started:.0f}"],
        ["Last change", f"@{status.updated:.0f}"],
        ["Steps", str(records[-1].step) if records else "0"],
        ["Time in phases", f"{sum(sum(record.seconds.values()) for record in records) / 60:.1f} min"],
        ["Tokens trained", f"{tokens[-1]:,.0f}" if tokens else ""],
        ["Rollouts on disk", f"{run.rollouts.nbytes / 1e6:.1f} MB"],
        ["Togi", f"{info.togi_version} on {info.host}"],
    ]
    return [fact for fact in facts if fact[1]]


def _ends(values: Sequence[float | None]) -> dict[str, float]:
    """The first and the last measured value, if there is one."""
    measured = [value for value in values if value is not None]
    return {"first": measured[0], "last": measured[-1]} if measured else {}


def _thinned(records: Sequence[StepRecord], limit: int) -> list[StepRecord]:
    """At most about ``limit`` records: every k-th, every one with an evaluation, and the last."""
    every = max(1, math.ceil(len(records) / limit))
    last = len(records) - 1
    return [
        record
        for index, record in enumerate(records)
        if index % every == 0 or index == last or any(name.startswith("eval/") for name in record.values)
    ]


def _series(records: Sequence[StepRecord]) -> dict[str, list[float | None]]:
    """Values by metric, one per record; None if not measured or not finite."""
    rows = [all_values(record) for record in records]
    found = dict.fromkeys(name for row in rows for name in row)
    return {name: [_number(row.get(name, math.nan)) for row in rows] for name in found}


def _charts(table: Sequence[Mapping[str, Any]], series: Mapping[str, object]) -> list[dict[str, object]]:
    """The charts of ``charts.yaml`` that have data, and one for each metric of a single method."""
    left = [name for name in series if not name.endswith("_stderr")]
    charts: list[dict[str, object]] = []
    for chart in table:
        # The first chart that matches a metric takes it.
        drawn = [name for name in left if any(fnmatchcase(name, pattern) for pattern in chart["metrics"])]
        left = [name for name in left if name not in drawn]
        if drawn:
            kind = chart.get("kind", "lines")
            charts.append({"title": chart["title"], "unit": chart.get("unit", ""), "kind": kind, "names": drawn})
    for own in names.OF_METHODS:
        if drawn := [name for name in left if name in (own, f"eval/{own}")]:
            charts.append({"title": own.replace("_", " "), "unit": "", "kind": "lines", "names": drawn})
    return charts


def _rollouts(store: RolloutStore, limits: Limits) -> tuple[list[dict[str, object]], list[str]]:
    """The rollouts to embed, by step, and notes on those that are left out."""
    files = store.files()
    chosen: dict[int, dict[str, object]] = {}
    size = cut = 0
    # From a spread order, so that wherever the page is full, its steps cover the whole run.
    for index in spread_order(len(files)):
        file = files[index]
        records = store.read_columns(file, _COLUMNS, limits.rollouts_per_step)
        rows = [_shown(record, limits.text_characters) for record in records]
        part = {"step": file.step, "split": file.split, "total": store.count(file), "rows": rows}
        size += len(_embedded(part))
        if chosen and size > limits.rollout_bytes:
            break
        chosen[index] = part
        texts = [text for record in records for text in (record["prompt_text"], record["response_text"])]
        cut += sum(len(text) > limits.text_characters for text in texts)
    # Say what is missing.
    notes = []
    if len(chosen) < len(files):
        notes.append(
            f"Rollouts of {len(chosen)} of {len(files)} files are on this page, evenly chosen to keep it small."
        )
    if any(store.count(files[index]) > limits.rollouts_per_step for index in chosen):
        notes.append(f"At most {limits.rollouts_per_step} rollouts of a step are shown.")
    if cut:
        notes.append(f"{cut} texts are cut after {limits.text_characters} characters.")
    if notes:
        notes.append("All rollouts, whole, are in the folder rollouts/ of the run.")
    return [chosen[index] for index in sorted(chosen)], notes


def _shown(row: Row, characters: int) -> dict[str, object]:
    """One row of the page's table."""
    return {
        "group": row["group_id"],
        "index": row["sample_index"],
        "source": row["datasource"],
        "prompt": _cut(row["prompt_text"], characters),
        "response": _cut(row["response_text"], characters),
        "label": _cut(row["label"], characters),
        "turns": [_turn(message, characters) for message in json.loads(row["messages"])],
        "counts": {name: _number(value) for name, value in row["counts"].items()},
        "tokens": sum(row["response_mask"]),
        "reward": _number(row["reward"]),
        "components": {name: _number(value) for name, value in row["components"].items()},
        "advantage": _mean(list(compress(row["advantages"], row["response_mask"]))),
        "outcome": row["outcome"],
        "finish": row["finish_reason"],
        "version": row["policy_version"],
        "filtered": row["filtered"],
    }


def _turn(message: Mapping[str, Any], characters: int) -> tuple[str, str]:
    """Who speaks in a conversation, and the text; calls of tools that are not in the text follow it."""
    name = f" {message['name']}" if message.get("name") else ""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    content = message.get("content") or ""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"{message['role']}{name}", _cut("\n".join([text, *calls]).strip("\n"), characters)


def spread_order(count: int) -> Iterator[int]:
    """Indices below ``count``: the last, the first, then the middles of the gaps, so that any prefix is spread evenly."""
    if count == 0:
        return
    yield count - 1
    gaps = [(-1, count - 1)]
    if count > 1:
        yield 0
        gaps = [(0, count - 1)]
    while gaps:
        halves = []
        for low, high in gaps:
            if high - low >= 2:
                middle = (low + high) // 2
                yield middle
                halves += [(low, middle), (middle, high)]
        gaps = halves


def _mean(values: Sequence[float]) -> float | None:
    return _number(sum(values) / len(values)) if values else None


def _number(value: float) -> float | None:
    """``value`` to seven digits, more than a page can show; None if it is not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]} […]"


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _embedded(data: object) -> str:
    """JSON that cannot end its script element, whatever its strings hold."""
    return htmlsafe_json_dumps(data, allow_nan=False, separators=(",", ":"))


# Second part: what slots and trainer of an asynchronous run did, drawn from its ledger (``togi.pump.ledger``).

_TRAINER = -1
"""The trainer's row."""
_BEGINS = {"queued": "queued", "running": "generating", "done": "ready", "trained": "training"}
"""The span of a prompt that begins with an event. With any other event the prompt leaves its slot."""


def _gantt(run: RunDirectory, info: RunInfo, records: Sequence[StepRecord], limits: Limits) -> dict[str, object] | None:
    """The last steps; None for a synchronous run, and without a ledger that can be read."""
    if not info.values.get("max_staleness", {"value": 0})["value"] or not run.ledger_path.exists():
        return None
    # As long as the phase in which the loop asked for groups.
    drawn = _Gantt({record.step: record.seconds.get("generating", 0.0) for record in records})
    with left_out(run.ledger_path), run.ledger_path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - limits.ledger_bytes))
        for line in file.read().decode(errors="replace").split("\n"):
            # The start of what is read and a kill cut a line.
            with suppress(ValueError, KeyError, TypeError):
                drawn.add(json.loads(line))
    return drawn.last(limits)


class _Gantt:
    """Reads the lines of a ledger. ``waited``: for how many seconds each step waited for its groups.

    A prompt has the lowest free row until it leaves its slot: the weights trained on it are published, or it is not trained on.
    """

    def __init__(self, waited: Mapping[int, float]) -> None:
        self._waited = waited
        self._spans: list[tuple[str, int, float, float, str]] = []  # kind, row, start, end, text
        self._lines: list[tuple[float, str]] = []
        self._left: list[tuple[float, int, str]] = []
        self._rows: dict[int, int] = {}  # of the prompts at work
        self._free: list[int] = []
        self._now: dict[int, tuple[str, float]] = {}
        self._about: dict[int, str] = {}
        self._step: tuple[float, int] | None = None  # in training, since
        self._at = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """The next line. Raises KeyError, TypeError or ValueError if it is none of a ledger."""
        event, at = line["event"], float(line["time"])
        if event == "resumed":
            self._end()
            self._lines.append((at, f"resumed at version {line['version']}"))
        elif event == "published":
            for number in [number for number, (kind, _) in self._now.items() if kind == "training"]:
                self._change(number, None, at)
            self._end_step(at)
            self._lines.append((at, f"version {line['version']}"))
        elif event == "trained":
            since = max([at - self._waited.get(line["step"], 0.0), *(at for at, _ in self._lines[-1:])])
            self._spans.append(("waiting", _TRAINER, since, at, f"step {line['step']}"))
            self._step = at, line["step"]
        for number in line["prompts"]:
            self._prompt(number, event, at, line)
        self._at = at

    def _prompt(self, number: int, event: str, at: float, line: Mapping[str, Any]) -> None:
        if event == "queued":
            self._rows[number] = heappop(self._free) if self._free else len(self._rows)
        if number not in self._rows:
            return  # was queued before the part of the ledger that is read
        if "lengths" in line:
            (old, new), longest = line["versions"], max(line["lengths"])
            self._about[number] = f", versions {old} to {new}, at most {longest} tokens"
        if "generated" in line:
            self._change(number, "rewards", float(line["generated"]))
        if event not in _BEGINS:
            self._left.append((at, self._rows[number], f"prompt {number} {event}"))
        self._change(number, _BEGINS.get(event), at)

    def _change(self, number: int, kind: str | None, at: float) -> None:
        """End the present span of a prompt and begin one of ``kind``; None: it leaves its row."""
        if number in self._now:
            before, since = self._now.pop(number)
            text = f"prompt {number}{self._about.get(number, '')}"
            self._spans.append((before, self._rows[number], since, at, text))
        if kind is not None:
            self._now[number] = kind, at
        else:
            heappush(self._free, self._rows.pop(number))
            self._about.pop(number, None)

    def _end_step(self, at: float) -> None:
        if self._step is not None:
            since, step = self._step
            self._spans.append(("training", _TRAINER, since, at, f"step {step}"))
            self._step = None

    def _end(self) -> None:
        """All work ends with the last line: the ledger's end, or what was killed before a resume."""
        for number in list(self._now):
            self._change(number, None, self._at)
        self._end_step(self._at)
        self._free = []

    def last(self, limits: Limits) -> dict[str, object] | None:
        """The last steps as JSON, in seconds from the first of them; None if there is nothing to draw."""
        self._end()
        spans = sorted((span for span in self._spans if span[3] > span[2]), key=lambda span: span[3])
        if not spans:
            return None
        before = [at for at, _ in self._lines[: -limits.gantt_steps]] + [
            span[3] for span in spans[: -limits.gantt_spans]
        ]
        start = max(before, default=min(span[2] for span in spans))
        shown = [(kind, row, max(since, start), end, text) for kind, row, since, end, text in spans if end > start]
        return {
            "spans": [
                [kind, row, _number(since - start), _number(end - start), text] for kind, row, since, end, text in shown
            ],
            "lines": [[_number(at - start), text] for at, text in self._lines if at > start],
            "left": [[_number(at - start), row, text] for at, row, text in self._left if at > start],
        }


# Third part: the end of a run in its folder, with its status and the report page.


def cause(error: BaseException) -> str:
    """Why a run ended, in words for its status."""
    if isinstance(error, KeyboardInterrupt | CancelledError):
        return "interrupted"
    if isinstance(error, SystemExit):
        return "terminated"
    return str(error) or type(error).__name__


def end_run(directory: RunDirectory, state: State, message: str = "", close: Callable[[], None] = lambda: None) -> None:
    """``close`` what writes into the folder, then record how the run ended. Safe in ``except``: see ``way_out``."""
    with way_out("closing the run's files and trackers"):
        close()
    with way_out("writing the run's status"):
        directory.write_status(state, message)
    with tolerated("writing the report page"), way_out("writing the report page"):
        write_report(directory.root)
