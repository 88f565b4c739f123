// What is drawn besides candles: the stretches that failed closed, and a lane for the feed and for each agent.

import { counts, FAILED_CLOSED } from "./rows.js";

const LABEL_FONT = "600 11px system-ui, sans-serif";

/** Calls `draw(scope, bars, edges)` with pixel-exact left and right edges of each visible bar. */
class Layer {
  #data = null;

  constructor(colours) {
    this.colours = colours;
  }

  renderer() {
    return { draw: (target) => this.#data && target.useBitmapCoordinateSpace((scope) => this.#draw(scope)) };
  }

  update(data) {
    this.#data = data;
  }

  priceValueBuilder() {
    return [0, 1];
  }

  isWhitespace(item) {
    return item.row === undefined;
  }

  defaultOptions() {
    return {};
  }

  #draw(scope) {
    const { bars, barSpacing, visibleRange } = this.#data;
    if (visibleRange === null) return;
    const ratio = scope.horizontalPixelRatio;
    const cells = [];
    for (let i = Math.max(0, visibleRange.from - 1); i < Math.min(bars.length, visibleRange.to + 1); i += 1) {
      const left = Math.round((bars[i].x - barSpacing / 2) * ratio);
      cells.push({ left, right: Math.round((bars[i].x + barSpacing / 2) * ratio), row: bars[i].originalData.row });
    }
    this.draw(scope.context, scope, cells);
  }
}

/** A veil with stripes over the bars in which the ensemble failed closed, a dashed line before a gap. */
export class Veil extends Layer {
  draw(context, { bitmapSize, verticalPixelRatio: v }, cells) {
    const { height } = bitmapSize;
    for (const { left, right, row } of cells) {
      if (FAILED_CLOSED.has(row.status)) {
        context.fillStyle = this.colours.veil;
        context.fillRect(left, 0, right - left, height);
      }
      if (row.gap) {
        context.fillStyle = this.colours.warn;
        for (let y = 0; y < height; y += 8 * v) context.fillRect(left - Math.round(v / 2), y, Math.max(1, Math.round(v)), 4 * v);
      }
    }
  }
}

/** The feed's lane (rejects and gaps), then one lane an agent: up is BUY, down is SELL, the middle HOLD. */
export class Lanes extends Layer {
  agents = [];
  states = {};
  #drawn = "";

  /** `onDrawn` is told in JSON what each agent's lane holds, when that changes: its label, and cells by colour. */
  constructor(colours, onDrawn) {
    super(colours);
    this.onDrawn = onDrawn;
  }

  draw(context, { bitmapSize, horizontalPixelRatio: h, verticalPixelRatio: v }, cells) {
    const height = bitmapSize.height / (this.agents.length + 1);
    const lanes = ["feed", ...this.agents];
    const drawn = {};
    lanes.forEach((name, place) => {
      const lane = { top: Math.round(place * height), bottom: Math.round((place + 1) * height), v, cells: {} };
      for (const cell of cells) this.#cell(context, lane, cell, name);
      context.fillStyle = this.colours.line;
      context.fillRect(0, lane.bottom - 1, bitmapSize.width, 1);
      const label = this.#label(context, lane, h, name, bitmapSize.width / h);
      drawn[name] = { label, cells: lane.cells };
    });
    this.#tell(JSON.stringify(drawn));
  }

  #tell(drawn) {
    if (drawn !== this.#drawn) this.onDrawn(drawn);
    this.#drawn = drawn;
  }

  #cell(context, lane, { left, right, row }, name) {
    if (name === "feed") {
      this.#feed(context, lane, (left + right) / 2, left, row);
    } else if (row.votes[name]) {
      this.#vote(context, lane, left, right, row.votes[name]);
    }
  }

  #vote(context, { top, bottom, v, cells }, left, right, vote) {
    const valid = counts(vote);
    const inset = Math.round(2 * v);
    const middle = Math.round((top + bottom) / 2);
    const width = Math.max(1, right - left - (right - left > 4 ? Math.round(v) : 0));
    if (!valid) {
      context.fillStyle = this.colours.veil;
      context.fillRect(left, top + 1, right - left, bottom - top - 2);
    }
    const colour = valid ? vote.action.toLowerCase() : "grey";
    context.fillStyle = this.colours[colour];
    cells[colour] = (cells[colour] ?? 0) + 1;
    const thin = Math.max(1, Math.round(vote.action === "HOLD" ? 1.5 * v : v / 2));
    if (vote.action === "BUY") context.fillRect(left, top + inset, width, middle - top - inset);
    else if (vote.action === "SELL") context.fillRect(left, middle, width, bottom - middle - inset);
    else context.fillRect(left, middle - thin, right - left, 2 * thin);
  }

  #feed(context, { top, bottom, v }, x, left, row) {
    const middle = (top + bottom) / 2;
    const arm = 4 * v;
    context.lineWidth = Math.max(1, 1.8 * v);
    if (row.rejected) {
      context.strokeStyle = this.colours.bad;
      context.beginPath();
      for (const way of [1, -1]) {
        context.moveTo(x - arm, middle - way * arm);
        context.lineTo(x + arm, middle + way * arm);
      }
      context.stroke();
    }
    if (row.gap) {
      const thick = Math.max(1, Math.round(1.6 * v));
      context.fillStyle = this.colours.warn;
      for (const side of [-3 * v, 1 * v]) {
        context.fillRect(Math.round(left + side), top + Math.round(3 * v), thick, Math.round(bottom - top - 6 * v));
      }
    }
  }

  /** The lane's name at its left edge, on a ground of its own so that it reads over anything. */
  #label(context, { top, bottom }, h, name, room) {
    context.save();
    context.scale(h, h);
    context.font = LABEL_FONT;
    const full = this.states[name] ? `${name} · ${this.states[name]}` : name;
    const text = context.measureText(full).width < room / 3 ? full : name;
    const width = context.measureText(text).width;
    const y = (top + bottom) / 2 / h;
    context.fillStyle = this.colours.card;
    context.globalAlpha = 0.9;
    context.fillRect(0, top / h, width + 12, (bottom - top - 1) / h);
    context.globalAlpha = 1;
    context.fillStyle = this.colours.ink;
    context.textBaseline = "middle";
    context.fillText(text, 5, y + 0.5);
    context.restore();
    return text;
  }
}
