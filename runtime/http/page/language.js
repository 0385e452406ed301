// Texts in the language of the page. An element that was given a text follows a change of the language.

import { strings } from "./strings.js";

const STORED = "pos2d-language";
const TARGETS = { text: "textContent", label: "ariaLabel", placeholder: "placeholder" };
const valuesOf = new WeakMap();
let language = initialLanguage();

function initialLanguage() {
  const stored = read(STORED);
  if (stored in strings) return stored;
  return (navigator.language || "").toLowerCase().startsWith("zh") ? "zh-Hans" : "en";
}

export function read(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

export function store(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch {
    // Storage is off: the choice holds until the page is closed.
  }
}

export const currentLanguage = () => language;

export function number(value, digits = 0) {
  return new Intl.NumberFormat(language, { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);
}

// The text of `key`. Numbers among the values are formatted, and `n` chooses between singular and plural.
export function t(key, values = {}) {
  const forms = strings[language][key];
  const text = Array.isArray(forms) ? forms[values.n === 1 ? 0 : 1] : forms;
  return text.replace(/\{(\w+)\}/g, (_, name) => (typeof values[name] === "number" ? number(values[name]) : values[name]));
}

// Gives an element a text, an accessible name or a placeholder; values may be functions of the language.
export function say(element, key, values = {}, target = "text") {
  const known = valuesOf.get(element) ?? {};
  valuesOf.set(element, { ...known, [target]: values });
  element.dataset[target] = key;
  write(element, target);
}

export function unsay(element) {
  valuesOf.delete(element);
  for (const target of Object.keys(TARGETS)) delete element.dataset[target];
  element.textContent = "";
}

function write(element, target) {
  const given = (valuesOf.get(element) ?? {})[target] ?? {};
  const values = Object.fromEntries(Object.entries(given).map(([name, it]) => [name, typeof it === "function" ? it() : it]));
  const text = t(element.dataset[target], values);
  const property = TARGETS[target];
  if (target === "label") {
    element.setAttribute("aria-label", text);
    if (element.matches("button.square")) element.title = text;
  } else if (element[property] !== text) element[property] = text;
}

export function applyLanguage() {
  document.documentElement.lang = language;
  document.title = t("title");
  for (const target of Object.keys(TARGETS)) {
    for (const element of document.querySelectorAll(`[data-${target}]`)) write(element, target);
  }
}

export function toggleLanguage() {
  language = language === "en" ? "zh-Hans" : "en";
  store(STORED, language);
  applyLanguage();
  document.dispatchEvent(new Event("pos2d-language")); // for what is drawn rather than written
}
