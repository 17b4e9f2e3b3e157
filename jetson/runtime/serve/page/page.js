// Talks to the server that it came from, and to nobody else. What the model says is text, never HTML.
"use strict";

const at = (id) => document.getElementById(id);
let model = null; // of /v1/models
let said = []; // messages of the chat; without a template, all the text is in one
let running = null; // AbortController of the answer under way

function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.ok) return response;
  if (response.status === 401) at("settings").open = true;
  const told = await response.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${response.status}`);
}

const post = (path, body, signal) =>
  call(path, { method: "POST", body: JSON.stringify(body), signal });

function scroll() {
  at("talk").scrollTop = at("talk").scrollHeight;
}

function show(role, text) {
  const box = document.createElement("div");
  box.className = `said ${role}`;
  box.textContent = text;
  at("talk").append(box);
  scroll();
  return box;
}

const size = (bytes) =>
  bytes < 2 ** 20 ? `${(bytes / 2 ** 10).toFixed(1)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;

async function connect() {
  try {
    model = (await (await call("/v1/models")).json()).data[0];
  } catch (error) {
    at("engine").textContent = error.message;
    return;
  }
  at("model").textContent = document.title = model.id;
  const context = model.context ? `context of ${model.context} tokens` : "no limit of context";
  at("engine").textContent =
    `${model.backend} · ${size(model.state_bytes_per_sequence)} of state · ${context}`;
  at("system-label").hidden = !model.chat;
  at("hint").textContent = model.chat
    ? "Ask something."
    : "This model was not made for chats: it goes on from what you write.";
  await showStates();
}

async function showStates() {
  const states = await (await call("/v1/states")).json();
  at("held").textContent = `${states.cache.states} (${size(states.cache.bytes)})`;
  at("states").replaceChildren(
    ...states.data.map((state) => {
      const row = document.createElement("li");
      const name = document.createElement("span");
      const facts = document.createElement("small");
      const remove = document.createElement("button");
      name.textContent = state.id;
      facts.textContent = `${state.tokens} tokens, ${size(state.bytes)}`;
      remove.textContent = "×";
      remove.className = "quiet";
      remove.setAttribute("aria-label", `delete ${state.id}`);
      remove.onclick = () =>
        call(`/v1/states/${state.id}`, { method: "DELETE" }).then(showStates, wrong);
      row.append(name, facts, remove);
      return row;
    }),
  );
}

// What was said so far, as a request has it.
function soFar() {
  if (!model.chat) return { prompt: written() };
  const system = at("system").value.trim();
  return { messages: system ? [{ role: "system", content: system }, ...said] : said };
}

const written = () => said.map((each) => each.content).join("");

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer() {
  const box = show("assistant", "");
  const text = box.appendChild(document.createTextNode(""));
  running = new AbortController();
  busy(true);
  try {
    const path = model.chat ? "/v1/chat/completions" : "/v1/completions";
    const settings = {
      temperature: Number(at("temperature").value),
      max_tokens: Number(at("tokens").value),
      stream: true,
      stream_options: { include_usage: true },
    };
    const response = await post(path, { ...soFar(), ...settings }, running.signal);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      text.data += choice?.delta?.content ?? choice?.text ?? "";
      if (event.usage) box.append(told(event));
      scroll();
    }
  } catch (error) {
    if (error.name !== "AbortError") wrong(error);
  } finally {
    running = null;
    busy(false);
    if (text.data) said.push({ role: "assistant", content: text.data });
    else box.remove();
    showStates().catch(wrong);
  }
}

function told({ usage, timings }) {
  const cached = usage.prompt_tokens_details.cached_tokens;
  const line = document.createElement("small");
  const rate = timings.tokens_per_s ? `${timings.tokens_per_s.toFixed(1)} tokens/s` : "";
  at("speed").textContent = rate;
  line.textContent =
    `${usage.prompt_tokens} tokens read, ${cached} of them from a state · ` +
    `first token after ${timings.prompt_s.toFixed(2)} s · ${usage.completion_tokens} new` +
    (rate && ` · ${rate}`);
  return line;
}

function busy(yes) {
  at("send").disabled = yes;
  at("stop").hidden = !yes;
}

function wrong(error) {
  show("wrong", error.message);
}

at("ask").onsubmit = async (event) => {
  event.preventDefault();
  if (!model) await connect();
  const text = at("text").value;
  if (!text.trim() || running || !model) return;
  at("text").value = "";
  at("hint").hidden = true;
  said.push({ role: "user", content: text });
  show("user", text);
  await answer();
};

at("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("ask").requestSubmit();
};

at("stop").onclick = () => running?.abort();
at("key").onchange = connect;

at("anew").onclick = () => {
  running?.abort();
  said = [];
  at("talk").replaceChildren(at("hint"));
  at("hint").hidden = false;
};

at("save").onsubmit = async (event) => {
  event.preventDefault();
  if (!said.length) return;
  try {
    await post("/v1/states", { name: at("name").value, ...soFar() });
    at("name").value = "";
    await showStates();
  } catch (error) {
    wrong(error);
  }
};

connect().catch(wrong);
