// What the page knows, and how it keeps up: the series once, then what is new by server-sent events.

import { Chart } from "./chart.js";
import { Chooser } from "./chooser.js";
import * as panels from "./panels.js";
import { Rows } from "./rows.js";
import { byId, clock } from "./text.js";

const RETRY_MS = 2000;
const SILENT_MS = 10_000;
const NOTES_KEPT = 300;

const rows = new Rows();
let overview = null;
let notes = [];
let pair = null;
let live = null;
let instance = null;
let away = null;
let hovered = null;
let looked = null;
let heard = Date.now();
let drawn = false;

const chart = new Chart(byId("chart"), (row) => {
  hovered = row?.ts ?? null;
  showReadout();
});
const chooser = new Chooser(byId("symbol"), byId("symbols"), choose);

// ------------------------------------------------------------------ showing

/** Redraw what is not the chart, once a frame however much came in. */
function refresh() {
  if (drawn) return;
  drawn = true;
  requestAnimationFrame(() => {
    drawn = false;
    showAll();
  });
}

function showAll() {
  if (!overview) return;
  const last = rows.list.findLast((row) => row.status !== undefined);
  const agents = agentNames();
  byId("namespace").textContent = `namespace ${overview.namespace}`;
  panels.showHeadline(overview, warmingText());
  panels.showReasons(overview);
  panels.showAgents(overview, last, pair);
  panels.showNotes(notes);
  chart.setAgents(agents, laneNotes());
  byId("progress").textContent = progressText(last);
  showReadout();
  if (byId("table").open) panels.showTable(rows.list, agents);
}

function showReadout() {
  panels.showRow(rows.list.find((row) => row.ts === hovered) ?? rows.list.at(-1));
}

/** The agents in their order, then whatever else voted, such as a canary. */
function agentNames() {
  const voted = rows.list.flatMap((row) => Object.keys(row.votes));
  return [...new Set([...overview.agents.map((one) => one.agent), ...voted])];
}

function laneNotes() {
  const off = overview.agents.filter((one) => one.state !== "active");
  return Object.fromEntries(off.map((one) => [one.agent, [one.state, one.reason].filter(Boolean).join(": ").replace("_up", " up")]));
}

function warmingText() {
  if (!pair) return "No signal yet: no bar has come in.";
  const restarts = notes.filter((note) => note.kind === "gap" && note.evidence?.rewarm && note.ts).map((note) => note.ts);
  const bars = rows.warming(Math.max(0, ...restarts));
  const goal = overview.warmup_bars;
  const progress = bars < goal ? ` (${bars} of ${goal} bars)` : "";
  return `no signal yet: warming up${progress}`;
}

/** Said above the chart where the chosen symbol has no signal on its last bar. */
function progressText(last) {
  const end = rows.list.at(-1);
  const cut = looked && !looked.complete
    ? `These are all bars of ${pair[0]} among the newest ${looked.looked_through.toLocaleString("en")} of the stream.` : "";
  if (!end || end.ready !== false) return cut;
  return `${pair[0]}: ${last ? "warming up again after a gap, " : ""}${warmingText()} ${cut}`.trim();
}

// ------------------------------------------------------------------ what comes in

/** Put rejects and gaps on the bar they belong to: that of their time, else the next one. */
function pin() {
  const first = rows.list[0]?.ts ?? Infinity;
  for (const row of rows.list) Object.assign(row, { notes: [], gap: false, rejected: false });
  for (const note of notes) {
    if (!note.ts || note.ts < first || note.symbol !== pair[0] || !["gap", "rejected"].includes(note.kind)) continue;
    const row = rows.list.find((one) => one.ts >= note.ts) ?? rows.list.at(-1);
    row.notes.push(note);
    row[note.kind] = true;
  }
}

function takeNotes(more) {
  const known = new Map([...more, ...notes].map((note) => [note.id, note]));
  notes = [...known.values()].sort((a, b) => b.ms - a.ms).slice(0, NOTES_KEPT);
  pin();
}

function takeRows(columns) {
  if (!looked) return; // the series is on its way, and holds these too
  const changed = rows.merge(columns);
  pin();
  chart.show(rows.list, changed);
  refresh();
}

async function ask(path) {
  const reply = await fetch(path);
  if (!reply.ok) {
    const error = new Error((await reply.json().catch(() => ({}))).error ?? `HTTP ${reply.status}`);
    throw Object.assign(error, { final: reply.status === 400 });
  }
  return reply.json();
}

