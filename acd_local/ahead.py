"""Begins to load a model before the rest of the package, and numpy, are imported, for a quick start of commands."""

from __future__ import annotations

from collections.abc import Callable

from acd_local import models
from acd_local.runtime import probe
from acd_local.runtime.binding import Opening


def open_ahead(
    model: str, *, gpu_layers: int | None = None, on_progress: Callable[[float], object] | None = None
) -> Opening | None:
    """Begin to load a model's file, which `Engine` then takes as its model; None: the file is to be checked first.

    Raises:
        ModelError: there is no such file.
    """
    info = probe.remembered(models.resolve(model))
    if info is None:
        return None
    if on_progress is not None:
        on_progress(0.0)
    return Opening(info, gpu_layers=gpu_layers, on_progress=on_progress)
