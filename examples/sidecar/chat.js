"use strict";
// A chat in the terminal over the sidecar: `node chat.js MODEL [options of acd-run]`. Ctrl-C stops an answer, or ends.

const { createInterface } = require("node:readline");
const { Sidecar } = require("./sidecar.js");

async function main() {
  const args = process.argv.slice(2);
  const worker = new Sidecar(args.length ? args : ["demo"]);
  worker.on("loading", ({ phase, progress }) => note(`${phase} ${Math.round(100 * progress)}%`));
  worker.on("ready", ({ model, pair }) => note(`${model.name} under the pair ${pair.name}, process ${worker.pid}`));
  worker.on("crash", (error) => note(`${error.message}; it is started again`));

  let answering = null; // what stops the answer that is being made
  process.on("SIGINT", () => (answering ? answering.abort() : worker.close().then(() => process.exit(130))));

  await worker.ready;
  const messages = []; // the application keeps the conversation: a worker that is started again knows nothing
  for await (const line of createInterface({ input: process.stdin })) {
    messages.push({ role: "user", content: line });
    answering = new AbortController();
    try {
      const answer = await say(worker.ask({ messages }, answering.signal));
      messages.push({ role: "assistant", content: answer });
    } catch (error) {
      messages.pop();
      note(error.message); // the request was refused, or the worker crashed
    }
    answering = null;
  }
  await worker.close();
}

/** Write an answer as it comes; returns its text. */
async function say(events) {
  for await (const event of events) {
    if (event.event === "gate") note(`chance of harm ${event.probability.toFixed(3)}: ${event.decision}`);
    if (event.event === "token") process.stdout.write(event.text);
    if (event.event === "done") {
      process.stdout.write("\n");
      note(`${event.finish_reason}, ${event.contrast.changed_tokens} tokens changed`);
      return event.text;
    }
  }
}

function note(text) {
  process.stderr.write(`[${text}]\n`);
}

main().catch((error) => {
  note(error.message); // the worker cannot start
  process.exitCode = 1;
});
