// One round: the questions that were asked together, their answers side by side, the speed and the layout.

import { Answer, SHORTEST, button, element, uniqueId } from "./answer.js";
import { cancelRequest, piecesOf } from "./api.js";
import { number, say, t, unsay } from "./language.js";
import { LayoutDrawing } from "./layout.js";

const SHOW_EVERY = 50; // milliseconds between two updates of the page
const PATIENCE = 4000; // milliseconds until a stopped request that does not end is cut off

export function sayError(target, error) {
  if (error.key) say(target, error.key, { status: error.status });
  else {
    unsay(target);
    target.textContent = error.message;
  }
}

export class Round {
  // `asked`: document, turns, questions and settings; `announce(key, values)` speaks to screen readers.
  constructor(asked, { announce, onAskAgain, onFollowUp, isChat, startedAt, controller }) {
    Object.assign(this, { asked, announce, startedAt, controller, cutOff: 0, id: null, usage: null, firstAt: 0, lastAt: 0, drawing: null });
    this.answers = asked.questions.map((question, k) => new Answer(k + 1, question, {
      onStop: (answer) => this.stop(k, answer),
      onCopy: (answer) => this.copy(answer),
      onFollowUp: (answer) => onFollowUp(asked, answer),
    }));
    this.stopAllButton = button("stopAll", () => this.stopAll(), { kind: "" });
    this.againButton = button("askAgain", () => onAskAgain(asked), { kind: "" });
    this.againButton.hidden = true;
    this.numbers = {};
    this.error = element("p", { className: "error" });
    this.error.setAttribute("role", "alert");
    this.figure = element("figure", { className: "layout", hidden: true });
    const grid = element("div", { className: "grid" }, ...this.answers.map(({ card }) => card));
    grid.dataset.count = this.answers.length;
    this.section = element("section", { className: "round" }, this.header(), ...this.notes(isChat), this.error, this.figure,
      grid);
    this.section.setAttribute("aria-labelledby", this.title.id);
    this.timer = setInterval(() => this.show(), SHOW_EVERY);
    this.show();
  }

  notes(isChat) {
    const turn = this.asked.turns.at(-1);
    return [...(turn ? [note("afterQuestion", { question: turn.question })] : []), ...(isChat ? [] : [note("plainText")])];
  }

  header() {
    this.title = element("h2", { id: uniqueId("round") });
    say(this.title, "round", { n: this.answers.length });
    const stats = element("dl", { className: "stats" });
    for (const name of ["perSecond", "firstToken", "tokens", "cached"]) {
      const value = element("dd", { textContent: "–" });
      const unit = element("dt");
      stats.append(element("div", { hidden: name === "cached" }, unit, value));
      this.numbers[name] = { value, unit };
      say(unit, name, { n: 0 });
    }
    return element("header", {}, this.title, stats,
      element("p", { className: "buttons" }, this.stopAllButton, this.againButton));
  }

  get isOpen() {
    return this.answers.some(({ isOpen }) => isOpen);
  }

  // Reads the stream to its end; an error of the server stands above the answers.
  async read(chunks) {
    try {
      for await (const chunk of chunks) this.take(chunk);
      this.finish("interrupted"); // answers that the server did not end
    } catch (error) {
      if (error.name !== "AbortError") sayError(this.error, error);
      this.finish(error.name === "AbortError" ? "stop" : "interrupted");
    }
  }

  take(chunk) {
    const now = performance.now();
    if (this.id === null && chunk.id) {
      this.id = chunk.id;
      for (const answer of this.answers) answer.stopButton.disabled = false;
    }
    if (chunk.pos2d) this.draw(chunk.pos2d);
    if (chunk.usage) this.usage = chunk.usage;
    for (const { index, text, tokens, finished } of piecesOf(chunk)) {
      const answer = this.answers[index];
      if (!answer) continue;
      if (tokens) {
        if (!this.firstAt) {
          this.firstAt = now;
          this.announce("statusWriting", { n: this.answers.length });
        }
        this.lastAt = now;
      }
      answer.add(text, tokens, now);
      if (finished) {
        answer.end(finished);
        if (answer.isStopped) this.announce("statusStopped", { n: answer.number });
      }
    }
  }

