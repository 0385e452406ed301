// Talks to the server: plain requests, and a stream of server-sent events as an async iterator of chunks.

const KEY = "pos2d-key";

export class ServerError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null, key = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter, key }); // key: of our own text, where the server sent none
  }
}

export function getKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function setKey(value) {
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Storage is off: the server will say that the key is missing.
  }
}

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  let response;
  try {
    const method = body === undefined ? "GET" : "POST";
    response = await fetch(new URL(path, document.baseURI), {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body), credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("", { key: "unreachable" });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const { status } = response;
  const retry = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  const details = { status, retryAfter: Number.isFinite(retry) ? Math.max(0, retry) : null };
  try {
    const { error, detail } = await response.json();
    const message = error?.message ?? detail;
    if (typeof message === "string") return new ServerError(message, { ...details, param: error?.param ?? null });
  } catch {
    // Not JSON, such as the page of a proxy.
  }
  return new ServerError("", { ...details, key: "badAnswer" });
}

export async function modelName() {
  const response = await request("v1/models");
  try {
    return (await response.json()).data[0].id;
  } catch {
    throw new ServerError("", { status: response.status, key: "badAnswer" });
  }
}

export async function cancelRequest(id, branch = null) {
  await request(`v1/requests/${encodeURIComponent(id)}/cancel`, { body: branch === null ? {} : { branch } });
}

// Sends a request whose answer is a stream; it is accepted when this returns the iterator of its chunks.
export async function openStream(path, body, signal) {
  const response = await request(path, { body, signal });
  if (!(response.headers.get("Content-Type") ?? "").startsWith("text/event-stream") || !response.body) {
    throw new ServerError("", { status: response.status, key: "badAnswer" });
  }
  return chunksOf(response.body);
}

async function* chunksOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError("", { key: "endedEarly" });
      const lines = (waiting + value).split(/\r\n|\n|\r(?!$)/);
      waiting = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message, { param: chunk.error.param ?? null });
        yield chunk;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("", { key: "endedEarly" });
  } finally {
    reader.cancel().catch(() => {});
  }
}

// What a chunk of either route says about its branches: new text, new tokens, and how a branch ended.
export function piecesOf(chunk) {
  return (chunk.choices ?? []).map((choice) => {
    const text = choice.delta?.content ?? choice.text ?? "";
    // Text without log probabilities is the rest that was held back of an answer that was stopped.
    const tokens = choice.logprobs?.content?.length ?? choice.logprobs?.tokens?.length ?? 0;
    return { index: choice.index, text, tokens, finished: choice.finish_reason ?? null };
  });
}

// The body of a request: the document, the turns of a follow-up, one branch for each question. Log probabilities are
// asked for because they alone say how many tokens a chunk has.
export function requestBody({ document: text, turns, questions, settings }, model, isChat) {
  const shared = { model, branches: questions, stream: true, stream_options: { include_usage: true }, ...settings };
  if (isChat) {
    const system = text ? [{ role: "system", content: text }] : [];
    const earlier = turns.flatMap(({ question, answer }) => [
      { role: "user", content: question }, { role: "assistant", content: answer },
    ]);
    return { ...shared, messages: [...system, ...earlier], logprobs: true };
  }
  const paragraphs = [text, ...turns.map(({ question, answer }) => question + answer)].filter(Boolean);
  return { ...shared, prompt: paragraphs.map((it) => (it.endsWith("\n") ? it : `${it}\n\n`)).join(""), logprobs: 1 };
}
