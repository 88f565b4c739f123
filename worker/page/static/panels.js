// The words of the page: the headline, what is off and why, the agents, the notes, the bar under the crosshair, the table.

import { counts, FAILED_CLOSED, voteText } from "./rows.js";
import { byId, clock, fill, make, price } from "./text.js";

const GLYPHS = { active: "●", canary: "◉", shadow: "◌", muted: "◍", refused: "✕", warming_up: "◔", loading: "◔" };
const MARKS = { rejected: "✕", gap: "┆" };
const MOST_NOTES = 100;

const state = (name) => name.replace("_", " ");
const tone = (vote) => (counts(vote) ? vote.action.toLowerCase() : "greyed");

/** `4 configured · 3 loaded · 2 voting`, as the newest signal says it. */
export function showHeadline(overview, warming) {
  const { signal, agents } = overview;
  const loaded = agents.filter((one) => one.state !== "refused" && one.state !== "loading").length;
  const counted = signal ?? { configured: agents.length, loaded };
  const short = signal && signal.voting < signal.quorum;
  const parts = [[counted.configured, "configured"], [counted.loaded, "loaded"]];
  if (signal) parts.push([signal.voting, "voting"]);
  const words = parts.map(([n, name], place) => {
    const dot = place < parts.length - 1 ? [make("span", { class: "dot" }, " ·")] : [];
    return make("span", name === "voting" && short ? { class: "short" } : {}, `${n} ${name}`, ...dot);
  });
  fill(byId("headline"), ...words.flatMap((word, place) => (place ? [" ", word] : [word])));
  document.title = byId("headline").textContent;
  fill(byId("decision"), ...(signal ? decision(signal) : [warming]));
}

function decision(signal) {
  const { symbol, interval, ts, action, status, agreeing, voting, quorum } = signal;
  return [
    make("b", { class: status === "ok" ? action.toLowerCase() : "" }, signalText(signal)),
    ` is the last signal: ${symbol} ${interval} ${clock(ts)}, ${agreeing} of ${voting} voting agree, quorum ${quorum}`,
  ];
}

/** `BUY`, `HOLD`, or a HOLD with why it is one. */
function signalText({ action, status }) {
  return status === "ok" || status === "hold" ? action : `${action} ${status}`;
}

/** One line for each thing that is off. */
export function showReasons(overview) {
  const { signal } = overview;
  const lines = [];
  if (signal && signal.voting < signal.quorum) {
    lines.push(reason("below", "Below quorum", `: ${signal.voting} voting, ${signal.quorum} must agree. Every signal is a HOLD.`));
  }
  for (const one of overview.agents) {
    if (one.state === "active" || one.state === "canary") continue;
    const why = [one.reason, one.detail].filter(Boolean).join(", ");
    const since = one.since && one.state !== "refused" ? ` since ${clock(one.since)}` : "";
    lines.push(reason(one.state, `${one.agent} ${state(one.state)}`, `${why ? `: ${why}` : ""}${since}`));
  }
  for (const [name, condition] of Object.entries(overview.conditions)) {
    const told = name === "quorum" || (name === "warm_up" && !signal);
    if (!condition.ok && !told) lines.push(reason("condition", "Not ready", `: ${state(name)}, ${condition.detail}`));
  }
  fill(byId("reasons"), ...lines);
}

function reason(kind, head, rest) {
  return make("li", { "data-state": kind }, make("b", {}, head), rest);
}

/** A card an agent: what it is now, and its vote on the last bar of the chosen symbol. */
export function showAgents(overview, last, pair) {
  fill(byId("agents"), ...overview.agents.map((one) => {
    const vote = last?.votes[one.agent];
    const why = [one.reason, one.detail].filter(Boolean).join(", ");
    return make("li", { "data-agent": one.agent, "data-state": one.state },
      make("div", { class: "top" },
        make("span", { class: "name" }, one.agent),
        make("span", { class: "state" }, `${GLYPHS[one.state] ?? "○"} ${state(one.state)}`)),
      make("div", { class: `vote ${vote ? tone(vote) : "greyed"}` }, vote ? shortVote(vote) : "no vote yet"),
      ...(pair ? [make("div", { class: "on" }, `last vote on ${pair.join(" ")}`)] : []),
      ...(one.version ? [make("div", { class: "version" }, one.version)] : []),
      ...(why && one.state !== "active" ? [make("div", { class: "why", title: why }, why)] : []));
  }));
}

function shortVote(vote) {
  if (vote.action === "ABSTAIN") return "abstains";
  return `${vote.action} ${vote.confidence.toFixed(2)}${counts(vote) ? "" : " (no weight)"}`;
}

/** The bar under the crosshair, or the last one. */
export function showRow(row) {
  if (!row) return fill(byId("readout"), "No bar yet.");
  const { open, high, low, close } = row;
  const bar = close === undefined ? "" : ` open ${price(open)}, high ${price(high)}, low ${price(low)}, close ${price(close)}`;
  const signal = row.status === undefined
    ? "no signal: warming up"
    : `${signalText(row)}, ${row.voting} voting, ${row.agreeing} agreeing, quorum ${row.quorum}`;
  const notes = (row.notes ?? []).map((note) => make("div", {}, `${MARKS[note.kind]} ${note.kind}: ${note.reason}, ${note.detail}`));
  const votes = Object.entries(row.votes).map(([agent, vote]) => make("span", { class: tone(vote) }, `${agent} ${voteText(vote)}`));
  fill(byId("readout"), make("div", {}, make("b", {}, clock(row.ts)), bar), make("div", {}, make("b", {}, signal)),
    make("div", { class: "votes" }, ...votes), ...notes);
}

/** Rejected bars, gaps and other events, newest first. */
export function showNotes(notes) {
  byId("no-notes").hidden = notes.length > 0;
  fill(byId("notes"), ...notes.slice(0, MOST_NOTES).map((note) => {
    const about = [note.symbol, note.agent].filter(Boolean).join(" ");
    const what = [state(note.kind), note.reason === note.kind ? "" : note.reason].filter(Boolean).join(": ");
    return make("li", { "data-kind": note.kind, "data-id": note.id },
      make("span", { class: "mark", "aria-hidden": "true" }, MARKS[note.kind] ?? "•"),
      make("time", { datetime: new Date(note.ts ?? note.ms).toISOString() }, clock(note.ts ?? note.ms)),
      make("span", { class: "text" }, make("b", {}, `${about} ${what} `.trimStart()), make("span", { class: "detail" }, note.detail)));
  }));
}

/** Every row, newest first: the picture for those who cannot see it. */
export function showTable(rows, agents) {
  const [head, body] = [document.querySelector("#table thead"), document.querySelector("#table tbody")];
  const names = ["Time (UTC)", "Close", "Signal", "Status", "Voting", "Quorum", ...agents];
  fill(head, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));
  const lines = rows.toReversed().map((row) => {
    const cells = [clock(row.ts), price(row.close), row.action ?? "", row.status ?? "", row.voting ?? "", row.quorum ?? ""];
    const votes = agents.map((agent) => (row.votes[agent] ? voteText(row.votes[agent]) : ""));
    return make("tr", { "data-ts": row.ts, class: FAILED_CLOSED.has(row.status) ? "closed" : "" },
      ...[...cells, ...votes].map((cell) => make("td", {}, String(cell))));
  });
  body.replaceChildren(...lines);
}
