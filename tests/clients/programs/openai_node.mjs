// The openai package of npm: an answer, and a stream.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none" });
const ask = { model: "pystdlib", prompt: "def f(x):", max_tokens: 24, seed: 5 };
const whole = await client.completions.create(ask);
let streamed = "";
for await (const piece of await client.completions.create({ ...ask, stream: true })) {
  streamed += piece.choices[0]?.text ?? "";
}
let status = null;
try {
  await client.completions.create({ ...ask, temperature: -1 });
} catch (error) {
  status = [error.status, error.param];
}
console.log(JSON.stringify({ text: whole.choices[0].text, streamed, status }));
