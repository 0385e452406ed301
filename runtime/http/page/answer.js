// The card of one answer: its text as it is written, its speed, and its buttons.

import { number, say, t, unsay } from "./language.js";

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export const SHORTEST = 100; // milliseconds; over less, a speed says more of the network than of the model

let ids = 0;

export function uniqueId(name) {
  ids += 1;
  return `${name}-${ids}`;
}

export function button(key, onClick, { label, values, kind = "quiet" } = {}) {
  const made = element("button", { type: "button", className: kind });
  say(made, key);
  if (label) say(made, label, values, "label");
  made.addEventListener("click", onClick);
  return made;
}

export class Answer {
  constructor(number_, question, { onStop, onCopy, onFollowUp }) {
    Object.assign(this, { number: number_, question, tokens: 0, firstAt: 0, lastAt: 0, finished: null, isStopped: false });
    this.pending = "";
    this.text = document.createTextNode("");
    const values = { n: number_ };
    this.state = element("span", { className: "state" });
    this.speed = element("span", { className: "speed" });
    this.stopButton = button("stop", () => onStop(this), { label: "stopNumber", values, kind: "small" });
    this.copyButton = button("copy", () => onCopy(this), { label: "copyNumber", values });
    this.followButton = button("followUp", () => onFollowUp(this), { label: "followUpNumber", values });
    this.stopButton.disabled = true; // until the request has an id
    this.copyButton.hidden = this.followButton.hidden = true;
    this.error = element("p", { className: "error" });
    this.error.setAttribute("role", "alert");
    this.body = element("div", { className: "text", dir: "auto" }, this.text);
    // The button stands at the top, where it does not move while the text below it grows.
    const title = element("h3", { id: uniqueId("question") },
      element("span", { className: "badge", textContent: number(number_) }),
      element("span", { className: "asked", dir: "auto", textContent: question }));
    this.card = element("article", { className: "answer" }, element("header", {}, title, this.stopButton), this.body, this.error,
      element("footer", {}, element("p", { className: "facts" }, this.state, this.speed),
        element("p", { className: "buttons" }, this.copyButton, this.followButton)));
    this.card.setAttribute("aria-labelledby", title.id);
    this.card.setAttribute("aria-busy", "true");
    say(this.state, "waiting");
  }

  get written() {
    return this.text.data + this.pending;
  }

  get isOpen() {
    return this.finished === null;
  }

  // Tokens per second after the first token; 0 while it is not known.
  get rate() {
    const time = this.lastAt - this.firstAt;
    return time < SHORTEST ? 0 : ((this.tokens - 1) * 1000) / time;
  }

  add(text, tokens, now) {
    if (tokens && !this.tokens) {
      this.firstAt = now;
      if (!this.isStopped) say(this.state, "writing");
    }
    if (tokens) this.lastAt = now;
    this.tokens += tokens;
    this.pending += text;
  }

  // Puts what came since the last call on the page.
  show() {
    if (this.pending) this.text.appendData(this.pending);
    this.pending = "";
    this.copyButton.hidden = this.isOpen && !this.text.length;
    if (!this.tokens) return;
    const values = { tokens: () => t("countOfTokens", { n: this.tokens }), rate: () => number(this.rate, this.rate < 100 ? 1 : 0) };
    say(this.speed, this.rate ? "each" : "countOfTokens", this.rate ? values : { n: this.tokens });
  }

  stopping() {
    this.isStopped = true;
    this.stopButton.setAttribute("aria-disabled", "true"); // a disabled button would lose the focus
    say(this.state, "stopping");
    unsay(this.error);
  }

  notStopped(message) {
    if (!this.isOpen) return;
    this.isStopped = false;
    this.stopButton.removeAttribute("aria-disabled");
    say(this.state, this.tokens ? "writing" : "waiting");
    say(this.error, "notStopped", { message });
  }

  // `reason`: the server's finish reason, or interrupted.
  end(reason) {
    if (!this.isOpen) return;
    this.finished = reason;
    this.card.setAttribute("aria-busy", "false");
    const isStopped = this.isStopped && reason !== "length";
    const state = { length: "limit", interrupted: "interrupted" }[reason] ?? (isStopped ? "stopped" : "complete");
    this.card.dataset.state = state;
    say(this.state, state);
    const hadFocus = document.activeElement === this.stopButton;
    this.stopButton.hidden = true;
    this.show();
    this.followButton.hidden = !this.text.length;
    this.copyButton.hidden = !this.text.length;
    if (!this.text.length && reason !== "interrupted") {
      const nothing = element("p", { className: "hint" });
      say(nothing, "emptyAnswer");
      this.body.append(nothing);
    }
    if (hadFocus) (this.copyButton.hidden ? this.card.closest(".round")?.querySelector("button:not([hidden])") : this.copyButton)?.focus();
  }
}
