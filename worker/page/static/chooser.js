// The symbol chooser: a combobox that asks the server, so that thousands of symbols are no burden.

import { make } from "./text.js";

/** Calls `choose(symbol, interval)`; `input` and `list` are its elements. */
export class Chooser {
  #options = [];
  #active = -1;
  #asked = 0;
  #current = "";

  constructor(input, list, choose) {
    this.input = input;
    this.list = list;
    this.choose = choose;
    input.addEventListener("focus", () => input.select());
    input.addEventListener("click", () => this.#open(""));
    input.addEventListener("input", () => this.#open(input.value));
    input.addEventListener("keydown", (event) => this.#key(event));
    input.addEventListener("blur", () => this.#close());
    // The list must not take the focus from the field.
    list.addEventListener("mousedown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => this.#pick(this.#options.indexOf(event.target.closest("[role=option]"))));
  }

  show(symbol, interval) {
    this.#current = `${symbol} ${interval}`;
    this.input.value = this.#current;
  }

  async #open(text) {
    this.#asked += 1;
    const mine = this.#asked;
    const answer = await fetch(`api/symbols?q=${encodeURIComponent(text)}`).then((reply) => reply.json()).catch(() => null);
    if (!answer?.matches || mine !== this.#asked || document.activeElement !== this.input) return;
    this.#options = answer.matches.map(([symbol, interval], place) => {
      const option = make("li", { role: "option", id: `symbol-${place}`, "aria-selected": "false" }, `${symbol} ${interval}`);
      option.pair = [symbol, interval];
      return option;
    });
    const hidden = answer.matching - answer.matches.length;
    const more = hidden ? [make("li", { class: "more" }, `and ${hidden} more: type to filter`)] : [];
    const none = answer.matching ? [] : [make("li", { class: "more" }, "no such symbol")];
    this.list.replaceChildren(...this.#options, ...more, ...none);
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    const current = this.#options.findIndex((option) => option.textContent === this.#current);
    this.#mark(text ? 0 : current);
  }

  #close() {
    this.#asked += 1;
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
    this.input.value = this.#current;
  }

  #mark(place) {
    this.#options[this.#active]?.setAttribute("aria-selected", "false");
    this.#active = this.#options.length ? Math.min(Math.max(place, 0), this.#options.length - 1) : -1;
    const option = this.#options[this.#active];
    if (!option) return;
    option.setAttribute("aria-selected", "true");
    option.scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", option.id);
  }

  #pick(place) {
    const option = this.#options[place];
    if (!option) return;
    this.show(...option.pair);
    this.#close();
    this.choose(...option.pair);
  }

  #key(event) {
    const closed = this.list.hidden;
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 };
    if (event.key in steps) {
      event.preventDefault();
      if (closed) this.#open("");
      else this.#mark(this.#active + steps[event.key]);
    } else if (event.key === "Enter" && !closed) {
      event.preventDefault();
      this.#pick(this.#active);
    } else if (event.key === "Escape" && !closed) {
      event.preventDefault();
      this.#close();
    }
  }
}
