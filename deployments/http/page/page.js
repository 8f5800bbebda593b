// The playground: a request from the form, its stream into two columns, errors beside their fields.

import { Column, place } from "./column.js";
import { ServiceError, chunks, requestBody, servedModel } from "./service.js";
import { Trace } from "./trace.js";

// Modes that are shown beside ar.
const MODES = ["mask_diffusion", "verified", "auto"];
// Fields of the form that are fields of a request, and those of them that ar knows.
const FIELDS = [
  "quality", "confidence_threshold", "steps_per_block", "block_size", "max_tokens", "temperature",
  "seed",
];
const AR_FIELDS = ["max_tokens", "temperature", "seed"];
const WITH_ERRORS = ["key", "prompt", "mode", ...FIELDS];

const at = (id) => document.getElementById(id);
const clock = () => performance.now() / 1000;
const denoised = new Column(at("denoised"), (text) => {
  at("live").textContent = text;
});
const beside = new Column(at("ar"));

let model = null;
let running = null;
let history = [];

/** Reads what is served. A service that wants a key gets its field. */
async function connect() {
  try {
    model = await servedModel(at("key").value);
  } catch (error) {
    report(error);
    return;
  }
  at("key-field").hidden = at("key").value === "";
  at("model").textContent = `${model.id}, context of ${model.max_model_len} tokens`;
  if (!model.has_tokenizer) {
    at("prompt-label").textContent = "Prompt: token ids with commas between (no tokenizer is served)";
    at("prompt").value = "1, 2, 3";
  }
  const modes = model.modes.filter((mode) => MODES.includes(mode));
  const offered = modes.length > 0 ? modes : model.modes;
  at("mode").replaceChildren(...offered.map((mode) => new Option(mode)));
  if (modes.length === 0 || !model.modes.includes("ar")) {
    at("beside").checked = false;
    at("beside").disabled = true;
  }
  showColumns();
}

/** Sends the request of the form, and the same in ar beside it. */
async function start() {
  if (running !== null) return;
  clearErrors();
  if (model === null) await connect();
  if (model === null) return;
  const abort = new AbortController();
  running = abort;
  showRunning();
  reveal(at("columns"));
  const mode = at("mode").value;
  const together = at("beside").checked ? [denoised, beside] : [denoised];
  for (const column of together) {
    column.reset(at("prompt").value, Number(at("pace").value), together);
  }
  const streams = [run(denoised, mode, abort, mode === "ar" ? AR_FIELDS : FIELDS)];
  if (together.includes(beside)) streams.push(run(beside, "ar", abort, AR_FIELDS));
  const [main, other] = await Promise.all(streams);
  const stopped = abort.signal.aborted;
  running = null;
  showRunning();
  if (main.failed || other?.failed) say("Refused or failed.");
  else say(stopped ? "Stopped." : summary(main.trace));
  offerReplay(main.trace);
}

/** Streams one request into a column until its last frame is shown. */
async function run(column, mode, abort, fields) {
  const trace = new Trace(mode, clock);
  try {
    const usage = await read(column, trace, bodyOf(mode, fields), abort.signal);
    column.add([trace.end(usage)]);
    await Promise.race([column.ended, aborted(abort.signal)]);
    abort.signal.throwIfAborted();
    return { trace, failed: false };
  } catch (error) {
    column.finish(trace.frames.findLast((frame) => frame.ends) ?? trace.end(null));
    if (error.name === "AbortError") return { trace, failed: false };
    report(error);
    abort.abort();
    return { trace, failed: true };
  }
}

/** Feeds the stream of a request to a column. Gives its usage. */
async function read(column, trace, body, signal) {
  let usage = null;
  for await (const chunk of chunks(body, at("key").value, signal)) {
    if (chunk.usage) usage = chunk.usage;
    if (chunk.seed !== null && column === denoised) at("seed").placeholder = chunk.seed;
    for (const choice of chunk.choices) {
      const { provisional, block } = choice.twotower ?? {};
      if (provisional) column.offer(trace.draft(provisional));
      if (block) column.add(trace.block(block, choice.text || idsOf(block)));
    }
  }
  return usage;
}

