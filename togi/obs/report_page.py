"""The parts of ``report.html``: markup, style and script. Not here: the data (``report``).

The script never builds HTML from text: elements are made one by one and get their text as ``textContent``. The content
security policy forbids every connection and every script but the three of the page.
"""

from __future__ import annotations

_STYLE = """
:root { --bg:#fafaf9; --card:#fff; --line:#e5e4e1; --text:#1f2328; --dim:#6b7078; --accent:#3b5bdb; --soft:#eef1fb;
  --good:#2b8a3e; --bad:#c92a2a; --mark:#9c36b5; }
@media (prefers-color-scheme: dark) { :root { --bg:#15171a; --card:#1d2024; --line:#30343a; --text:#e4e6e9;
  --dim:#979da6;
  --accent:#8ea6ff; --soft:#262c3d; --good:#69db7c; --bad:#ff8787; --mark:#e599f7; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--bg); color:var(--text); font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif; }
main { max-width:1320px; margin:0 auto; padding:28px 24px 80px; }
h1 { font-size:24px; font-weight:650; margin:0; letter-spacing:-.01em; overflow-wrap:anywhere; }
h2 { font-size:17px; font-weight:650; margin:40px 0 12px; }
header { display:flex; gap:12px; align-items:center; flex-wrap:wrap; }
.state { font-size:13px; font-weight:600; padding:2px 10px; border-radius:99px; background:var(--soft);
  color:var(--accent); }
.state.finished { color:var(--good); } .state.failed { color:var(--bad); }
.facts { display:flex; flex-wrap:wrap; gap:6px 28px; margin:14px 0 0; color:var(--dim); font-size:14px; }
.facts b { color:var(--text); font-weight:550; }
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(190px,1fr)); gap:12px; margin-top:24px; }
.tile, .card { background:var(--card); border:1px solid var(--line); border-radius:10px; }
.tile { padding:12px 14px; }
.tile .name { color:var(--dim); font-size:12.5px; overflow-wrap:anywhere; } .tile .last { font-size:22px; font-weight:600; }
.tile .first { color:var(--dim); font-size:12.5px; }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,560px),1fr)); gap:16px; }
.card { padding:14px 16px 10px; min-width:0; }
.card h3 { margin:0; font-size:15px; font-weight:600; } .card h3 span { color:var(--dim); font-weight:400;
  font-size:13px; }
.plot { height:250px; } .card p { margin:2px 0 4px; color:var(--dim); font-size:12.5px; }
.bar { display:flex; gap:10px; align-items:center; flex-wrap:wrap; margin-bottom:12px; }
select, button, input { font:inherit; font-size:14px; color:inherit; background:var(--card);
  border:1px solid var(--line);
  border-radius:7px; padding:5px 10px; } button { cursor:pointer; } input { min-width:200px; }
table { width:100%; border-collapse:collapse; font-size:14px; } .card.table { padding:0; overflow-x:auto; }
th { text-align:left; color:var(--dim); font-weight:550; font-size:12.5px; white-space:nowrap; }
th, td { padding:8px 12px; border-bottom:1px solid var(--line); vertical-align:top; }
th.sort { cursor:pointer; } th.sort:hover { color:var(--text); } td.num, th.num { text-align:right;
  font-variant-numeric:tabular-nums; }
tr.row { cursor:pointer; } tr.row:hover td { background:var(--soft); } tr:last-child td { border-bottom:0; }
.preview { max-width:520px; overflow:hidden; text-overflow:ellipsis; white-space:nowrap; color:var(--dim); }
.warn { color:var(--bad); } .dim { color:var(--dim); }
.texts { display:grid; grid-template-columns:1fr 1fr; gap:14px; } .texts h4 { margin:0 0 4px; font-size:12.5px;
  color:var(--dim); }
@media (max-width:900px) { .texts { grid-template-columns:1fr; } }
pre { margin:0; padding:12px; background:var(--bg); border:1px solid var(--line); border-radius:8px;
  white-space:pre-wrap;
  overflow-wrap:anywhere; font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; max-height:480px;
    overflow:auto; }
.token { color:var(--mark); font-weight:600; } .parts { margin:0 0 10px; font-size:13px; color:var(--dim); }
.notes { color:var(--dim); font-size:13.5px; margin:0 0 12px; padding-left:18px; }
#held .card, #examples pre { margin-bottom:12px; } #examples h3 { font-size:15px; }
details summary { cursor:pointer; font-size:17px; font-weight:650; margin:40px 0 12px; }
"""

