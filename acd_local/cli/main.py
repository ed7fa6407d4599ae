"""acd: models on this machine, prompt pairs, evaluation, optimization, and the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from acd_local import __version__
from acd_local.cli import bench, completion, config, evaluate, fit, flags, help, optimize
from acd_local.cli.shell import Outcome, leave, one_line, run_cli, say

if TYPE_CHECKING:
    from acd_local.pairs import PromptPair

PROGRAM = "acd"


@click.group(
    cls=help.Group,
    epilog=help.foot(
        "acd models",
        "acd config set model ~/models/model.gguf",
        "acd fit model.gguf",
        "acd eval model.gguf --set advbench=advbench.csv:harmful",
    ),
    no_args_is_help=False,
    context_settings=help.SETTINGS,
)
@click.version_option(__version__, prog_name=PROGRAM)
def command() -> None:
    """Manage models, settings and prompt pairs of adversarial contrastive decoding; make pairs, and measure them.

    Answers come from acd-run, acd-chat and acd-serve.
    """


@command.command("models", short_help="List the GGUF models on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_models(as_json: bool) -> Outcome | None:
    """List GGUF models that Hugging Face, LM Studio, ollama and llama.cpp keep on this machine.

    Files are only read, never changed or moved. A path of the list is a MODEL for all commands; acd config set
    models.NAME PATH gives it a short name.
    """
    from acd_local import models, pairs

    rows: list[dict[str, Any]] = []
    for found in models.discover():
        info = found.info
        rows.append(
            {
                "source": found.source,
                "label": found.label,
                "path": str(found.path),
                "size": info.size if info else None,
                "architecture": info.architecture if info else None,
                "quantization": info.file_type if info else None,
                "pair": best.name if info and (best := pairs.best_for(info)) else None,
                "error": found.error,
            }
        )
    if as_json:
        return Outcome(record=rows)
    if not rows:
        say("no GGUF models found (looked at the Hugging Face, LM Studio, ollama and llama.cpp caches)")
    for row in rows:
        print(_model_line(row))
    return None


def _model_line(row: dict[str, Any]) -> str:
    name = one_line(f"{row['source']:<12} {row['label']}")
    if row["error"]:
        return f"{name}\n    unusable: {one_line(row['error'])}"
    size = f"{row['size'] / 1e9:.2f} GB" if row["size"] >= 1e9 else f"{row['size'] / 1e6:.0f} MB"
    what = " ".join(filter(None, (size, row["architecture"], row["quantization"])))
    pair = f"pair: {row['pair']}" if row["pair"] else "no pair made for it"
    return f"{name}\n    {what}, {pair}\n    {one_line(row['path'])}"


@command.group("pairs", cls=help.Group, no_args_is_help=False)
def pairs_group() -> None:
    """List, show and check prompt pairs."""


@pairs_group.command("list", short_help="List the known pairs.")
def list_pairs() -> None:
    """List the known pairs with their alpha and beta and the models they were made for."""
    from acd_local import pairs

    known, broken = pairs.scan()
    for pair in known:
        alpha = pairs.DEFAULT_ALPHA if pair.alpha is None else pair.alpha
        beta = pairs.DEFAULT_BETA if pair.beta is None else pair.beta
        made_for = ", ".join(pair.models.names) or pair.models.architecture or "any model"
        print(one_line(f"{pair.name:<28} alpha {alpha:g}  beta {beta:g}  {made_for}"))
    for error in broken:
        say(f"{PROGRAM}: {one_line(str(error))}")


@pairs_group.command("show", short_help="Show one pair.")
@click.argument("pair", type=flags.PAIR)
def show_pair(pair: str) -> None:
    """Show one pair, a NAME or a FILE: both prompts, settings, provenance and measured figures."""
    from acd_local import pairs
    from acd_local.runtime.text import disarm

    found = pairs.find(pair)
    vectors = {} if found.vectors_path is None else _vectors_lines(found)
    print(f"name         {found.name}")
    print(f"file         {one_line(str(found.path))}")
    print(f"alpha, beta  {found.alpha if found.alpha is not None else f'default ({pairs.DEFAULT_ALPHA})'}, ", end="")
    print(found.beta if found.beta is not None else f"default ({pairs.DEFAULT_BETA})")
    for title, line in vectors.items():
        print(f"{title:<12} {line}")
    match = found.models
    made_for = {"architecture": match.architecture, "tokenizer": match.tokenizer, "names": ", ".join(match.names)}
    for title, table in (("models", made_for), ("provenance", found.provenance), ("figures", found.figures)):
        for key, value in table.items():
            if value:
                print(f"{title:<12} {key}: {one_line(str(value))}")
    print(f"\nsafe prompt (what the answer is written under)\n{disarm(found.safe)}")
    for user, assistant in found.shots:
        print(f"\ndemonstration\n  user       {one_line(user)}\n  assistant  {one_line(assistant)}")
    print("\nadversarial prompt (the negative reference; nothing is ever sampled from it)")
    print(disarm(found.adversarial.reveal_for_negative_stream()))


def _vectors_lines(pair: PromptPair) -> dict[str, str]:
    """Describe the pair's soft prompts and gate; raises PairError where their file is broken."""
    from acd_local import vectors
    from acd_local.generation import resolve_contrast
    from acd_local.options import Options

    path = pair.vectors_path
    assert path is not None
    found, numbers = vectors.load(path, sha256=pair.sha256), resolve_contrast(Options(), pair, soft=True)
    lines = {}
    if (soft := found.soft) is not None:
        sizes = f"{len(soft.safe)} and {len(soft.adversarial)} rows of {soft.n_embd}"
        lines["soft prompts"] = one_line(f"{path}: {sizes}, alpha {numbers.alpha:g}, beta {numbers.beta:g}")
    if (gate := found.gate) is not None:
        settings = f"threshold {pair.gate.threshold:g}" if pair.gate else f"not used: {pair.name}.toml has no [gate]"
        lines["gate"] = one_line(
            f"{path}: reads layers {', '.join(map(str, gate.layers))} of {gate.n_layer}, {settings}"
        )
    return lines


@pairs_group.command("check", short_help="Check a pair's file.")
@click.argument("file", type=flags.FILE)
def check_pair(file: Path) -> None:
    """Check a pair FILE, and the soft prompts beside it: exit 0 if valid (remarks on stderr), 5 with what is not."""
    from acd_local import pairs, vectors

    for remark in pairs.check(file):
        say(f"{PROGRAM}: remark: {one_line(remark)}")
    pair = pairs.load(file)
    if path := pair.vectors_path:
        vectors.load(path, sha256=pair.sha256)
    print(f"{one_line(str(file))}: valid")


command.add_command(bench.command)
command.add_command(completion.command)
command.add_command(config.command)
command.add_command(evaluate.command)
command.add_command(fit.command)
command.add_command(optimize.command)


def main() -> None:
    leave(run_cli(command, PROGRAM))
