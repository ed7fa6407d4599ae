"""Asks an engine for a short, greedy answer."""

from __future__ import annotations

from acd_local.engine import Engine
from acd_local.options import Options

SHORT = Options(max_tokens=12, temp=0.0)


def said(text_or_messages: object, engine: Engine, **options: object) -> str:
    return engine.generate(text_or_messages, SHORT.replace(options)).run().text  # type: ignore[arg-type]