_BODY = """
<main>
<header><h1 id="title"></h1><span class="state" id="state"></span></header>
<div class="warn" id="message"></div>
<div class="facts" id="facts"></div>
<div class="tiles" id="tiles"></div>
<h2>Curves</h2>
<div class="charts" id="charts"></div>
<section id="rollout-section">
<h2>Rollouts</h2>
<ul class="notes" id="notes"></ul>
<div class="bar"><button id="before" type="button">&larr;</button><select id="step" aria-label="Step"></select>
<button id="after" type="button">&rarr;</button>
<input id="search" type="search" placeholder="Text in prompt or response">
<span class="dim" id="count"></span></div>
<div class="card table"><table><thead id="columns"></thead><tbody id="rows"></tbody></table></div>
</section>
<section id="held-section">
<h2>Held-out rows</h2>
<p class="dim">The worst and the best rows of an evaluation as the model saw them, learned parts in &#10214; &#10215;.</p>
<div class="bar"><select id="held-step" aria-label="Evaluation"></select></div>
<div id="held"></div>
</section>
<details id="example-section"><summary>Rows as the model sees them</summary><div id="examples"></div></details>
<details><summary>Configuration</summary>
<div class="card table"><table><tbody id="config"></tbody></table></div></details>
</main>
"""

_SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("togi-data").textContent);
const $ = id => document.getElementById(id);
function make(tag, text, className, parent) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  if (parent) parent.append(element);
  return element;
}
function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", {maximumFractionDigits: size < 1 ? 4 : size < 100 ? 3 : 1});
}
const when = text => text.startsWith("@") ? new Date(1000 * Number(text.slice(1))).toLocaleString() : text;

