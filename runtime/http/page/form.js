// The form: document, questions and settings, and the errors beside what caused them.

import { button, element } from "./answer.js";
import { examples } from "./strings.js";
import { currentLanguage, say, t, unsay } from "./language.js";
import { sayError } from "./round.js";

const MAX_FILE_MB = 8;
const WHOLE = ["max_tokens", "seed"];
const SETTINGS = ["max_tokens", "temperature", "seed", "visibility"];
// Where an error stands, by the field of a request that it names.
const PLACES = { messages: "document", prompt: "document", branches: "questions", ...Object.fromEntries(SETTINGS.map((it) => [it, it])) };
// The answers stand below the form, not beside it.
export const isNarrow = () => matchMedia("(max-width: 919px)").matches;
const byId = (id) => document.getElementById(id);

export class Form {
  constructor({ announce, onAsk }) {
    Object.assign(this, { announce, onAsk, turns: [], isBusy: false });
    this.document = byId("document");
    this.list = byId("questions");
    this.addQuestion();
    byId("add").addEventListener("click", () => this.addQuestion().focus());
    byId("clear").addEventListener("click", () => { this.setDocument(""); this.document.focus(); });
    byId("after-clear").addEventListener("click", () => { this.follow([]); this.fields()[0].focus(); });
    byId("example").addEventListener("click", () => this.fillExample());
    this.document.addEventListener("input", () => this.measure());
    byId("visibility").addEventListener("change", (event) => {
      const words = { columnar: "visibilityColumnar", isolated: "visibilityIsolated" };
      say(byId("visibility-hint"), words[event.target.value] ?? "visibilityDefault");
    });
    const isMac = /Mac|iPhone|iPad/.test(navigator.platform);
    say(byId("keys"), isMac ? "keysMac" : "keys");
    byId("form").addEventListener("submit", (event) => { event.preventDefault(); this.submit(); });
    byId("form").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    this.takeFiles();
  }

  fields() {
    return [...this.list.querySelectorAll("textarea")];
  }

  addQuestion(text = "", after = null) {
    const field = element("textarea", { rows: 1, value: text });
    const remove = button("removeQuestion", () => this.removeQuestion(field), { kind: "quiet square small" });
    remove.replaceChildren(cross());
    delete remove.dataset.text;
    field.addEventListener("keydown", (event) => this.onKey(event, field));
    field.addEventListener("input", () => fit(field));
    const row = element("li", {}, element("span", { className: "badge", ariaHidden: "true" }), field, remove);
    if (after) after.closest("li").after(row);
    else this.list.append(row);
    this.numberQuestions();
    fit(field);
    return field;
  }

  removeQuestion(field) {
    const fields = this.fields();
    const at = fields.indexOf(field);
    if (fields.length > 1) field.closest("li").remove();
    else field.value = "";
    this.numberQuestions();
    this.fields()[Math.max(0, at - 1)].focus();
  }

  numberQuestions() {
    const rows = [...this.list.children];
    rows.forEach((row, k) => {
      row.querySelector(".badge").textContent = k + 1;
      const field = row.querySelector("textarea");
      say(field, "question", { n: k + 1 }, "label");
      say(field, "questionPlaceholder", {}, "placeholder");
      field.setAttribute("aria-describedby", "questions-error");
      say(row.querySelector("button"), "removeQuestion", { n: k + 1 }, "label");
      row.querySelector("button").hidden = rows.length === 1;
    });
  }

  // Enter goes on to the next question, and makes one after the last; Shift+Enter is a new line.
  onKey(event, field) {
    const isPlain = !(event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || event.isComposing);
    if (!isPlain || event.key !== "Enter" || event.keyCode === 229) return;
    event.preventDefault();
    const fields = this.fields();
    const next = fields[fields.indexOf(field) + 1];
    if (next) next.focus();
    else if (field.value.trim()) this.addQuestion().focus();
  }

  setDocument(text) {
    this.document.value = text;
    this.measure();
  }

  measure() {
    const n = this.document.value.length;
    unsay(byId("document-error"));
    if (n) say(byId("document-size"), "documentSize", { n });
    else unsay(byId("document-size"));
    byId("clear").hidden = !n;
  }

  setQuestions(questions) {
    this.list.replaceChildren();
    for (const question of questions.length ? questions : [""]) this.addQuestion(question);
  }

  // Asks the next questions after these turns of a conversation.
  follow(turns) {
    this.turns = turns;
    byId("after").hidden = !turns.length;
    if (turns.length) say(byId("after-text"), "afterQuestion", { question: turns.at(-1).question });
  }

  fill({ document: text, turns, questions }) {
    this.setDocument(text);
    this.follow(turns);
    this.setQuestions(questions);
    this.fields().at(-1).focus();
  }

  fillExample() {
    const example = examples[currentLanguage()];
    this.fill({ document: example.document, turns: [], questions: example.questions });
  }

