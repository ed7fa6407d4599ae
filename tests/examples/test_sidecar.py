"""The sidecar for Node: a worker that is kept running, and that ends with its application, however that ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from example_programs import ENDLESS, EXAMPLES, Program, path_with_acd_run, wait_until_gone
from places import child_env

from acd_local import Engine, Options

NODE = shutil.which("node")
HERE = EXAMPLES / "sidecar"

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not installed"),
    pytest.mark.skipif(os.name == "nt", reason="acd-run is a shell script here"),
]


@pytest.fixture
def chat(tiny: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """chat("--temp", "0"): the chat over a tiny model, without a pair."""
    programs = []

    def start(*args: str, model: str = str(tiny("chatml"))) -> Program:
        command = [str(NODE), str(HERE / "chat.js"), model, "-t", "1", "-c", "512", "--pair", "as-is", *args]
        programs.append(Program(command, PATH=path_with_acd_run(tmp_path)))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


def worker_of(program: Program, number: int = 1) -> int:
    """The process of its first, second, ... worker, as soon as that is ready."""
    notes = program.until("err", ", process ", number)
    if not notes.endswith("\n"):
        program.until("err", "\n", notes.count("\n") + 1)
    return int(re.findall(r", process (\d+)\]", program.err)[number - 1])


def test_a_conversation(chat: Callable[..., Program], tiny: Callable[..., Path]) -> None:
    """Each answer knows those before it, and the worker ends with the chat."""
    with Engine(tiny("chatml"), pair="as-is", ctx_size=512, threads=1) as engine:
        known = engine.chat(options=Options(temp=0.0, max_tokens=8))
        expected = "".join(f"{known.ask(question).text}\n" for question in ("What is red?", "Why?"))
    program = chat("--temp", "0", "-n", "8")
    worker = worker_of(program)
    program.say("What is red?")
    program.say("Why?")
    code, out, err = program.end()
    assert (code, out) == (0, expected)
    assert err.startswith("[model 0%]") and err.count("[length, 0 tokens changed]") == 2
    wait_until_gone(worker)


def test_ctrl_c_stops_the_answer_and_not_the_worker(chat: Callable[..., Program]) -> None:
    program = chat("--grammar", ENDLESS)
    worker_of(program)
    for number in (1, 2):
        said = program.out.count("a")
        program.say("Hi")
        program.until("out", "a", said + 3)
        program.interrupt()
        program.until("err", "[cancelled, ", number)
    program.interrupt()  # nothing is being answered: the chat ends
    assert program.process.wait(30) == 130
    assert program.err.count(", process ") == 1 and "started again" not in program.err


def test_a_killed_worker_is_started_again(chat: Callable[..., Program]) -> None:
    program = chat("--grammar", ENDLESS)
    first = worker_of(program)
    program.say("Hi")
    program.until("out", "aaa")
    os.kill(first, signal.SIGKILL)
    program.until("err", "[the worker ended (SIGKILL)")
    second = worker_of(program, 2)
    assert "; it is started again]" in program.err
    assert second != first
    said = program.out.count("a")
    program.say("Hi")
    program.until("out", "a", said + 3)
    program.interrupt()
    program.until("err", "[cancelled, ")
    assert program.end()[0] == 0


@pytest.mark.parametrize("answering", [True, False])
def test_the_worker_ends_with_a_killed_parent(chat: Callable[..., Program], answering: bool) -> None:
    program = chat("--grammar", ENDLESS)
    worker = worker_of(program)
    if answering:
        program.say("Hi")
        program.until("out", "aaa")
    program.process.kill()
    wait_until_gone(worker)


def test_what_cannot_start_is_not_started_again(chat: Callable[..., Program], tmp_path: Path) -> None:
    code, out, err = chat(model="nosuch.gguf").end()
    assert (code, out) == (1, "") and err.count("[no such file: nosuch.gguf") == 1
    code, out, err = chat("--pair", "nosuch").end()
    assert (code, out) == (1, "") and err.count("[no prompt pair 'nosuch'") == 1
    command = [str(NODE), str(HERE / "chat.js")]
    done = subprocess.run(
        command, env=child_env(PATH=str(tmp_path / "empty")), capture_output=True, text=True, input="", timeout=60
    )
    assert (done.returncode, done.stderr) == (1, "[cannot start acd-run (ENOENT): is it installed?]\n")


PROGRAM = """
const { Sidecar } = require(process.argv[1] + "/sidecar.js");
const assert = require("node:assert");

async function main() {
  const worker = new Sidecar(process.argv.slice(2));
  const text = async (events) => {
    let said = "";
    for await (const event of events) if (event.event === "token") said += event.text;
    return said;
  };
  const options = { temp: 0, max_tokens: 6 };
  const alone = await text(worker.ask({ prompt: "Hi", ...options }));
  assert(alone);
  const both = [worker.ask({ prompt: "Hi", ...options }), worker.ask({ prompt: "Hi", ...options })];
  assert.deepEqual(await Promise.all(both.map(text)), [alone, alone]);

  const refused = { code: "usage", message: /did you mean temp/ };
  await assert.rejects(text(worker.ask({ prompt: "Hi", temperature: 1 })), refused);

  const endless = { prompt: "Hi", grammar: 'root ::= "a" root' };
  for await (const event of worker.ask(endless)) if (event.event === "token") break;
  const events = [];
  for await (const event of worker.ask(endless, AbortSignal.abort())) events.push(event);
  assert.equal(events.at(-1).finish_reason, "cancelled");
  assert.equal(await text(worker.ask({ prompt: "Hi", ...options })), alone);

  const running = worker.ask(endless);
  await running.next(); // it is accepted
  await Promise.all([text(running), worker.close()]);
  await worker.close();
  const never = new Sidecar(process.argv.slice(2));
  const failed = assert.rejects(text(never.ask(endless)), /the worker ended/);
  await never.close();
  await failed;
}
main();
"""


def test_the_library(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Several answers at once, a refusal, leaving the loop, a signal that was there before, closing in between."""
    arguments = [str(tiny("chatml")), "-t", "1", "-c", "512", "--pair", "as-is", "--parallel", "2"]
    command = [str(NODE), "-e", PROGRAM, str(HERE), *arguments]
    env = child_env(PATH=path_with_acd_run(tmp_path))
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
