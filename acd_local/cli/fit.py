"""acd fit: a gate and a text pair of the model's own, in minutes, on llama.cpp alone."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from acd_local.cli import flags, help
from acd_local.cli.optimize import parse_budget, run_stages
from acd_local.cli.shell import Interrupts

if TYPE_CHECKING:
    from acd_local.progress import Listener
    from acd_local.runtime.cancel import CancelToken

PROGRAM = "acd fit"


@click.command(
    "fit",
    cls=help.Command,
    short_help="Make a gate and texts for a model, by llama.cpp alone.",
    epilog=help.foot("acd fit model.gguf", "acd fit model.gguf --budget 2h -o prompts/model.toml"),
)
@click.argument("model", required=False, type=flags.MODEL)
@click.option(
    "--out", "-o", type=flags.FILE, metavar="NAME.toml", help="The pair; default: MODEL.toml among your own pairs."
)
@click.option(
    "--keep",
    type=flags.PAIR,
    metavar="NAME|FILE",
    help="Give this pair a gate: its texts, soft prompts and settings stay as they are.",
)
@click.option(
    "--budget", default="30m", metavar="TIME", help="Time for everything: 90s, 30m, 2h; 30 is 30m; default 30m."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    metavar="N",
    help="Decides which instructions choose the texts, and which judge the result; default 0.",
)
@flags.anchors_flag
@flags.threads_flag
@flags.ray_flag
@click.option("--force", is_flag=True, help="Replace the files of an earlier result.")
def command(model: str | None, **given: Any) -> int:
    """Fit a pair to MODEL, a GGUF file: a gate that contrasts only where a request is harmful, and the texts for it.

    Measures the model as it is first. Writes NAME.toml, NAME.safetensors and NAME.report.html, or nothing where no pair
    is better than the model as it is. Ctrl-C keeps what is done; the same command goes on from there.
    """
    model = flags.resolve_model(model)
    given["budget"] = parse_budget(given["budget"])
    with Interrupts() as interrupts:
        return _run(model, given, interrupts)


def _run(model: str, given: dict[str, Any], interrupts: Interrupts) -> int:
    from acd_local import pairfile
    from acd_local.fit import job, pipeline

    connect = flags.connection(given.pop("ray"), interrupts)
    prepared = job.prepare(job.Request(model, command=shlex.join(["acd", *sys.argv[1:]]), **given))

    def work(stop: CancelToken, listener: Listener) -> tuple[Path, ...]:
        written = pipeline.run(prepared, stop=stop, listener=listener, connect=connect)
        return pairfile.outputs(prepared.out) if written else ()

    return run_stages(PROGRAM, interrupts, work)
