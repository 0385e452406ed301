// Starts the page: theme, language, the model's name, and what happens when questions are asked.

import { getKey, modelName, openStream, requestBody, setKey } from "./api.js";
import { Form, isNarrow } from "./form.js";
import { applyLanguage, currentLanguage, say, store, toggleLanguage, unsay } from "./language.js";
import { Round } from "./round.js";

const byId = (id) => document.getElementById(id);
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const form = new Form({ announce, onAsk: ask });
let model = null;
let isChat = true; // until the server says that the model has no chat template

function announce(key, values = {}) {
  say(byId("status"), key, values);
}

function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : systemIsDark.matches;
}

function nameTheme() {
  say(byId("theme"), isDark() ? "toLight" : "toDark", {}, "label");
}

byId("theme").addEventListener("click", () => {
  const dark = !isDark();
  const isSystems = dark === systemIsDark.matches; // then the page follows the system again
  if (isSystems) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = dark ? "dark" : "light";
  store("pos2d-theme", isSystems ? null : dark ? "dark" : "light");
  nameTheme();
});
systemIsDark.addEventListener("change", nameTheme);

function nameLanguage() {
  const other = byId("language");
  say(other, "otherLanguage");
  other.lang = currentLanguage() === "en" ? "zh-Hans" : "en";
}

byId("language").addEventListener("click", () => {
  toggleLanguage();
  nameLanguage();
});

async function loadModel() {
  model = await modelName();
  byId("model").textContent = byId("model").title = model;
}

async function useKey() {
  setKey(byId("key").value);
  unsay(byId("key-error"));
  try {
    await loadModel();
  } catch (error) {
    form.showError(error);
    return;
  }
  form.forgetKeyField();
  form.fields()[0].focus();
}

byId("use-key").addEventListener("click", useKey);
byId("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  useKey();
});

// Opens the stream by the route of chats, or by the plain one for a model without a chat template.
async function open(asked, signal) {
  if (isChat) {
    try {
      return await openStream("v1/chat/completions", requestBody(asked, model, true), signal);
    } catch (error) {
      if (error.status !== 400 || !/chat.template/i.test(error.message)) throw error;
      isChat = false;
    }
  }
  return openStream("v1/completions", requestBody(asked, model, false), signal);
}

async function ask(asked) {
  const controller = new AbortController();
  const startedAt = performance.now();
  byId("cancel").onclick = () => controller.abort();
  form.setBusy(true);
  announce("statusAsking");
  let chunks;
  try {
    if (model === null) await loadModel();
    chunks = await open(asked, controller.signal);
  } catch (error) {
    if (error.name !== "AbortError") form.showError(error);
    return;
  } finally {
    form.setBusy(false);
  }
  const round = new Round(asked, { announce, isChat, startedAt, controller, onAskAgain, onFollowUp });
  byId("empty").hidden = true;
  byId("rounds").prepend(round.section);
  form.accepted();
  reveal(round.section);
  await round.read(chunks);
}

function reveal(section) {
  const { top, bottom } = section.getBoundingClientRect();
  if (top >= 0 && (isNarrow() ? bottom : top) < innerHeight) return;
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  section.scrollIntoView({ block: "start", behavior: isCalm ? "auto" : "smooth" });
}

function onAskAgain(asked) {
  form.fill(asked);
}

function onFollowUp(asked, answer) {
  const turns = [...asked.turns, { question: answer.question, answer: answer.written }];
  form.fill({ document: asked.document, turns, questions: [] });
}

applyLanguage();
nameLanguage();
nameTheme();
loadModel().catch((error) => {
  if (error.status === 401 && !getKey()) form.askForKey();
  else form.showError(error);
});
