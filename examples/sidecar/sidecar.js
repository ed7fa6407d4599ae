"use strict";
// Keeps `acd-run MODEL --jsonl` running beside an application (Electron's main process, a server, a script). The
// protocol is described in docs/worker.md.

const { spawn } = require("node:child_process");
const { EventEmitter, once } = require("node:events");
const { createInterface } = require("node:readline");

const PATIENCE = 5000; // milliseconds that a worker has to end when it is asked to

/** What the worker said in an `error` event. `code` is "usage", "model", "pair", "out_of_memory", ... */
class WorkerError extends Error {
  constructor(event) {
    super(event.message);
    this.code = event.code;
  }
}

/**
 * Events:
 *   "loading" ({ phase, progress })  the model is being checked or read; progress goes from 0 to 1
 *   "ready" (record)                 model, pair, context size and options; again after every restart
 *   "crash" (Error)                  the worker ended by itself; it is being started again
 *
 * A worker that ends before it is ready (no such model, out of memory) is not started again: `ready` rejects.
 */
class Sidecar extends EventEmitter {
  #args;
  #child;
  #closing = false;
  #inboxes = new Map(); // request id -> where its events go
  #lastId = 0;

  /** @param {string[]} args of acd-run, the model first */
  constructor(args) {
    super();
    this.#args = [...args, "--jsonl"];
    this.#start();
  }

  #start() {
    const child = (this.#child = spawn("acd-run", this.#args, {
      // A pipe closes when this process ends, however it ends, and the worker ends with it.
      stdio: ["pipe", "pipe", "inherit"],
      // A process group of its own: Ctrl-C in a terminal is for this program alone.
      detached: process.platform !== "win32",
    }));
    let failure = null; // why it never became ready
    let isReady = false;

    /** The worker's `ready` event, as soon as it is there. Rejects if the worker cannot start. */
    this.ready = new Promise((resolve, reject) => {
      child.on("error", (error) => (failure = new Error(`cannot start acd-run (${error.code}): is it installed?`)));
      child.stdin.on("error", () => {}); // it is gone: "close" follows
      createInterface({ input: child.stdout }).on("line", (line) => {
        const event = JSON.parse(line);
        if (event.event === "ready") {
          isReady = true;
          resolve(event);
          this.emit("ready", event);
        } else if (event.event === "loading") {
          this.emit("loading", event);
        } else if (!isReady) {
          failure = new WorkerError(event);
        } else {
          this.#inboxes.get(event.id)?.put(event);
        }
      });
      child.on("close", (code, signal) => {
        const error = failure ?? new Error(`the worker ended (${signal ?? `exit code ${code}`})`);
        reject(error); // does nothing where it was ready
        for (const inbox of this.#inboxes.values()) inbox.fail(error);
        if (isReady && !this.#closing) {
          this.#start();
          this.emit("crash", error);
        }
      });
    });
    this.ready.catch(() => {}); // whoever awaits it is told
  }

  get pid() {
    return this.#child.pid;
  }

  /**
   * Ask for an answer, and iterate over its events: "token" has a piece of text, "done" is the last.
   *
   * @param {object} request `messages` or `prompt`, and any option of an answer
   * @param {AbortSignal} [signal] stops the answer, which then ends with `finish_reason` "cancelled"; so does leaving
   *   the loop
   * @throws {WorkerError} the request is refused. {Error} the worker ended; asking again is safe.
   */
  async *ask(request, signal) {
    await this.ready;
    const id = ++this.#lastId;
    const inbox = new Inbox();
    const cancel = () => this.#send({ id, cancel: true });
    this.#inboxes.set(id, inbox);
    try {
      this.#send({ ...request, id });
      if (signal?.aborted) cancel();
      signal?.addEventListener("abort", cancel);
      let event;
      do {
        event = await inbox.take();
        if (event.event === "error" && event.final) throw new WorkerError(event);
        yield event;
      } while (!event.final);
    } finally {
      signal?.removeEventListener("abort", cancel);
      this.#inboxes.delete(id);
      if (!inbox.ended) cancel();
    }
  }

  /** End the worker; answers that are being made are cancelled. */
  async close() {
    this.#closing = true;
    const child = this.#child;
    if (child.exitCode !== null || child.signalCode !== null || child.pid === undefined) return;
    const gone = once(child, "close");
    child.kill(); // SIGTERM: it cancels, says so, and ends
    const timer = setTimeout(() => child.kill("SIGKILL"), PATIENCE);
    await gone;
    clearTimeout(timer);
  }

  #send(line) {
    this.#child.stdin.write(JSON.stringify(line) + "\n");
  }
}

/** The events of one request, from the worker to whoever iterates. */
class Inbox {
  #events = [];
  #error = null;
  #wake = () => {};
  ended = false; // nothing comes any more

  put(event) {
    this.#events.push(event);
    this.ended ||= event.final === true;
    this.#wake();
  }

  fail(error) {
    this.#error = error;
    this.ended = true;
    this.#wake();
  }

  async take() {
    while (!this.#events.length) {
      if (this.#error) throw this.#error;
      await new Promise((resolve) => (this.#wake = resolve));
    }
    return this.#events.shift();
  }
}

module.exports = { Sidecar, WorkerError };
