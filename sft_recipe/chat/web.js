"use strict";
// A client of the server's own API: every model has its own history, and all texts are inserted as text.
const $ = (id) => document.getElementById(id);
const talk = $("talk"), form = $("form"), question = $("question"), state = $("state"), key = $("key");
let models = [], histories = {}, running = null;

const headers = () => ({"Content-Type": "application/json", ...(key.value && {Authorization: `Bearer ${key.value}`})});
const shown = () => ($("compare").checked ? models : models.slice(-1));

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

async function connect() {
  let response;
  try {
    response = await fetch("v1/models", {headers: headers()});
  } catch {
    state.textContent = "The server cannot be reached.";
    return;
  }
  $("login").hidden = response.status !== 401;
  if (!response.ok) {
    state.textContent = response.status === 401 ? "The server asks for its key." : await failure(response);
    return;
  }
  models = (await response.json()).data.map((model) => model.id).reverse(); // the one that was trained comes last
  $("compare-label").hidden = models.length < 2;
  $("compare").checked = models.length > 1;
  $("title").textContent = models[models.length - 1];
  document.title = `Chat: ${models[models.length - 1]}`;
  $("send").disabled = false;
  state.textContent = "";
  reset();
}

function reset() {
  running?.abort();
  histories = Object.fromEntries(models.map((model) => [model, []]));
  talk.replaceChildren();
  question.focus();
}

function request(model) {
  const system = $("system").value.trim();
  const messages = [...(system ? [{role: "system", content: system}] : []), ...histories[model]];
  const body = {model, messages, stream: true};
  for (const name of ["temperature", "max_tokens"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  return JSON.stringify(body);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// Adds something to the page, and scrolls to it unless the reader has scrolled up.
function follow(change) {
  const page = document.documentElement;
  const isAtEnd = innerHeight + scrollY >= page.scrollHeight - 40;
  change();
  if (isAtEnd) scrollTo(0, page.scrollHeight);
}

function panel(model, row) {
  const card = element("section", "card answer");
  const thoughts = element("details", "thoughts"), reasoning = element("div", "text");
  const content = element("div", "text"), note = element("p", "muted");
  thoughts.append(element("summary", "", "reasoning"), reasoning);
  thoughts.hidden = true;
  card.append(element("h2", "", model), thoughts, content, note);
  row.append(card);
  return {card, thoughts, reasoning, content, note};
}

async function answer(model, parts, signal) {
  const message = {role: "assistant", content: ""}, history = histories[model];
  try {
    const response = await fetch("v1/chat/completions", {method: "POST", headers: headers(), body: request(model), signal});
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const {delta, finish_reason: reason} = event.choices[0];
      for (const [field, place] of [["content", parts.content], ["reasoning_content", parts.reasoning]]) {
        if (!delta[field]) continue;
        message[field] = (message[field] ?? "") + delta[field];
        follow(() => {
          place.append(delta[field]);
          parts.thoughts.hidden = !message.reasoning_content;
        });
      }
      if (reason === "length") parts.note.textContent = "cut off at the largest number of tokens";
    }
    if (!message.content) parts.note.textContent ||= "an empty answer";
  } catch (error) {
    parts.note.textContent = error.name === "AbortError" ? "stopped" : error.message;
    parts.card.classList.toggle("failed", error.name !== "AbortError");
    if (!message.content) {
      history.pop(); // a question without an answer is no part of the conversation
      return;
    }
  }
  history.push(message);
}

async function ask(text) {
  const row = element("div", "row");
  talk.append(element("p", "question", text), row);
  const asked = shown(), own = new AbortController();
  running = own;
  $("send").hidden = true;
  $("stop").hidden = false;
  talk.setAttribute("aria-busy", "true");
  const panels = asked.map((model) => panel(model, row));
  scrollTo(0, document.documentElement.scrollHeight);
  for (const model of asked) histories[model].push({role: "user", content: text});
  await Promise.all(asked.map((model, index) => answer(model, panels[index], own.signal)));
  if (running !== own) return; // a new conversation has begun meanwhile
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  talk.setAttribute("aria-busy", "false");
  question.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || running || !models.length) return;
  question.value = "";
  ask(text);
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("reset").addEventListener("click", reset);
$("compare").addEventListener("change", reset); // both answer the same conversation
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});
connect();