function bodyOf(mode, fields) {
  const typed = Object.fromEntries(fields.map((name) => [name, at(name).value]));
  const options = { include_usage: true };
  const fixed = { prompt: prompt(), mode, stream: true, provisional: true, stream_options: options };
  return requestBody(fixed, typed);
}

/** The prompt; ids of a service without a tokenizer as numbers. */
function prompt() {
  const text = at("prompt").value;
  if (model.has_tokenizer || !/^\s*\d+(\s*,\s*\d+)*\s*$/.test(text)) return text;
  return text.split(",").map(Number);
}

function idsOf(block) {
  return model.has_tokenizer ? "" : block.token_ids.map((token) => ` ${token}`).join("");
}

function aborted(signal) {
  return new Promise((resolve) => {
    signal.addEventListener("abort", resolve, { once: true });
  });
}

function summary(trace) {
  const { tokens, nfe, context } = trace.total;
  return `Done: ${tokens} tokens in ${nfe + context} passes.`;
}

/** Puts an error beside the field that is at fault, or where errors of no field stand. */
function report(error) {
  if (!(error instanceof ServiceError)) {
    at("problem").textContent = "This page has failed; the browser's console says where.";
    throw error;
  }
  if (error.status === 401) at("key-field").hidden = false;
  const name = error.status === 401 ? "key" : error.param;
  if (!WITH_ERRORS.includes(name)) {
    at("problem").textContent = error.message;
    return;
  }
  at(`${name}-error`).textContent = error.message;
  at(name).setAttribute("aria-invalid", "true");
  at(name).focus();
}

function clearErrors() {
  at("problem").textContent = "";
  for (const name of WITH_ERRORS) {
    at(`${name}-error`).textContent = "";
    at(name).removeAttribute("aria-invalid");
  }
}

function say(text) {
  at("status").textContent = text;
}

function showRunning() {
  const isRunning = running !== null;
  const [off, on] = isRunning ? [at("start"), at("stop")] : [at("stop"), at("start")];
  // A button that is switched off would leave the keyboard nowhere.
  const hadFocus = document.activeElement === off;
  on.disabled = false;
  if (hadFocus) on.focus();
  off.disabled = true;
  at("replay").disabled = true;
  at("replay-value").textContent = "";
  if (isRunning) {
    say("Running");
    at("live").textContent = "";
  }
}

/** Scrolls to what a narrow window has below its end. */
function reveal(part) {
  if (part.getBoundingClientRect().top > innerHeight / 2) part.scrollIntoView();
}

function showColumns() {
  const mode = at("mode").value;
  at("denoised-title").textContent = mode;
  at("quality-field").hidden = mode !== "auto";
  at("ar").hidden = !at("beside").checked;
  at("columns").classList.toggle("two", at("beside").checked);
}

/** Makes all passes of the last request reachable with the slider, or with the arrow keys. */
function offerReplay(trace) {
  history = trace.frames;
  const slider = at("replay");
  slider.max = history.length - 1;
  slider.value = slider.max;
  slider.disabled = history.length < 2;
  showReplay();
}

function showReplay() {
  const frame = history[at("replay").value];
  denoised.draw(frame);
  denoised.follow();
  const words = frame.ends ? "end" : place(frame);
  at("replay").setAttribute("aria-valuetext", words);
  at("replay-value").textContent = words;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
at("stop").addEventListener("click", () => running?.abort());
at("replay").addEventListener("input", showReplay);
at("beside").addEventListener("change", showColumns);
at("mode").addEventListener("change", showColumns);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  }
});
for (const name of ["confidence_threshold", "steps_per_block"]) {
  const show = () => {
    const value = Number(at(name).value);
    at(`${name}-value`).textContent = name === "steps_per_block" ? `${value}` : value.toFixed(2);
  };
  at(name).addEventListener("input", show);
  show();
}
showColumns();
connect();
