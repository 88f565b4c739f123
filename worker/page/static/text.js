// Times and elements.

const DAY_MS = 86_400_000;

/** `12:31` today, `2026-11-20 12:31` before; with seconds where there are some. All UTC. */
export function clock(ms) {
  const text = new Date(ms).toISOString();
  const time = text.slice(17, 19) === "00" ? text.slice(11, 16) : text.slice(11, 19);
  return Math.floor(ms / DAY_MS) === Math.floor(Date.now() / DAY_MS) ? time : `${text.slice(0, 10)} ${time}`;
}

/** A price with as many digits as tell neighbours apart. */
export function price(value) {
  return value === undefined ? "" : String(Number(value.toPrecision(8)));
}

/** An element with attributes and children; text is always set as text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Replace the children, but only if something differs: screen readers speak what changes. */
export function fill(element, ...children) {
  const fresh = make("div", {}, ...children);
  if (fresh.innerHTML !== element.innerHTML) element.replaceChildren(...fresh.childNodes);
}