async function reload() {
  const mine = pair;
  const [symbol, interval] = mine.map(encodeURIComponent);
  try {
    const series = await ask(`api/series?symbol=${symbol}&interval=${interval}`);
    if (mine !== pair) return;
    const first = looked === null;
    looked = series;
    rows.clear();
    rows.merge(series.rows);
    notes = [];
    takeNotes(series.notes);
    chart.show(rows.list, null);
    if (first) chart.zoom();
    byId("chart").dataset.symbol = `${series.symbol} ${series.interval}`;
    refresh();
  } catch (error) {
    if (mine !== pair) return;
    if (error.final) refuse(error.message);
    else lost(error.message);
  }
}

// ------------------------------------------------------------------ the connection

function say(state, text) {
  byId("connection").dataset.state = state;
  if (byId("connection").textContent !== text) byId("connection").textContent = text;
}

function lost(detail) {
  away ??= Date.now();
  say("away", `reconnecting since ${clock(away)}${detail ? `: ${detail}` : ""}`);
}

/** There can be no such symbol: asking again would not help, choosing another does. */
async function refuse(why) {
  live?.close();
  live = null;
  pair = null;
  away = null;
  say("refused", why);
  overview ??= await ask("api/overview").catch(() => null);
  refresh();
}

function found(fresh) {
  const restarted = instance !== null && fresh !== instance;
  say("live", restarted ? `live again since ${clock(Date.now())}: the worker restarted` : "live");
  instance = fresh;
  away = null;
}

function connect() {
  live?.close();
  heard = Date.now();
  const [symbol, interval] = pair.map(encodeURIComponent);
  const source = new EventSource(`api/live?symbol=${symbol}&interval=${interval}`);
  live = source;
  const on = (name, take) => source.addEventListener(name, (event) => {
    if (source !== live) return;
    heard = Date.now();
    take(JSON.parse(event.data));
  });
  on("hello", (hello) => found(hello.instance));
  on("reload", reload);
  on("rows", takeRows);
  on("overview", (fresh) => {
    if (away !== null) found(instance);
    overview = fresh;
    refresh();
  });
  on("notes", (fresh) => {
    takeNotes(fresh);
    chart.show(rows.list, null);
    refresh();
  });
  on("away", ({ detail }) => lost(detail));
  source.onerror = () => {
    if (source !== live) return;
    lost("");
    source.close();
    live = null;
    if (looked === null) reload(); // its answer says why, where the address asks for what cannot be
  };
}

/** Try again where the stream has ended, was refused, or has fallen silent. */
setInterval(() => {
  if (pair && (live === null || Date.now() - heard > SILENT_MS)) {
    lost("");
    connect();
  }
}, RETRY_MS);

// ------------------------------------------------------------------ choosing

function choose(symbol, interval) {
  pair = [symbol, interval];
  looked = null;
  hovered = null;
  rows.clear();
  notes = [];
  chart.show([], null);
  chooser.show(symbol, interval);
  byId("chart-title").textContent = `${symbol} ${interval}`;
  window.history.replaceState(null, "", `#${encodeURIComponent(symbol)}|${interval}`);
  connect();
}

/** The symbol and interval of the address; null where it names none or cannot be read. */
function named() {
  try {
    const [symbol, interval] = decodeURIComponent(window.location.hash.slice(1)).split("|");
    return symbol ? [symbol, interval || "1m"] : null;
  } catch {
    return null;
  }
}

/** The symbol of the address, else the first one; waits for the first bar where there is none yet. */
async function start() {
  const wanted = named();
  if (wanted) return choose(...wanted);
  try {
    overview = await ask("api/overview");
    const { matches } = await ask("api/symbols");
    say("live", "waiting for the first bar");
    showAll();
    if (matches.length) return choose(...matches[0]);
  } catch (error) {
    lost(error.message);
  }
  setTimeout(start, RETRY_MS);
}

for (const choice of document.querySelectorAll("#zoom input")) {
  choice.addEventListener("change", () => chart.zoom(Number(choice.value)));
}
window.addEventListener("hashchange", () => {
  const wanted = named();
  if (wanted && wanted.join() !== pair?.join()) choose(...wanted);
});
byId("table").addEventListener("toggle", refresh);
start();
