// Requests to the service that this page comes from.

/** What the service says about a request that it refuses, or that has failed. */
export class ServiceError extends Error {
  constructor({ message, param = null }, status = 0) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;

/**
 * JSON of a request. `typed` are texts of fields: a number goes out digit by digit, since a seed of
 * 63 bits is no number of JavaScript; what is no number goes out as text, for the service to refuse
 * in its words; an empty field does not go out.
 */
export function requestBody(fixed, typed) {
  const parts = Object.entries(fixed).map(([name, value]) => [name, JSON.stringify(value)]);
  for (const [name, given] of Object.entries(typed)) {
    const text = given.trim();
    if (text !== "") parts.push([name, NUMBER.test(text) ? text : JSON.stringify(text)]);
  }
  return `{${parts.map(([name, json]) => `${JSON.stringify(name)}:${json}`).join(",")}}`;
}

/** The served model. Throws ServiceError. */
export async function servedModel(key) {
  const answer = await call("v1/models", { headers: headers(key) });
  return (await answer.json()).data[0];
}

/** Chunks of a streamed completion as they come. Throws ServiceError; an abort ends it. */
export async function* chunks(body, key, signal) {
  const answer = await call("v1/completions", {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body,
    signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServiceError(chunk.error);
    const seed = /"seed":(\d+)/.exec(data);
    yield { ...chunk, seed: seed === null ? null : seed[1] };
  }
  throw new ServiceError({ message: "the stream ended before the answer did" });
}

async function call(path, options) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError({ message: "the service cannot be reached" });
  }
  if (!answer.ok) throw new ServiceError(await fault(answer), answer.status);
  return answer;
}

/** The error of an answer; a proxy in between may have written something else. */
async function fault(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error ?? { message: `the service answers ${answer.status}` };
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return { message: `the service answers ${answer.status} ${answer.statusText}`.trim() };
  }
}

function headers(key) {
  return key === "" ? {} : { authorization: `Bearer ${key}` };
}

/** The data of server-sent events, one by one. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const whole = (rest + value).split("\n\n");
      rest = whole.pop();
      for (const each of whole) if (each.startsWith("data: ")) yield each.slice(6);
    }
  } finally {
    await reader.cancel().catch((error) => {
      if (error.name !== "AbortError") throw error;
    });
  }
}
