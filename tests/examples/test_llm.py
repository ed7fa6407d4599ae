"""The plugin for the command line tool `llm`, under the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, child_env

from acd_local import Engine

llm = pytest.importorskip("llm", reason="llm is not installed")
if not hasattr(llm.models.Prompt, "messages"):
    pytest.skip("llm is older than 0.32", allow_module_level=True)

# The entry point, or where the package is not installed, what it does.
KNOWN = any(entry.value == "acd_local.cli.llm_plugin" for entry in metadata.entry_points(group="llm"))
REGISTER = (
    "" if KNOWN else "from llm.plugins import pm; from acd_local.cli import llm_plugin; pm.register(llm_plugin); "
)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """run("-m", "acd/demo", "Hi"): the command `llm`, with folders of its own."""

    def call(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", f"{REGISTER}from llm.cli import cli; cli()", *args]
        folders = child_env(LLM_USER_PATH=str(tmp_path / "llm"), **env)
        return subprocess.run(
            command, env=folders, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
        )

    return call


@pytest.fixture
def model(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from acd_local.cli import llm_plugin

    monkeypatch.setenv("ACD_MODEL", str(tiny("chatml")))
    model = llm_plugin.AcdModel("acd", None)
    yield model
    if model._engine is not None:
        model._engine.close()


def test_the_command(run: Callable[..., Any]) -> None:
    """An answer, a conversation that goes on, and what is kept of it."""
    options = ["-o", "temp", "0", "-o", "max_tokens", "8"]
    with Engine("demo") as engine:
        chat = engine.chat()
        expected = [chat.ask(question, temp=0.0, max_tokens=8) for question in ("What is red?", "And blue?")]
    done = run("-m", "acd/demo", "What is red?", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected[0].text}\n", "")
    done = run("-c", "And blue?", *options)
    assert (done.returncode, done.stdout) == (0, f"{expected[1].text}\n")
    kept = json.loads(run("logs", "--json", "-n", "1").stdout)[0]
    assert kept["model"] == "acd/demo" and kept["output_tokens"] == 8


def test_what_is_wrong_is_one_line(run: Callable[..., Any]) -> None:
    done = run("-m", "acd", "Hi", "-o", "model", "nosuch.gguf")
    assert done.returncode == 1 and done.stderr.startswith("Error: no such file: nosuch.gguf")
    done = run("-m", "acd", "Hi", ACD_MODEL="")
    assert (
        done.returncode == 1 and done.stderr == "Error: no model: give -o model FILE, set ACD_MODEL, or take acd/demo\n"
    )
    done = run("-m", "acd/demo", "Hi", "-o", "temp", "-1")
    assert done.returncode == 1 and done.stderr.startswith("Error: temp must be finite and >= 0")


def test_it_streams_and_takes_a_system_prompt(model: Any, tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair="as-is") as engine:
        chat = engine.chat(system="Be brief.", pair="as-is")
        expected = [chat.ask(question, seed=1, max_tokens=12).text for question in ("What is red?", "Why?")]
    conversation = llm.Conversation(model=model)
    options = {"seed": 1, "max_tokens": 12, "pair": "as-is"}
    first = conversation.prompt("What is red?", system="Be brief.", options=options)
    pieces = list(first)
    assert len(pieces) > 3 and "".join(pieces) == expected[0]
    assert conversation.prompt("Why?", system="Be brief.", options=options).text() == expected[1]
    assert first.response_json["seed"] == 1 and first.response_json["finish_reason"] == "length"


def test_a_schema_is_followed(model: Any) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    schema["additionalProperties"] = False
    answer = model.prompt("A colour?", schema=schema, pair="as-is").text()
    assert json.loads(answer)["colour"] in ("red", "blue")


def test_every_option_of_an_answer_is_there(run: Callable[..., Any]) -> None:
    shown = run("models", "list", "--options", "-m", "acd").stdout
    for name in (
        "model: str",
        "pair: str",
        "alpha: float",
        "max_tokens: int",
        "plain: boolean",
        "stop: ",
        "json_schema: str",
    ):
        assert f"    {name}" in shown
    assert "Strength of the contrast" in shown


def test_the_entry_point_is_declared() -> None:
    assert '[project.entry-points.llm]\nacd = "acd_local.cli.llm_plugin"' in (ROOT / "pyproject.toml").read_text(
        "utf-8"
    )