$("title").textContent = document.title;
$("state").textContent = data.state.name; $("state").classList.add(data.state.name);
$("message").textContent = data.state.message;
for (const [label, text] of data.facts) { make("span", label + " ", "", $("facts")).append(make("b", when(text))); }
for (const head of data.headlines) {
  const tile = make("div", undefined, "tile", $("tiles"));
  tile.title = data.explain[head.name];
  make("div", head.name, "name", tile); make("div", number(head.last), "last", tile);
  make("div", "at first " + number(head.first), "first", tile);
}

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colors = ["#4c6ef5", "#f08c00", "#2f9e44", "#e03131", "#9c36b5", "#0c8599", "#c2255c", "#846358", "#868e96"];
function traces(chart) {
  return chart.names.map((name, k) => {
    const all = data.series[name], keep = all.map((v, i) => i).filter(i => all[i] !== null);
    const few = keep.length <= 40, stacked = chart.kind === "stacked";
    const trace = {x: keep.map(i => data.steps[i]), y: keep.map(i => all[i]), name: name,
      type: stacked ? "bar" : "scatter",
      mode: few ? "lines+markers" : "lines", line: {width: 2, color: colors[k % colors.length]},
      marker: {size: 5, color: colors[k % colors.length]},
        hovertemplate: "%{y:.5g}<extra>" + "%{fullData.name}</extra>"};
    const error = data.series[name + "_stderr"];
    if (error) trace.error_y = {type: "data", array: keep.map(i => error[i] ?? 0), thickness: 1.2, width: 3};
    return trace;
  });
}
function plot(element, chart) {
  const axis = {gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), automargin: true};
  const whole = data.steps.length < 10 ? {dtick: 1} : {};
  Plotly.react(element, traces(chart), {
    height: 250, margin: {l: 48, r: 8, t: 10, b: 32}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: "system-ui,sans-serif", size: 12, color: css("--dim")}, barmode: "stack", bargap: 0.15,
      hovermode: "x unified",
    hoverlabel: {bgcolor: css("--card"), font: {color: css("--text")}},
    showlegend: chart.names.length > 1, legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0},
    xaxis: {...axis, ...whole, title: {text: "step", standoff: 4}},
    yaxis: {...axis, type: chart.kind === "log lines" ? "log" : "linear", exponentformat: "power",
      dtick: undefined, nticks: 6},
  }, {displayModeBar: false, responsive: true});
}
function card(title, unit) {
  const box = make("div", undefined, "card", $("charts")), head = make("h3", title + " ", "", box);
  if (unit) make("span", unit, "", head);
  return box;
}
function chartCard(chart) {
  const box = card(chart.title, chart.unit);
  make("p", data.explain[chart.names[0]], "", box).title = chart.names.map(n => n + ": " + data.explain[n]).join("\n");
  const area = make("div", undefined, "plot", box);
  return () => plot(area, chart);
}
function anyCard() {
  const box = card("Any metric", ""), pick = make("select", undefined, "", box), text = make("p", "", "", box);
  for (const name of Object.keys(data.series).sort()) make("option", name, "", pick).value = name;
  const area = make("div", undefined, "plot", box);
  const draw = () => {
    text.textContent = data.explain[pick.value];
    plot(area, {names: [pick.value], kind: "lines"});
  };
  pick.onchange = draw;
  return draw;
}
const drawings = data.charts.map(chartCard);
if (data.steps.length) drawings.push(anyCard()); else make("p", "No step has finished yet.", "dim", $("charts"));
const drawAll = () => drawings.forEach(draw => draw());
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

const columns = [["group", r => r.group], ["reward", r => r.reward, 1], ["advantage", r => r.advantage, 1],
  ["tokens", r => r.tokens, 1], ["finish", r => r.finish], ["version", r => r.version, 1], ["response",
    r => r.response]];