  draw(layout) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("role", "img");
    const caption = element("figcaption");
    for (const [kind, key] of [["context", "layoutContext"], ["question", "layoutQuestion"], ["answer", "layoutAnswer"]]) {
      if (kind === "context" && !layout.context_tokens) continue;
      const words = element("span");
      say(words, key);
      caption.append(element("span", { className: `key ${kind}` }, words));
    }
    const rule = element("span", { className: "rule" });
    say(rule, layout.visibility === "columnar" ? "visibilityColumnar" : "visibilityIsolated");
    caption.append(rule);
    this.figure.replaceChildren(element("div", { className: "plot" }, svg), caption);
    this.figure.hidden = false;
    this.drawing = new LayoutDrawing(svg, layout);
  }

  show() {
    for (const answer of this.answers) answer.show();
    const counted = this.answers.reduce((sum, { tokens }) => sum + tokens, 0);
    const tokens = this.usage?.completion_tokens ?? counted;
    const firsts = this.answers.filter((answer) => answer.firstAt && answer.firstAt - this.firstAt < 1).length;
    const time = this.lastAt - this.firstAt;
    const rate = time < SHORTEST ? null : ((counted - firsts) * 1000) / time;
    this.stat("perSecond", rate === null ? "–" : number(rate, rate < 100 ? 1 : 0));
    this.stat("firstToken", this.firstAt ? `${number((this.firstAt - this.startedAt) / 1000, 2)} s` : "–");
    this.stat("tokens", number(tokens), tokens);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (cached !== undefined) {
      this.stat("cached", number(cached), this.usage.prompt_tokens);
      this.numbers.cached.value.parentElement.hidden = false;
    }
    this.drawing?.update(this.answers.map((answer) => answer.tokens), this.answers.map(({ isOpen }) => !isOpen));
  }

  stat(name, text, n) {
    const { value, unit } = this.numbers[name];
    if (value.textContent !== text) value.textContent = text;
    if (n !== undefined) say(unit, name, { n });
  }

  finish(reason) {
    clearInterval(this.timer);
    clearTimeout(this.cutOff);
    const hadFocus = document.activeElement === this.stopAllButton;
    for (const answer of this.answers) answer.end(reason);
    this.stopAllButton.hidden = true;
    this.againButton.hidden = false;
    if (hadFocus) this.againButton.focus();
    this.show();
    this.announce("statusDone", { n: this.answers.length });
  }

  async stop(k, answer) {
    if (answer.isStopped) return;
    answer.stopping();
    try {
      await cancelRequest(this.id, k);
    } catch (error) {
      answer.notStopped(error.key ? t(error.key, { status: error.status }) : error.message);
    }
  }

  async stopAll() {
    if (this.cutOff) return;
    const open = this.answers.filter(({ isOpen }) => isOpen);
    this.stopAllButton.setAttribute("aria-disabled", "true");
    for (const answer of open) answer.stopping();
    this.cutOff = setTimeout(() => this.controller.abort(), PATIENCE);
    try {
      if (this.id === null) this.controller.abort();
      else await cancelRequest(this.id);
    } catch {
      this.controller.abort(); // the server ends a request whose reader is gone
    }
  }

  async copy(answer) {
    const isCopied = await copyText(answer.written);
    if (!isCopied) return say(answer.error, "noCopy");
    say(answer.copyButton, "copied");
    this.announce("statusCopied", { n: answer.number });
    return setTimeout(() => say(answer.copyButton, "copy"), 1600);
  }
}

function note(key, values) {
  const made = element("p", { className: "hint note" });
  say(made, key, values);
  return made;
}

// The clipboard of browsers exists on https and on this machine alone; elsewhere a selection is copied.
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const field = element("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    const isCopied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return isCopied;
  }
}
