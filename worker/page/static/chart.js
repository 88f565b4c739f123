// The picture: candles with the signals, the lanes, and voting agents against the quorum, on one time axis.

import {
  CandlestickSeries, CrosshairMode, LineSeries, LineStyle, LineType, createChart, createSeriesMarkers,
} from "./lightweight-charts.standalone.production.mjs";
import { Lanes, Veil } from "./layers.js";
import { FAILED_CLOSED } from "./rows.js";

const NAMES = ["card", "ink", "quiet", "line", "buy", "sell", "hold", "grey", "veil", "bad", "warn"];
const LANE_HEIGHT = 26;
const MOST_ARROWS = 60;
const VOTING_HEIGHT = 84;
const QUIET_SERIES = { priceLineVisible: false, lastValueVisible: false };
const NO_SCALE = { ...QUIET_SERIES, autoscaleInfoProvider: () => null };
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const seconds = (row) => row.ts / 1000;

function coloursOf(element) {
  const style = getComputedStyle(element);
  return Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** Draws rows into `element`; `onRow` is told the row under the crosshair, null where there is none. */
export class Chart {
  #rows = [];
  #configured = 4;
  #shown = 120;
  #at = null;

  constructor(element, onRow) {
    this.element = element;
    this.colours = coloursOf(element);
    // The logo would lie on a line, and its style is none that the page lets in: the page's foot names and links the
    // library's maker in its place.
    this.chart = createChart(element, {
      autoSize: true, crosshair: { mode: CrosshairMode.Magnet }, layout: { attributionLogo: false },
    });
    this.veil = this.chart.addCustomSeries(new Veil(this.colours), { ...NO_SCALE, priceScaleId: "" });
    this.candles = this.chart.addSeries(CandlestickSeries, { priceLineVisible: false });
    this.markers = createSeriesMarkers(this.candles, []);
    this.lanesView = new Lanes(this.colours, (drawn) => {
      element.dataset.lanes = drawn;
    });
    const blank = { type: "custom", minMove: 1, formatter: () => "" };
    this.lanes = this.chart.addCustomSeries(this.lanesView, { ...QUIET_SERIES, priceFormat: blank }, 1);
    const whole = { type: "price", precision: 0, minMove: 1 };
    const range = () => ({ priceRange: { minValue: 0, maxValue: this.#configured } });
    const steps = { ...QUIET_SERIES, lineType: LineType.WithSteps, priceFormat: whole, autoscaleInfoProvider: range };
    this.quorum = this.chart.addSeries(LineSeries, {
      ...steps, lineWidth: 1, lineStyle: LineStyle.Dashed, title: "quorum", lastValueVisible: true,
    }, 2);
    this.voting = this.chart.addSeries(LineSeries, { ...steps, lineWidth: 2, title: "voting" }, 2);
    this.chart.subscribeCrosshairMove(({ time, sourceEvent }) => {
      if (sourceEvent) this.#at = null;
      if (this.#at === null) onRow(this.#find(time));
    });
    dark.addEventListener("change", () => this.#paint());
    element.addEventListener("keydown", (event) => this.#key(event, onRow));
    this.#paint();
  }

  #find(time) {
    return time === undefined ? null : this.#rows.find((row) => seconds(row) === time) ?? null;
  }

  /** Take the colours of the scheme in force. */
  #paint() {
    Object.assign(this.colours, coloursOf(this.element));
    const { card, quiet, line, buy, sell, grey, ink } = this.colours;
    this.chart.applyOptions({
      layout: { background: { color: card }, textColor: quiet, fontSize: 11, panes: { separatorColor: line, enableResize: false } },
      grid: { vertLines: { color: line }, horzLines: { color: line } },
      rightPriceScale: { borderColor: line },
      timeScale: { borderColor: line, timeVisible: true, secondsVisible: false, rightOffset: 2, minBarSpacing: 0.4 },
    });
    // A rising bar is hollow, a falling one filled: told apart without colour.
    this.candles.applyOptions({
      upColor: card, borderUpColor: buy, wickUpColor: buy, downColor: sell, borderDownColor: sell, wickDownColor: sell,
    });
    this.quorum.applyOptions({ color: grey });
    this.voting.applyOptions({ color: ink });
    this.show(this.#rows, null);
  }

  /** Names and notes of the lanes, by agent. */
  setAgents(agents, states) {
    const grown = agents.length !== this.lanesView.agents.length;
    this.lanesView.agents = agents;
    this.lanesView.states = states;
    this.#configured = agents.filter((name) => !name.endsWith("_canary")).length;
    if (grown) this.#layOut();
    this.lanes.applyOptions({});
  }

  #layOut() {
    const [candles, lanes, voting] = this.chart.panes();
    const height = this.element.clientHeight - 28;
    const wanted = (this.lanesView.agents.length + 1) * LANE_HEIGHT;
    candles.setStretchFactor(Math.max(120, height - wanted - VOTING_HEIGHT));
    lanes.setStretchFactor(wanted);
    voting.setStretchFactor(VOTING_HEIGHT);
  }

  /** Show `rows`; `changed` are those that differ, all at the end, or null for anything else. */
  show(rows, changed) {
    this.#rows = rows;
    const layers = [
      [this.veil, (row) => ({ time: seconds(row), row })],
      [this.candles, (row) => this.#candle(row)],
      [this.lanes, (row) => ({ time: seconds(row), row })],
      [this.quorum, (row) => ({ time: seconds(row), ...(row.quorum === undefined ? {} : { value: row.quorum }) })],
      [this.voting, (row) => this.#votingPoint(row)],
    ];
    for (const [series, item] of layers) {
      if (changed === null) series.setData(rows.map(item));
      else for (const row of changed) series.update(item(row));
    }
    this.#mark();
  }

  #candle(row) {
    if (row.open === undefined) return { time: seconds(row) };
    const { open, high, low, close } = row;
    const { grey, card } = this.colours;
    const closed = FAILED_CLOSED.has(row.status);
    const greyed = closed ? { color: close >= open ? card : grey, borderColor: grey, wickColor: grey } : {};
    return { time: seconds(row), open, high, low, close, ...greyed };
  }

  #votingPoint(row) {
    if (row.voting === undefined) return { time: seconds(row) };
    const short = row.voting < row.quorum;
    return { time: seconds(row), value: row.voting, color: short ? this.colours.bad : this.colours.ink };
  }

  /** An arrow for each BUY and SELL; where many bars are shown, for the first of a run of the same. */
  #mark() {
    let before = null;
    const marked = this.#rows.filter((row) => {
      const action = row.status === "ok" ? row.action : null;
      const changed = action !== before;
      before = action;
      return action && (changed || this.#shown <= MOST_ARROWS);
    });
    this.markers.setMarkers(marked.map((row) => this.#marker(row)));
    const drawn = this.markers.markers().map(({ shape }) => shape);
    const count = (wanted) => drawn.filter((shape) => shape === wanted).length;
    this.element.dataset.markers = `${count("arrowUp")} up, ${count("arrowDown")} down`;
  }

  #marker(row) {
    const buy = row.action === "BUY";
    return {
      time: seconds(row),
      position: buy ? "belowBar" : "aboveBar",
      shape: buy ? "arrowUp" : "arrowDown",
      color: this.colours[buy ? "buy" : "sell"],
      text: this.#shown <= MOST_ARROWS ? row.action : "",
    };
  }

  /** Show the last `bars` bars. */
  zoom(bars = this.#shown) {
    this.#shown = bars;
    const to = this.#rows.length + 1;
    this.chart.timeScale().setVisibleLogicalRange({ from: to - Math.min(bars, Math.max(this.#rows.length, 30)) - 1, to });
    this.#mark();
  }

  // ------------------------------------------------------------------ keyboard

  #key(event, onRow) {
    const last = this.#rows.length - 1;
    const now = this.#at === null ? last : Math.max(0, this.#rows.findIndex((row) => row.ts === this.#at));
    const places = { ArrowLeft: now - (this.#at === null ? 0 : 1), ArrowRight: now + 1, Home: 0, End: last };
    if (event.key in places && last >= 0) this.#select(Math.min(last, Math.max(0, places[event.key])), onRow);
    else if (event.key === "+" || event.key === "=") this.#scale(0.7);
    else if (event.key === "-") this.#scale(1.4);
    else return;
    event.preventDefault();
  }

  #select(place, onRow) {
    const row = this.#rows[place];
    this.#at = row.ts;
    const scale = this.chart.timeScale();
    const seen = scale.getVisibleLogicalRange();
    const shift = place < seen.from ? place - seen.from - 2 : place > seen.to ? place - seen.to + 2 : 0;
    if (shift) scale.setVisibleLogicalRange({ from: seen.from + shift, to: seen.to + shift });
    onRow(row);
    // The crosshair can only stand on what is in view, and that moves with the next frame.
    requestAnimationFrame(() => {
      if (row.close !== undefined) this.chart.setCrosshairPosition(row.close, seconds(row), this.candles);
    });
  }

  #scale(factor) {
    const scale = this.chart.timeScale();
    const { from, to } = scale.getVisibleLogicalRange();
    scale.setVisibleLogicalRange({ from: to - (to - from) * factor, to });
  }
}
