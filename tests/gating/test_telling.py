"""What commands, chats, workers and asyncio tell of a gate, and which gates they refuse."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gates
import numpy as np
import pytest
from gated import GREEDY, SEEDED, turning
from gates import HARMFUL, HARMLESS
from places import child_env

from acd_local import Engine, aio
from acd_local.answers import Answer, GateDecision
from acd_local.cli.run import command
from acd_local.cli.shell import run_cli
from acd_local.errors import EngineClosedError, ModelError
from acd_local.pairs import PromptPair
from acd_local.runtime import llama
from acd_local.runtime.template import Message

# --- Broken gates, through the command line ---------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run_cli(command, "acd-run", [*args, "--no-stdin", "-t", "1", "-c", "512"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    from safetensors.numpy import load, save

    data = path.read_bytes()
    tensors = dict(load(data))
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    change(tensors, metadata)
    path.write_bytes(save(tensors, metadata=metadata))


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], None], str]] = {
    "missing": (lambda t, m: t.pop("gate.request.bias"), "must hold soft prompts .* or a gate"),
    "shape": (lambda t, m: t.update({"gate.request.weight": np.zeros(64, np.float32)}), "gate.request: a probe has"),
    "rows": (lambda t, m: t.update({"gate.request.weight": np.zeros((2, 64), np.float32)}), "request: the probe has"),
    "width": (lambda t, m: t.update({"gate.request.weight": np.zeros((1, 32), np.float32)}), "request: the probe has"),
    "bias": (lambda t, m: t.update({"gate.request.bias": np.zeros(2, np.float32)}), "the bias of a probe is one"),
    "infinite": (lambda t, m: t.update({"gate.request.bias": np.array([np.inf], np.float32)}), "not finite"),
    "layer": (lambda t, m: m.update(layers="3"), r"the layers \(3,\) cannot be read: the model has 4"),
    "layers": (lambda t, m: m.update(layers="x"), "metadata layers: must be a whole number"),
    "model": (lambda t, m: m.update(tokenizer="0" * 64), "gate: made for another model .*: tokenizer"),
    "size": (lambda t, m: m.update(n_layer="9"), "gate: made for another model .*: number of layers 9"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_gate_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, case: str) -> None:
    pair = gates.write_pair(tmp_path, model)
    assert pair.path is not None
    change, problem = BROKEN[case]
    rewrite(pair.path.with_suffix(".safetensors"), change)
    code, out, err = run(capsys, str(model), "Hi.", "-n", "2", "--pair", str(pair.path))
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert re.search(problem, err), err


def test_a_gate_without_its_file_or_with_another(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    pair = gates.write_pair(tmp_path, model)
    assert pair.path is not None
    toml = pair.path.read_text()
    pair.path.write_text(toml.replace("[gate]", f'sha256 = "{"0" * 64}"\n[gate]'))
    code, out, err = run(capsys, str(model), "Hi.", "-n", "2", "--pair", str(pair.path))
    assert (code, out, err.count("\n")) == (5, "", 1) and "not the vectors that gated.toml was written with" in err
    pair.path.write_text(toml)
    pair.path.with_suffix(".safetensors").unlink()
    code, out, err = run(capsys, str(model), "Hi.", "-n", "2", "--pair", str(pair.path))
    assert (code, out, err.count("\n")) == (5, "", 1) and "has a [gate], but no gated.safetensors" in err
    code, out, err = run(capsys, str(model), "Hi.", "-n", "2", "--pair", str(pair.path), "--gate", "off")
    assert code == 0


def test_layers_that_cannot_be_read_are_said_with_a_way_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = llama._Capture.__init__

    def unnamed(self: Any, layers: Any, n_embd: int) -> None:
        original(self, [layer + 90 for layer in layers], n_embd)  # names that no graph has

    monkeypatch.setattr(llama._Capture, "__init__", unnamed)
    with Engine(engine.info.path, pair=engine.pair, ctx_size=512, threads=1) as other:
        with pytest.raises(ModelError, match=r"does not name the layers .* --gate off"):
            other.generate(HARMLESS, GREEDY).run()
        assert other.generate(HARMLESS, GREEDY.replace({"gate": False})).run().text


# --- What is told -----------------------------------------------------------------------------------------------------


def test_json_stats_and_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    pair = turning(tmp_path, model)
    trace = tmp_path / "trace.jsonl"
    given = (
        str(model),
        HARMLESS,
        "-n",
        "12",
        "--seed",
        "11",
        "--pair",
        str(pair.path),
        "--trace",
        str(trace),
        "--stats",
    )
    code, out, err = run(capsys, *given, "--json")
    assert code == 0
    record = json.loads(out)["gate"]
    assert record == {"probability": 0.1, "decision": "as-is", "contrast_from": 4, "looks": [[4, 0.95]]}
    assert "gate       chance of harm 0.100: the model as it is; " in err and ", the pair from token 4 on" in err
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert lines[0] == {"gate": {"probability": 0.1, "decision": "as-is", "position": 0}}
    assert lines[5] == {"gate": {"probability": 0.95, "decision": "contrast", "position": 4}}
    assert sum("token" in line for line in lines) == 12 == len(lines) - 2
    code, out, err = run(capsys, *given, "--json", "--gate", "off")
    assert json.loads(out)["gate"] is None and "chance of harm" not in err
    code, out, err = run(capsys, *given, "--json", "--gate-threshold", "0.05")
    assert json.loads(out)["gate"]["decision"] == "contrast"
    code, out, err = run(capsys, *given, "--gate-threshold", "2")
    assert code == 2 and "gate_threshold must be in [0, 1]" in err


def test_the_worker_tells_and_takes_what_the_gate_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    pair = turning(tmp_path, model)
    requests = [
        {"id": 1, "prompt": HARMLESS},
        {"id": 2, "prompt": HARMLESS, "gate": False},
        {"id": 3, "prompt": HARMLESS, "gate_threshold": 0.05},
        {"id": 4, "prompt": HARMLESS, "gate": "on"},
    ]
    code = "import sys; from acd_local.cli.run import main; sys.argv[0] = 'acd-run'; main()"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(model),
            "--jsonl",
            "-t",
            "1",
            "-c",
            "512",
            "--temp",
            "0",
            "-n",
            "8",
            "--pair",
            str(pair.path),
        ],
        input="\n".join(map(json.dumps, requests)),
        capture_output=True,
        text=True,
        env=child_env(),
        check=True,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    ready = next(event for event in events if event["event"] == "ready")
    assert ready["options"]["gate"] is None and ready["options"]["gate_threshold"] is None
    told = [(e["id"], e["decision"], e["position"]) for e in events if e["event"] == "gate"]
    assert told == [(1, "as-is", 0), (1, "contrast", 4), (3, "contrast", 0)]
    ends = {event["id"]: event for event in events if event.get("final")}
    assert ends[1]["gate"]["contrast_from"] == 4 and ends[1]["gate"]["looks"] == [[4, 0.95]]
    assert ends[2]["gate"] is None
    assert ends[3]["gate"]["decision"] == "contrast"
    assert ends[4]["event"] == "error" and ends[4]["message"] == "gate must be true or false, not 'on'"


def test_a_chat_reads_every_turn_and_regenerates(engine: Engine) -> None:
    chat = engine.chat(options=SEEDED)
    chat.ask(HARMLESS)
    answer = chat.ask(HARMFUL)
    again = chat.regenerate().run()
    read = engine.gate_probability([*chat.messages][:-1])
    for gate in (answer.gate, again.gate):
        assert gate is not None and gate.probability == pytest.approx(read, abs=1e-4)


def test_a_conversation_under_the_pair_is_decoded_once(model: Path, pair: PromptPair) -> None:
    """Every turn is read under the model's own prompt, and both streams keep what they hold."""
    options = GREEDY.replace({"gate_threshold": 0.0})
    with Engine(model, pair=pair, ctx_size=1024, threads=1) as gated, Engine(model, pair=pair, ctx_size=1024) as other:
        talk, beyond = [Message("user", HARMFUL)], []
        for text in ("And then?", "And then?", "More."):
            answer = gated.generate(talk, options).run()
            paper = other.generate(talk, options.replace({"gate": False})).run()
            beyond.append(answer.prompt_decoded - paper.prompt_decoded)
            talk += [Message("assistant", "First this."), Message("user", text)]
    assert max(beyond[1:]) < 40  # rows of the last turn, which are read


def test_under_asyncio_the_decision_is_an_event(engine: Engine) -> None:
    async def ask() -> tuple[list[Any], Answer]:
        events: list[Any] = []
        stream = aio.AsyncEngine(engine).generate(HARMFUL, GREEDY, on_event=events.append)
        return events, await stream.run()

    events, answer = asyncio.run(ask())
    assert answer.gate is not None
    assert GateDecision(answer.gate.probability, "contrast", 0) in events


def test_what_reads_is_freed_with_the_engine(model: Path, pair: PromptPair) -> None:
    engine = Engine(model, pair=pair, ctx_size=512, threads=1)
    assert engine.decoder._reader is None
    engine.gate_probability(HARMLESS)
    reader = engine.decoder._reader
    assert reader is not None
    engine.close()
    with pytest.raises(EngineClosedError):
        reader.read([1, 2, 3], 0)
    with pytest.raises(EngineClosedError):
        engine.gate_probability(HARMLESS)
