"""acd optimize: a prompt pair of the model's own, as text and as soft prompts."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from acd_local.cli import flags, help
from acd_local.cli.progress import ProgressLine
from acd_local.cli.shell import Interrupts, going_on, one_line
from acd_local.errors import StorageError, UsageError

if TYPE_CHECKING:
    from acd_local.progress import Listener
    from acd_local.runtime.cancel import CancelToken

PROGRAM = "acd optimize"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 60.0}
MAX_BUDGET = 30 * 24 * 3600.0  # seconds


@click.command(
    "optimize",
    cls=help.Command,
    short_help="Train soft prompts and texts for a model, by torch.",
    epilog=help.foot(
        "acd optimize model.gguf -o prompts/model.toml --budget 60m",
        "acd optimize model.gguf --fit model",
        "acd optimize model.gguf --repeat prompts/model.toml -o again.toml",
    ),
)
@click.argument("model", required=False, type=flags.MODEL)
@click.option("--out", "-o", type=flags.FILE, metavar="NAME.toml", help="The pair; default prompts/MODEL.toml.")
@click.option(
    "--budget", default="60m", metavar="TIME", help="Time for everything: 90s, 60m, 2h; 60 is 60m; default 60m."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    help="Where torch computes; default auto.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Number type of the weights in torch; auto, the default, takes the faster one.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, metavar="N", help="Repeats a run; default 0.")
@flags.anchors_flag
@click.option(
    "--weights",
    default="1,1,1",
    metavar="P,N,R",
    help="Weights of the losses of wanted, unwanted and harmless answers; default 1,1,1.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(16, 1024),
    default=96,
    metavar="N",
    help="Longest text of either prompt, 16 to 1024; default 96.",
)
@click.option("--soft-only", is_flag=True, help="Leave out the text pair: the file then holds the manual one.")
@flags.threads_flag
@click.option(
    "--repeat",
    type=flags.FILE,
    metavar="NAME.toml",
    help="Make this result again: its seed, budget, weights, dtype, lengths and numbers of steps.",
)
@click.option(
    "--fit",
    type=flags.PAIR,
    metavar="NAME|FILE",
    help="Go on from this result of acd fit: the new pair keeps its gate, and refuses what the gate finds harmful.",
)
@flags.ray_flag
@click.option("--force", is_flag=True, help="Replace the files of an earlier result.")
def command(model: str | None, **given: Any) -> int:
    """Optimize a prompt pair for MODEL, a GGUF file: soft prompts first, then a text pair that comes close to them.

    Writes NAME.toml, NAME.safetensors and NAME.report.html. Ctrl-C keeps what is done; the same command goes on from
    there, and takes finished stages as they are. Needs the extra: pip install 'acd-local[optimize]'.
    """
    model = flags.resolve_model(model)
    given["budget"] = parse_budget(given["budget"])
    given["weights"] = parse_weights(given["weights"])
    if given["repeat"] is not None:
        given |= repeated(given["repeat"])
    given["out"] = given["out"] or default_out(model)
    with Interrupts() as interrupts:
        return _run(model, given, interrupts)


def _run(model: str, given: dict[str, Any], interrupts: Interrupts) -> int:
    from acd_local import pairfile
    from acd_local.optimize import job

    connect = flags.connection(given.pop("ray"), interrupts)
    request = job.Request(model, command=shlex.join(["acd", *sys.argv[1:]]), **given)
    prepared = job.prepare(request)
    from acd_local.optimize import pipeline  # it imports torch: first it was asked whether it is there

    def work(stop: CancelToken, listener: Listener) -> tuple[Path, ...]:
        pipeline.run(prepared, stop=stop, listener=listener, connect=connect)
        return pairfile.outputs(request.out)

    return run_stages(PROGRAM, interrupts, work)


def run_stages(program: str, interrupts: Interrupts, work: Callable[[CancelToken, Listener], Iterable[Path]]) -> int:
    """Run stages that can be stopped and gone on with, say how far they are, and print the files that they wrote.

    Args:
        work: raises Stopped where its token is set.

    Returns:
        The exit code.
    """
    from acd_local.progress import Listener, Stopped
    from acd_local.runtime.cancel import CancelToken

    interrupts.cancels(stop := CancelToken())
    with ProgressLine(program) as progress:
        try:
            written = work(stop, Listener(progress.show, progress.line))
        except Stopped:
            progress.line("stopped; everything so far is kept, the same command goes on from here")
            return interrupts.exit_code or 130
        except StorageError as error:
            raise going_on(error) from None
    interrupts.cancels(None)
    for path in written:
        print(one_line(str(path)))
    return 0


def repeated(path: Path) -> dict[str, Any]:
    """Read what `--repeat` sets, by the names of job.Request.

    Raises:
        UsageError: one of these is given besides, or the file does not say all of it.
    """
    from acd_local.optimize import job

    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    if both := [name for name in job.REPEATED if context.get_parameter_source(name) == typed]:
        raise UsageError(f"--repeat sets --{both[0].replace('_', '-')}: leave it out")
    options, rest = job.read_repeat(path)
    return options | {"repeat": rest}


def parse_budget(text: str) -> float:
    """Parse 90s, 60m, 2h, or plain minutes into seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1 <= seconds <= MAX_BUDGET:
        raise UsageError(f"--budget must be a time such as 90s, 60m or 2h, at most 30 days, not {text!r}")
    return seconds


def parse_weights(text: str) -> tuple[float, ...]:
    try:
        weights = tuple(float(number) for number in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise UsageError(f"--weights must be three numbers >= 0, not all 0, such as 1,1,1, not {text!r}")
    return weights


def default_out(model: str) -> Path:
    """Name prompts/NAME.toml after the model's file: "demo" and "hf:..." by the file they stand for."""
    from acd_local import models
    from acd_local.fit.job import pair_name

    return Path("prompts") / f"{pair_name(models.resolve(model))}.toml"
