"""acd-run: one answer to stdout, or a JSON-lines worker."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from acd_local.cli import flags
from acd_local.cli.shell import EXIT_CODES, AnswerWriter, Interrupts, run_cli, say
from acd_local.errors import AcdError, UsageError

if TYPE_CHECKING:
    from acd_local.answers import Answer
    from acd_local.options import Options
    from acd_local.session import AnswerStream, Engine

PROGRAM = "acd-run"
STDIN_PATIENCE = 2.0  # seconds before saying what we wait for


@click.command(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@flags.engine_flags
@flags.answer_flags
@click.option("--system", "-s", metavar="TEXT", help="Your own system prompt; it follows the pair's.")
@click.option("--no-stdin", is_flag=True, help="Do not read stdin.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text, also on error.")
@click.option("--jsonl", is_flag=True, help="Long-lived worker: one JSON request per line of stdin, event lines out.")
@click.option("--stats", is_flag=True, help="Say on stderr what the contrast did and how long it took.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Write one JSON line per token to FILE.")
@click.version_option(package_name="acd-local", prog_name=PROGRAM)
def command(model: str | None, prompt: str | None, **given: Any) -> int:
    """Answer PROMPT with MODEL, decoded by the contrast of two opposite system prompts.

    MODEL is a GGUF file, 'demo' or hf:owner/repo/file.gguf; ACD_MODEL is used where no argument is given. Piped stdin
    comes first, then a blank line, then PROMPT. Only the answer goes to stdout.
    """
    model = flags.resolve_model(model)
    options = flags.make_options(given)
    with Interrupts() as interrupts:
        if given["jsonl"]:
            _refuse_with_jsonl(prompt, given)
            from acd_local.cli.worker import serve

            return serve(model, given, options, interrupts)
        text = _prompt_text(prompt, read_stdin=not given["no_stdin"])
        trace_file = _open_trace(given["trace"])
        engine = flags.load_engine(model, given)
        if engine.warning:
            say(f"{PROGRAM}: {engine.warning}")
        return _answer(engine, text, options, given, trace_file, interrupts)


def _answer(
    engine: Engine,
    text: str,
    options: Options,
    given: dict[str, Any],
    trace_file: TextIO | None,
    interrupts: Interrupts,
) -> int:
    from acd_local.cli.record import answer_record, stats_lines
    from acd_local.runtime.cancel import CancelToken

    cancel = CancelToken()
    interrupts.cancels(cancel)
    stream = engine.generate(
        text,
        options,
        system=given["system"],
        trace=trace_file is not None,
        on_event=lambda event: say(f"{PROGRAM}: context full: left out the oldest {event.messages} messages"),
        cancel=cancel,
    )
    if given["as_json"]:
        answer = _run_json(stream)
        record = {"model": engine.info.name or str(engine.info.path), "pair": stream.pair.name} | answer_record(answer)
        print(json.dumps(record, ensure_ascii=False), flush=True)
    else:
        answer = _run_text(stream)
    if trace_file is not None:
        _write_trace(trace_file, answer)
    if given["stats"]:
        for line in stats_lines(answer):
            say(line)
    return (interrupts.exit_code or 0) if answer.finish_reason == "cancelled" else 0


def _run_text(stream: AnswerStream) -> Answer:
    writer = AnswerWriter(sys.stdout)
    started = False
    try:
        for chunk in stream:
            writer.write(chunk.text)
            started = True
    finally:
        if started:
            writer.finish()
    if not started:
        writer.finish()  # an empty answer is an empty line
    return stream.answer


def _run_json(stream: AnswerStream) -> Answer:
    from acd_local.cli.shell import error_record

    try:
        return stream.run()
    except AcdError as error:
        if not stream.text:
            raise
        print(json.dumps(error_record(error, stream.text), ensure_ascii=False), flush=True)
        say(f"{PROGRAM}: {error}")
        raise click.exceptions.Exit(error.exit_code) from None


def _refuse_with_jsonl(prompt: str | None, given: dict[str, Any]) -> None:
    clashes = {
        "PROMPT": prompt is not None,
        "--json": given["as_json"],
        "--no-stdin": given["no_stdin"],
        "--trace": given["trace"] is not None,
    }
    for name, present in clashes.items():
        if present:
            raise UsageError(f"--jsonl takes its requests from stdin: {name} does not go with it")


def _prompt_text(prompt: str | None, *, read_stdin: bool) -> str:
    """Piped stdin, a blank line, PROMPT."""
    piped = _read_stdin() if read_stdin and sys.stdin is not None and not sys.stdin.isatty() else ""
    parts = [part for part in (piped.strip("\n"), prompt or "") if part.strip()]
    if not parts:
        raise UsageError("no prompt: give it as an argument or on stdin")
    return "\n\n".join(parts)


def _read_stdin() -> str:
    waiting = threading.Timer(
        STDIN_PATIENCE, say, [f"{PROGRAM}: waiting for stdin to end (--no-stdin does not read it)"]
    )
    waiting.daemon = True
    waiting.start()
    try:
        raw = sys.stdin.buffer.read()
    except OSError as error:
        raise UsageError(f"cannot read stdin: {error.strerror}") from None
    finally:
        waiting.cancel()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text (byte {error.start})") from None


def _open_trace(path: Path | None) -> TextIO | None:
    if path is None:
        return None
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _write_trace(out: TextIO, answer: Answer) -> None:
    from acd_local.cli.record import trace_record

    with out:
        for token in answer.tokens:
            out.write(json.dumps(trace_record(token), ensure_ascii=False) + "\n")


def main() -> None:
    sys.exit(run_cli(command, PROGRAM))
