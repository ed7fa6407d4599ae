"""Measure, draw and show how the cost of a token grows, for `acd bench --plot`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from acd_local import files
from acd_local.cli.shell import one_line
from acd_local.errors import AcdError, UsageError, shown

TITLES = {
    "lengths": "tokens in the context",
    "conversations": "conversations at once",
    "vocabularies": "tokens of the vocabulary",
}
# Two lines of heading, format and width of the columns of figures.
COLUMNS = {
    "ms_per_token": ("time", "per token", "{:.2f} ms", 12),
    "ratio_to_plain": ("time ratio", "to plain", "{:.2f}", 12),
    "outside_decode_ms": ("outside  ", "llama_decode", "{:.2f} ms", 14),
    "first_token_ms": ("first", "token", "{:.1f} ms", 12),
    "prompt_ms_per_token": ("prompt,", "per token", "{:.2f} ms", 12),
}


def run(
    model: str, also: Sequence[str], plot: Path, progress: Callable[[str], object], measuring: Mapping[str, Any]
) -> tuple[dict[str, Any], AcdError | None]:
    """Measure and draw; return the summary, and what went wrong with the file.

    Args:
        measuring: tokens, rounds and so on. Those that the command line does not give are `bench.growth`'s own.

    Raises:
        UsageError, StorageError: it could not be drawn or written, as far as that is seen before anything is measured.
    """
    from acd_local.bench import growth
    from acd_local.bench.plot import draw
    from acd_local.evaluate import page

    if plot.suffix.lower() != ".svg":
        raise UsageError(f"--plot writes SVG: choose a name that ends in .svg, not {shown(plot.name)}")
    if not page.can_draw():
        raise UsageError("--plot needs matplotlib, which cannot be imported here: pip install 'acd-local[report]'")
    files.check_place(plot)
    context = click.get_current_context()
    given = {n: v for n, v in measuring.items() if context.get_parameter_source(n) == ParameterSource.COMMANDLINE}
    found = growth.run(model, also, progress=progress, **given)
    failed: AcdError | None = None
    try:
        files.replace_file(plot, draw(found))
    except AcdError as error:
        failed = error
    return found.summary(), failed


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Write the tables of a summary of `bench.growth`."""
    yield (
        f"{one_line(found['model'])}, pair {one_line(found['pair'])}: {found['threads']} threads, "
        f"{found['tokens']} tokens x {found['rounds']} rounds, medians"
    )
    for name, title in TITLES.items():
        columns = {n: c for n, c in COLUMNS.items() if any(row[n] is not None for row in found[name])}
        yield ""
        yield f"{title:<28}" + "".join(f"{head:>{w}}" for head, _, _, w in columns.values())
        yield " " * 28 + "".join(f"{head:>{w}}" for _, head, _, w in columns.values())
        before = None
        for row in found[name]:
            place = row["at"], row["model"]
            if row["model"] and place != before:
                yield f"{row['at']:>8} {one_line(row['model'])}"
            label = row["at"] if place != before and not row["model"] else ""
            cells = ("-" if row[n] is None else form.format(row[n]) for n, (_, _, form, _) in columns.items())
            widths = (w for *_, w in columns.values())
            yield f"{label:>8} {row['case']:<19}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
            before = place