const order = {column: -1, down: true};
function marked(text, parent) {
  const area = make("pre", undefined, "", parent);
  for (const part of text.split(/(<\|[^|<>\n]{1,40}\|>|<\/?s>|<(?:pad|eos|bos|unk)>)/)) {
    if (part) make("span", part, /^<.*>$/.test(part) ? "token" : "", area);
  }
}
function opened(row, after) {
  const line = document.createElement("tr"), cell = make("td", undefined, "", line);
  cell.colSpan = columns.length;
  const facts = Object.entries(row.components).map(([name, value]) => name + " " + number(value));
  facts.push("source " + row.source, "sample " + row.index, "outcome " + row.outcome);
  if (row.filtered) facts.push("left out by filtering");
  if (row.label !== "" && row.label !== '""') facts.push("label " + row.label);
  make("p", facts.join("  ·  "), "parts", cell);
  const texts = make("div", undefined, "texts", cell);
  for (const [name, text] of [["Prompt", row.prompt], ["Response", row.response]]) {
    const half = make("div", undefined, "", texts); make("h4", name, "", half); marked(text, half);
  }
  after.after(line);
  return line;
}
function rowLine(row) {
  const line = make("tr", undefined, "row", $("rows"));
  columns.forEach(([name, get, numeric]) => {
    const text = numeric ? number(get(row)) : String(get(row));
    const cell = make("td", name === "response" ? undefined : text, numeric ? "num" : "", line);
    if (name === "response") make("div", text, "preview", cell);
    if (name === "finish" && text !== "stop") cell.classList.add("warn");
    if (name === "reward" && row.outcome !== "score") { cell.textContent = row.outcome; cell.classList.add("warn"); }
  });
  let detail = null;
  line.onclick = () => { if (detail) { detail.remove(); detail = null; } else detail = opened(row, line); };
}
function showStep() {
  const part = data.rollouts[$("step").selectedIndex], wanted = $("search").value.toLowerCase();
  $("rows").replaceChildren();
  if (!part) return;
  let rows = part.rows.filter(r => !wanted || (r.prompt + "\n" + r.response).toLowerCase().includes(wanted));
  if (order.column >= 0) {
    const get = columns[order.column][1], sign = order.down ? -1 : 1;
    const low = v => v === null;  // what was not measured goes last either way
    rows = [...rows].sort((a,
      b) => low(get(a)) - low(get(b)) || sign * (get(a) > get(b) ? 1 : get(a) < get(b) ? -1 : 0));
  }
  $("count").textContent = rows.length + " of " + part.total + " rollouts";
  rows.forEach(rowLine);
  $("before").disabled = $("step").selectedIndex === 0;
  $("after").disabled = $("step").selectedIndex === data.rollouts.length - 1;
}
function headRow() {
  $("columns").replaceChildren();
  const line = make("tr", undefined, "", $("columns"));
  columns.forEach(([name, , numeric], k) => {
    const arrow = order.column !== k ? "" : order.down ? " ↓" : " ↑";
    const head = make("th", name + arrow, "sort" + (numeric ? " num" : ""), line);
    head.onclick = () => { order.down = order.column === k ? !order.down : true; order.column = k; headRow();
      showStep(); };
  });
}
for (const note of data.notes) make("li", note, "", $("notes"));
for (const part of data.rollouts) {
  make("option", "step " + part.step + (part.split === "eval" ? ", evaluation" : ""), "", $("step"));
}
$("rollout-section").hidden = data.rollouts.length === 0;
$("step").selectedIndex = Math.max(data.rollouts.findLastIndex(part => part.split === "train"), 0);
$("step").onchange = showStep; $("search").oninput = showStep;
$("before").onclick = () => { $("step").selectedIndex -= 1; showStep(); };
$("after").onclick = () => { $("step").selectedIndex += 1; showStep(); };
headRow(); showStep();
function showHeld() {
  const part = data.held_out[$("held-step").selectedIndex];
  $("held").replaceChildren();
  for (const row of part ? part.rows : []) {
    const box = make("div", undefined, "card", $("held"));
    make("h3", row.place + ": " + row.values.map(number).join(" and ") + " " + row.number, "", box);
    const texts = make("div", undefined, row.texts.length > 1 ? "texts" : "", box);
    row.texts.forEach((text, k) => {
      const half = make("div", undefined, "", texts);
      if (row.texts.length > 1) make("h4", k ? "rejected" : "chosen", "", half);
      marked(text, half);
    });
  }
}
for (const part of data.held_out) make("option", "after step " + part.step, "", $("held-step"));
$("held-section").hidden = data.held_out.length === 0;
$("held-step").selectedIndex = data.held_out.length - 1;
$("held-step").onchange = showHeld;
showHeld();
$("example-section").hidden = !data.examples.some(part => part.texts.length);
for (const part of data.examples) {
  make("h3", part.title, "", $("examples"));
  part.texts.forEach(text => marked(text, $("examples")));
}
for (const [name, value, source] of data.config) {
  const line = make("tr", undefined, "", $("config"));
  make("td", name, "", line); make("td", value, "", line); make("td", source, "dim", line);
}
"""


def compose(title: str, data: str, plotly: str, nonce: str) -> str:
    """The page. ``title`` is escaped HTML, ``data`` JSON without "<", ``plotly`` the library's own bundle."""
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return "".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>{_BODY}",
            f'<script nonce="{nonce}" type="application/json" id="togi-data">{data}</script>\n',
            f'<script nonce="{nonce}">{plotly}</script>\n',
            f'<script nonce="{nonce}">{_SCRIPT}</script>\n</body>\n</html>\n',
        )
    )
