"""Draw how the cost of a token grows: three plots in one SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources

from acd_local.bench.growth import CONTRAST, WAYS, Growth, Point
from acd_local.bench.measuring import PLAIN
from acd_local.evaluate import page
from acd_local.evaluate.figures import Axis, Curve, Panel, Plot

WIDTH, HEIGHT = 720, 432  # of a plot
AXES = {
    "lengths": ("Cost per token against context length", "tokens that the context holds"),
    "conversations": ("Cost per token against conversations", "conversations at once"),
    "vocabularies": ("Cost per token against vocabulary", "tokens of the vocabulary"),
}


def draw(growth: Growth) -> str:
    """Return the text of an SVG file, which needs matplotlib (see `page.can_draw`)."""
    plots = [_plot(name, getattr(growth, name)) for name in AXES if getattr(growth, name)]
    css = resources.files("acd_local.evaluate").joinpath("templates/report.css").read_text(encoding="utf-8")
    height = HEIGHT * len(plots)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{css}\nsvg.plot {{ max-width: none; }}</style>",
        f'<rect width="{WIDTH}" height="{height}" style="fill: var(--paper)"/>',
    ]
    for i, plot in enumerate(plots):
        place = f'<svg y="{HEIGHT * i}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(str(page.draw(plot)).replace("<svg ", place, 1))  # Markup would escape it
    return "\n".join([*parts, "</svg>\n"])


def _plot(name: str, points: Sequence[Point]) -> Plot:
    title, x = AXES[name]
    curves = [_curve(way, i, [(p.at, p.milliseconds(way)) for p in points]) for i, way in enumerate((PLAIN, *WAYS))]
    outside = [(p.at, p.outside(CONTRAST)) for p in points]
    curves.append(_curve(f"{CONTRAST}, outside llama_decode", len(curves), outside))
    if name == "vocabularies":  # of different models: no line joins them
        named = [p.model.removesuffix(".gguf") for p in points if p.milliseconds(CONTRAST) is not None]
        curves = [replace(c, line=False, labels=named if c.name == CONTRAST else ()) for c in curves]
    return Plot(name, title, [Panel(title, Axis(x), [c for c in curves if c.points])], Axis("milliseconds per token"))


def _curve(name: str, colour: int, points: Sequence[tuple[int, float | None]]) -> Curve:
    return Curve(name, colour, [(at, ms) for at, ms in points if ms is not None], marks=True)
