"""acd-run: one answer to stdout, or a JSON-lines worker."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from acd_local import __version__, files
from acd_local.cli import flags, help
from acd_local.cli.progress import StatusLine, load_with_status
from acd_local.cli.shell import (
    AnswerWriter,
    Interrupts,
    Outcome,
    error_record,
    leave,
    one_line,
    run_cli,
    say,
)
from acd_local.errors import AcdError, UsageError
from acd_local.options import ENGINE_RANGES, Options

if TYPE_CHECKING:
    from acd_local.answers import Answer
    from acd_local.engine import Engine
    from acd_local.generation import AnswerStream

PROGRAM = "acd-run"
STDIN_PATIENCE = 2.0  # seconds before saying what we wait for


@click.command(
    cls=help.Command,
    epilog=help.foot(
        'acd-run demo "Why is the sky blue?"',
        'git diff | acd-run model.gguf "Write a commit message for this." -n 80',
        'acd-run model.gguf "Invent a person." --json-schema-file person.json',
        'acd-run model.gguf "Why is the sky blue?" --pair as-is --stats',
        "acd-run model.gguf --jsonl --parallel 4 <requests.jsonl",
    ),
    options_metavar="",
    context_settings=help.SETTINGS,
)
@click.argument("model", required=False, type=flags.MODEL, metavar="MODEL")
@click.argument("prompt", required=False, metavar="[PROMPT] [OPTIONS]")
@click.option("--system", "-s", metavar="TEXT", help="Your own system prompt; it follows the pair's.")
@flags.answer_flags
@click.option("--no-stdin", is_flag=True, help="Do not read stdin.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text, also on error.")
@click.option("--stats", is_flag=True, help="Say on stderr what the contrast did and how long it took.")
@help.in_section(
    "For programs",
    click.option(
        "--jsonl", is_flag=True, help="Long-lived worker: one JSON request per line of stdin, event lines out."
    ),
    click.option(
        "--parallel",
        type=click.IntRange(*ENGINE_RANGES["conversations"]),
        default=1,
        metavar="N",
        help="With --jsonl: answer up to N requests at once, 1 to 128; default 1.",
    ),
    click.option("--trace", type=flags.FILE, metavar="FILE", help="Write one JSON line per token to FILE."),
    click.option(
        "--divergence", is_flag=True, help="Measure KL(S||A) too; the adversarial logits are needed everywhere."
    ),
)
@click.version_option(__version__, prog_name=PROGRAM)
def command(model: str | None, prompt: str | None, **given: Any) -> int | Outcome:
    """Answer PROMPT with MODEL, decoded by the contrast of two opposite system prompts.

    MODEL is a GGUF file, demo, hf:owner/repo/file.gguf or an alias of yours; left out, it is $ACD_MODEL, or the model
    of your settings (acd config).

    Piped stdin comes first, then a blank line, then PROMPT. Only the answer goes to stdout.
    """
    instead = 'acd-run {model} "my prompt", or pipe the prompt' if prompt is None else ""
    model = flags.resolve_model(model, instead=instead)
    options = flags.make_options(given)
    flags.check_engine_flags(given)
    flags.check_text("PROMPT", prompt)
    flags.check_text("--system", given["system"])
    with Interrupts() as interrupts:
        if given["jsonl"]:
            _refuse_with_jsonl(prompt, given)
            from acd_local.cli.worker import serve

            return serve(model, given, options, interrupts)
        if given["parallel"] != 1:
            raise UsageError("--parallel goes with --jsonl: a single prompt has one answer")
        text = _prompt_text(prompt, read_stdin=not given["no_stdin"])
        if given["trace"] is not None:
            files.check_place(given["trace"])  # before the slow work
        with load_with_status(model, given) as engine:
            if engine.warning:
                say(f"{PROGRAM}: {one_line(engine.warning)}")
            return _answer(engine, text, options, given, interrupts)


def _answer(
    engine: Engine,
    text: str,
    options: Options,
    given: dict[str, Any],
    interrupts: Interrupts,
) -> Outcome:
    from acd_local.answers import PromptProgress
    from acd_local.cli.record import pair_line, stats_lines
    from acd_local.records import answer_record, pair_name
    from acd_local.runtime.cancel import CancelToken

    cancel, status = CancelToken(), StatusLine()
    interrupts.cancels(cancel)
    as_json, trace = given["as_json"], given["trace"]
    stream = engine.generate(
        text,
        options,
        system=given["system"],
        divergence=given["divergence"],
        trace=trace is not None,
        cancel=cancel,
        on_event=lambda event: status.reading(event) if isinstance(event, PromptProgress) else None,
    )
    try:
        with status:
            answer = stream.run() if as_json else _run_text(stream, status)
    except AcdError as error:
        return Outcome(record=error_record(error, stream.text) if as_json else None, error=error)
    failed = None if trace is None else _write_trace(trace, answer)
    if given["stats"]:
        for line in [pair_line(engine, stream.pair, options), *stats_lines(answer)]:
            say(line)
    code = (interrupts.exit_code or 0) if answer.finish_reason == "cancelled" else 0
    head = {
        "model": engine.info.name or str(engine.info.path),
        "pair": pair_name(stream.pair),
        "fitted": engine.fitted,
        "soft": stream.soft,
    }
    return Outcome(code, head | answer_record(answer) if as_json else None, failed)


def _run_text(stream: AnswerStream, status: StatusLine) -> Answer:
    """Print the answer as it comes; an empty one is an empty line, an error before any text leaves stdout empty."""
    writer = AnswerWriter(sys.stdout)

    def write(text: str) -> None:
        status.clear()
        writer.write(text)

    try:
        answer = stream.run(write)
    except AcdError:
        if stream.text:
            writer.finish()
        raise
    writer.finish()
    return answer


def _refuse_with_jsonl(prompt: str | None, given: dict[str, Any]) -> None:
    clashes = {
        "PROMPT": prompt is not None,
        "--json": given["as_json"],
        "--no-stdin": given["no_stdin"],
        "--stats": given["stats"],
        "--trace": given["trace"] is not None,
    }
    for name, present in clashes.items():
        if present:
            raise UsageError(f"--jsonl takes its requests from stdin: {name} does not go with it")


def _prompt_text(prompt: str | None, *, read_stdin: bool) -> str:
    """Join piped stdin, a blank line, PROMPT."""
    piped = _read_stdin() if read_stdin and not sys.stdin.isatty() else ""
    parts = [part for part in (piped.strip("\r\n"), prompt or "") if part.strip()]
    if not parts:
        raise UsageError("no prompt: give it after MODEL, or on stdin")
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


def _write_trace(path: Path, answer: Answer) -> AcdError | None:
    """The answer is there already: what goes wrong now is told beside it."""
    from acd_local.records import trace_records

    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in trace_records(answer)]
    try:
        files.replace_file(path, "".join(lines))
    except AcdError as error:
        return error
    return None


def main() -> None:
    leave(run_cli(command, PROGRAM))
