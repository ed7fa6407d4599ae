"""Keeps how far a stage of the optimizer got, then its result: whoever asks for the same thing again finds it done."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acd_local import files
from acd_local.tuning import memory
from acd_local.tuning.cache import key_of

FORMAT = 1  # of what the files hold; a new one makes every stage anew


class Checkpoint:
    """One stage's file.

    Args:
        folder: the model's, see `tuning.cache.model_folder`.
        stage: its name.
        inputs: all that decides its result, as JSON can hold it. Their names are part of the key: another name for one
            makes every user's stage anew.

    Attributes:
        key: of these inputs.
        damaged: the file was there and could not be read: the stage begins anew.
        counts: how much work was decided on, such as {"steps": 300}; a stage that goes on keeps to it.
        state: what `save` was given last, None before.
        result: what `finish` was given, None before.
    """

    def __init__(self, folder: Path, stage: str, inputs: Mapping[str, Any]) -> None:
        self.stage = stage
        self.key = key_of({"stage": stage, "format": FORMAT, **inputs})
        self.path = folder / f"{stage}-{self.key[:16]}.pt"
        self.damaged = False
        found = self._read()
        self.counts: dict[str, Any] = found.get("counts", {})
        self.state: dict[str, Any] | None = found.get("state")
        self.result: dict[str, Any] | None = found.get("result")
        self._before: dict[str, float] = found.get("spent", {})
        self._started: float | None = None

    @property
    def done(self) -> bool:
        return self.result is not None

    @property
    def reused(self) -> bool:
        """Whether nothing was done in this sitting."""
        return self._started is None

    def begin(self) -> None:
        """Count time and memory as this stage's from here on."""
        self._started = time.perf_counter()
        memory.reset_peak()

    def save(self, state: dict[str, Any]) -> None:
        """Keep where the stage is: tensors, and what else torch.load reads with weights_only."""
        self.state = state
        self._write()

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Keep the result, in place of the state."""
        self.state, self.result = None, result
        self._write()
        return result

    def spent(self) -> dict[str, float]:
        """Return {"seconds", "peak", "device_peak"} of this stage over all its sittings, bytes."""
        if self._started is None:
            return dict(self._before)
        now = {"seconds": time.perf_counter() - self._started, **memory.peak()}
        before = self._before
        return {
            "seconds": now.pop("seconds") + before.get("seconds", 0.0),
            **{key: max(value, before.get(key, 0)) for key, value in now.items()},
        }

    def _read(self) -> dict[str, Any]:
        import torch

        if not self.path.exists():
            return {}
        try:
            found = torch.load(self.path, weights_only=True, map_location="cpu")
            if found["key"] == self.key and isinstance(found["counts"], dict) and isinstance(found["spent"], dict):
                return dict(found)
        except Exception:  # torch says many things to a file that is none of its own
            pass
        self.damaged = True
        return {}

    def _write(self) -> None:
        import torch

        data = {"key": self.key, "counts": self.counts, "state": self.state, "result": self.result}
        buffer = io.BytesIO()  # torch's own writer would make a RuntimeError of a full disk
        torch.save(data | {"spent": self.spent()}, buffer)
        files.replace_file(self.path, buffer.getvalue(), mode=files.PRIVATE)
