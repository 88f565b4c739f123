// Bars with their signals and votes, as the server's columns hold them. Nothing is computed anew.

const BAR = ["ready", "open", "high", "low", "close", "volume"];
const SIGNAL = ["action", "confidence", "agreement", "configured", "loaded", "eligible", "voting", "agreeing", "quorum", "status"];
const MOST_ROWS = 1000;

/** Statuses in which the ensemble failed closed: a HOLD that no vote asked for. */
export const FAILED_CLOSED = new Set(["withheld", "stale", "below_quorum"]);

/** Rows of one symbol by time; `merge` takes columns and says whether only the end changed. */
export class Rows {
  #byTs = new Map();
  list = [];

  clear() {
    this.#byTs.clear();
    this.list = [];
  }

  /** The new and changed rows, oldest first, or null where an older row than the last one changed. */
  merge(columns) {
    const last = this.list.at(-1)?.ts ?? -Infinity;
    const touched = columns.ts.map((ts, place) => this.#mergeOne(ts, columns, place));
    this.list = [...this.#byTs.values()].sort((a, b) => a.ts - b.ts);
    if (this.list.length > MOST_ROWS) {
      for (const row of this.list.splice(0, this.list.length - MOST_ROWS / 2)) this.#byTs.delete(row.ts);
      return null;
    }
    return touched.length && touched[0].ts >= last ? touched : null;
  }

  #mergeOne(ts, columns, place) {
    const row = { ...(this.#byTs.get(ts) ?? { ts, votes: {} }) };
    for (const name of [...BAR, ...SIGNAL]) if (columns[name][place] !== null) row[name] = columns[name][place];
    for (const [agent, votes] of Object.entries(columns.votes)) {
      if (votes.action[place] === null) continue;
      const vote = Object.fromEntries(Object.entries(votes).map(([name, column]) => [name, column[place]]));
      row.votes = { ...row.votes, [agent]: vote };
    }
    this.#byTs.set(ts, row);
    return row;
  }

  /** How many bars at the end are not ready yet, since the last ready one or the last restart of the warm-up. */
  warming(restartedAt) {
    let bars = 0;
    for (const row of this.list.toReversed()) {
      if (row.ready !== false || row.ts < restartedAt) break;
      bars += 1;
    }
    return bars;
  }
}

/** Whether a vote counts: an action, from an agent whose state gives it weight. */
export function counts(vote) {
  return vote.action !== "ABSTAIN" && (vote.state === "active" || vote.state === "canary");
}

/** A vote in words: `BUY 0.64`, `BUY 0.64 muted: action_collapse`, `abstains, refused: no_artifact`. */
export function voteText(vote) {
  const state = vote.state === "active" ? "" : vote.state;
  const why = [state, vote.reason].filter(Boolean).join(": ");
  const said = vote.action === "ABSTAIN" ? "abstains" : `${vote.action} ${vote.confidence.toFixed(2)}`;
  return [said, why].filter(Boolean).join(", ");
}