  takeFiles() {
    const place = byId("document-field");
    byId("open").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", (event) => { this.openFile(event.target.files[0]); event.target.value = ""; });
    for (const kind of ["dragover", "drop"]) {
      // Also beside the field: a browser would leave the page and show the file.
      window.addEventListener(kind, (event) => { if (event.dataTransfer?.types.includes("Files")) event.preventDefault(); });
    }
    place.addEventListener("dragover", () => place.classList.add("over"));
    place.addEventListener("dragleave", (event) => { if (!place.contains(event.relatedTarget)) place.classList.remove("over"); });
    place.addEventListener("drop", (event) => {
      place.classList.remove("over");
      if (event.dataTransfer.files.length) this.openFile(event.dataTransfer.files[0]);
    });
  }

  async openFile(file) {
    if (!file) return;
    const values = { name: file.name };
    const refused = byId("document-error");
    if (file.size > MAX_FILE_MB * 1e6) return void say(refused, "tooLarge", { ...values, n: MAX_FILE_MB });
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      if (text.includes("\0")) throw new TypeError("not text");
      this.setDocument(text);
      this.announce("dropped", values);
    } catch {
      say(refused, "notText", values);
    }
  }

  clearErrors() {
    for (const error of document.querySelectorAll("form .error")) unsay(error);
    for (const field of document.querySelectorAll("form [aria-invalid]")) field.removeAttribute("aria-invalid");
    clearInterval(this.countdown);
    unsay(byId("retry"));
  }

  refuse(place, field, show) {
    const target = byId(`${place}-error`);
    show(target);
    target.scrollIntoView({ block: "nearest" });
    if (!field) return;
    if (SETTINGS.includes(place)) byId("settings").open = true;
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }

  // The settings that were given, or nothing after an error was shown.
  settings() {
    const given = {};
    for (const name of SETTINGS) {
      const field = byId(name);
      const text = field.value.trim();
      if (!text) continue;
      const value = name === "visibility" ? text : Number(text);
      const isRight = WHOLE.includes(name) ? Number.isSafeInteger(value) : name === "visibility" || Number.isFinite(value);
      if (!isRight) return this.refuse(name, field, (error) => say(error, WHOLE.includes(name) ? "notInteger" : "notNumber"));
      given[name] = value;
    }
    return given;
  }

  submit() {
    if (this.isBusy) return;
    this.clearErrors();
    const fields = this.fields();
    const written = fields.filter((field) => field.value.trim());
    if (!written.length) return void this.refuse("questions", fields[0], (error) => say(error, "noQuestion"));
    const settings = this.settings();
    if (!settings) return;
    const questions = written.map((field) => field.value.trim());
    this.onAsk({ document: this.document.value, turns: this.turns, questions, settings });
  }

  setBusy(isBusy) {
    this.isBusy = isBusy;
    byId("ask").setAttribute("aria-disabled", isBusy);
    byId("cancel").hidden = !isBusy;
    byId("keys").hidden = isBusy;
  }

  // After the questions were accepted: the document stays, the next questions can be written.
  accepted() {
    const hadFocus = this.list.contains(document.activeElement);
    this.setQuestions([]);
    this.follow([]);
    this.forgetKeyField();
    if (!hadFocus) return;
    if (isNarrow()) byId("answers").focus({ preventScroll: true }); // and no keyboard over the answers
    else this.fields()[0].focus();
  }

  // Shows an error of the server beside the field that it names.
  showError(error) {
    const param = (error.param ?? "").split(/[.[]/)[0];
    if (error.status === 401) return this.askForKey(error);
    const place = PLACES[param] ?? (error.status === 413 ? "document" : "form");
    const branch = place === "questions" ? Number((/\d+/.exec(error.param) ?? [0])[0]) : 0;
    const field = place === "form" ? null : place === "questions" ? (this.fields()[branch] ?? this.fields()[0]) : byId(place);
    this.refuse(place, field, (target) => sayError(target, error));
    if (error.retryAfter !== null) this.countDown(error.retryAfter);
  }

  countDown(seconds) {
    const until = performance.now() + seconds * 1000;
    const show = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      say(byId("retry"), left > 0 ? "retryIn" : "retryNow", { n: left });
      if (left <= 0) clearInterval(this.countdown);
    };
    this.countdown = setInterval(show, 250);
    show();
    byId("retry").scrollIntoView({ block: "nearest" });
    this.announce("retryIn", { n: Math.ceil(seconds) });
  }

  askForKey(error) {
    byId("key-section").hidden = false;
    if (error) this.refuse("key", byId("key"), (target) => sayError(target, error));
  }

  forgetKeyField() {
    byId("key-section").hidden = true;
    byId("key").value = "";
    byId("key").removeAttribute("aria-invalid");
  }
}

function cross() {
  const svg = byId("after-clear").querySelector("svg");
  return svg.cloneNode(true);
}

// Makes a field as high as its text where style sheets cannot.
function fit(field) {
  if (CSS.supports("field-sizing", "content")) return;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}
