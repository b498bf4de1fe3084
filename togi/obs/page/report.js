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
$("failure").textContent = data.failure; $("failure").hidden = !data.failure;
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
const kinds = [["queued", "#ced4da"], ["generating", "#4c6ef5"], ["rewards", "#f08c00"], ["ready", "#ffd43b"],
  ["training", "#2f9e44"], ["waiting", "#e03131"]];
function gantt(element) {
  const {spans, lines, left} = data.gantt, rows = 1 + Math.max(0, ...spans.map(s => s[1]));
  const bars = kinds.map(([name, color]) => {
    const own = spans.filter(s => s[0] === name);
    return {type: "bar", orientation: "h", name: name, marker: {color: color}, base: own.map(s => s[2]),
      x: own.map(s => s[3] - s[2]), y: own.map(s => s[1]), text: own.map(s => s[4]), textposition: "none",
      hovertemplate: "%{text}: %{x:.3g} s<extra>" + name + "</extra>"};
  });
  const marks = {type: "scatter", mode: "markers", name: "not trained on", x: left.map(l => l[0]), y: left.map(l => l[1]),
    text: left.map(l => l[2]), hovertemplate: "%{text}<extra></extra>", marker: {symbol: "x", color: css("--text")}};
  const axis = {gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), automargin: true};
  element.style.height = Math.min(900, 150 + 14 * rows) + "px";
  Plotly.react(element, [...bars, marks].filter(trace => trace.x.length), {
    margin: {l: 48, r: 8, t: 10, b: 32}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: "system-ui,sans-serif", size: 12, color: css("--dim")}, barmode: "overlay", bargap: 0.1,
    hoverlabel: {bgcolor: css("--card"), font: {color: css("--text")}},
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0},
    shapes: lines.map(l => ({type: "line", x0: l[0], x1: l[0], yref: "paper", y0: 0, y1: 1, line: {color: css("--mark"),
      width: 1, dash: l[1].startsWith("resumed") ? "solid" : "dot"}})),
    xaxis: {...axis, title: {text: "seconds", standoff: 4}},
    yaxis: {...axis, autorange: "reversed", tickvals: [-1], ticktext: ["trainer"]},
  }, {displayModeBar: false, responsive: true});
}
function ganttCard() {
  const box = card("The last steps", "one row a slot");
  box.classList.add("wide");
  make("p", "First row: the trainer, which trains or waits for groups. Others: what the group of a prompt does until the " +
    "weights that learnt from it are published. Dotted lines: a version is published. Crosses: groups not trained on.", "", box);
  const area = make("div", undefined, "", box);
  return () => gantt(area);
}
const drawings = data.charts.map(chartCard);
if (data.gantt) drawings.unshift(ganttCard());
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
  for (const [name, value] of Object.entries(row.counts)) facts.push(name.replaceAll("_", " ") + " " + number(value));
  make("p", facts.join("  ·  "), "parts", cell);
  if (row.turns.length) {
    const turns = make("div", undefined, "turns", cell);
    for (const [who, text] of row.turns) {
      const turn = make("div", undefined, "turn" + (who.startsWith("assistant") ? " own" : ""), turns);
      make("h4", who.startsWith("assistant") ? "policy (trained)" : who, "", turn); marked(text, turn);
    }
  } else {
    const texts = make("div", undefined, "texts", cell);
    for (const [name, text] of [["Prompt", row.prompt], ["Response", row.response]]) {
      const half = make("div", undefined, "", texts); make("h4", name, "", half); marked(text, half);
    }
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
