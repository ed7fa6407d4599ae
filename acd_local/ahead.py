"""Begins to load a model before the rest of the package, and numpy, are imported, for a quick start of commands."""

from __future__ import annotations

from collections.abc import Callable

from acd_local import models, pairs
from acd_local.runtime import probe
from acd_local.runtime.binding import Opening


def open_ahead(
    model: str,
    pair: str | None,
    *,
    gpu_layers: int | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> Opening | None:
    """Begin to load a model's file where that is next; None: the file, or what the pair does to it, is to be checked.

    Args: as of `engine.Engine`, which takes what is returned as its model.

    Raises:
        ModelError, PairError: as there.
    """
    info = probe.remembered(models.resolve(model))
    if info is None:
        return None
    if pair != pairs.AS_IS:
        chosen = pairs.best_for(info) if pair is None else pairs.find(pair)
        if chosen is None or not pairs.fitted(chosen, info):
            return None
    if on_progress is not None:
        on_progress(0.0)
    return Opening(info, gpu_layers=gpu_layers, on_progress=on_progress)
