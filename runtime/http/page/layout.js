// Draws the layout of a round: one row for the context and one for each branch, over time, while the answers grow.

import { number, t } from "./language.js";

const SVG = "http://www.w3.org/2000/svg";
const HEAD = 20; // height of the axis
const ROW = 16;
const BAR = 10;
const GUTTER = 84; // width of the labels
const CONTEXT_SHARE = 0.28; // a long document takes at most this part of the width
const FIRST_ROOM = 32; // tokens of an answer that fit at first; the scale doubles when they are used up

function node(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

export class LayoutDrawing {
  // `layout` is the key pos2d of a stream's first chunk.
  constructor(svg, layout) {
    this.svg = svg;
    this.layout = layout;
    this.counts = layout.branches.map(() => 0);
    this.ended = layout.branches.map(() => false);
    this.drawn = "";
    new ResizeObserver(() => this.draw()).observe(svg.parentElement);
    document.addEventListener("pos2d-language", () => this.draw());
  }

  update(counts, ended) {
    this.counts = counts;
    this.ended = ended;
    this.draw();
  }

  // The time after the last prompt, and the time at the right edge.
  scale() {
    const { branches, context_tokens: context } = this.layout;
    const start = Math.max(context, ...branches.map(({ time, tokens }) => time + tokens));
    const last = Math.max(...branches.map(({ time, tokens }, k) => time + tokens + this.counts[k])) - start;
    let room = FIRST_ROOM;
    while (room < last) room *= 2;
    return { start, end: start + room };
  }

  draw() {
    const width = Math.floor(this.svg.parentElement.clientWidth);
    const { end } = this.scale();
    const state = [width, end, document.documentElement.lang, this.counts, this.ended].join();
    if (!width || state === this.drawn) return;
    this.drawn = state;
    const { branches, context_tokens: context } = this.layout;
    const rows = branches.length + (context ? 1 : 0);
    const height = HEAD + rows * ROW + 2;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", height);
    this.svg.replaceChildren();
    const plot = width - GUTTER - 1;
    const contextWidth = context ? Math.min((plot * context) / end, plot * CONTEXT_SHARE) : 0;
    const x = (time) => GUTTER + (time <= context && context
      ? (contextWidth * time) / context
      : contextWidth + ((plot - contextWidth) * (time - context)) / (end - context));
    this.axis(x, end, contextWidth < (plot * context) / end - 1, height);
    branches.forEach((branch, k) => this.branch(branch, k, x, HEAD + ROW * (k + (context ? 1 : 0))));
    this.svg.setAttribute("aria-label", this.description());
  }

  axis(x, end, isCompressed, height) {
    const { context_tokens: context } = this.layout;
    node(this.svg, "text", { x: 0, y: 11, class: "axis" }, t("axisBranch"));
    const isNarrow = x(context) - x(0) < 48;
    for (const time of new Set(context ? (isNarrow ? [context, end] : [0, context, end]) : [0, end])) {
      const place = time === end ? "end" : "start";
      const words = time === end ? `${t("axisTime")} ${number(time)}` : number(time);
      node(this.svg, "text", { x: x(time), y: 11, class: "axis", "text-anchor": place }, words);
      node(this.svg, "line", { x1: x(time), x2: x(time), y1: HEAD - 3, y2: height, class: "tick" });
    }
    if (!context) return;
    node(this.svg, "text", { x: 0, y: HEAD + 10, class: "name" }, t("axisContext"));
    this.bar("context", x(0), x(context), HEAD);
    if (isCompressed) {
      const middle = (x(0) + x(context)) / 2;
      node(this.svg, "path", { d: `M${middle - 4} ${HEAD + BAR + 3}l6 -${BAR + 4}M${middle + 1} ${HEAD + BAR + 3}l6 -${BAR + 4}`, class: "break" });
    }
  }

  branch({ branch, time, tokens }, k, x, y) {
    const begin = time + tokens;
    const until = begin + this.counts[k];
    node(this.svg, "text", { x: 0, y: y + 10, class: "name" }, number(k + 1));
    node(this.svg, "text", { x: GUTTER - 10, y: y + 10, class: "axis", "text-anchor": "end" }, number(branch));
    this.bar("question", x(time), x(begin), y);
    this.cells(x(begin), x(until), y, this.counts[k]);
    if (!this.ended[k] && this.counts[k]) node(this.svg, "rect", { x: x(until) - 1, y: y - 1, width: 2.5, height: BAR + 4, class: "head" });
  }

  bar(kind, from, to, y) {
    if (to > from) node(this.svg, "rect", { x: from, y: y + 1, width: Math.max(1, to - from - 1), height: BAR, rx: 1.5, class: kind });
  }

  // The tokens of an answer, one by one where there is room.
  cells(from, to, y, count) {
    const size = (to - from) / count;
    if (size < 4) return this.bar("answer", from, to, y);
    const middle = y + 1 + BAR / 2;
    return node(this.svg, "line", {
      x1: from, x2: to - 1, y1: middle, y2: middle, class: "cells", "stroke-width": BAR, "stroke-dasharray": `${size - 1} 1`,
    });
  }

  description() {
    const { branches, context_tokens: context, visibility } = this.layout;
    const count = (n) => t("countOfTokens", { n });
    const words = branches.map(({ branch, time, tokens }, k) =>
      t("layoutBranch", { n: k + 1, branch, time, tokens: count(tokens + this.counts[k]) }));
    return t("layoutLabel", { context: count(context), branches: words.join("; "), visibility: t(visibility) });
  }
}
