"""The shipped manual pair, for tests that are about the contrast and not about which pair is chosen.

As an object it is taken without a check of what it does to the model.
"""

from __future__ import annotations

import json
from pathlib import Path

from acd_local.evaluate.methods import manual_pair
from acd_local.runtime.gguf_header import read_header

DEFAULT = manual_pair()


def made_for(model: Path) -> str:
    """The end of a pair file that makes the pair a fitted one, which is taken without a check."""
    info = read_header(model)
    match = {"architecture": info.architecture, "tokenizer": info.tokenizer, "names": [info.name]}
    match |= {"n_layers": info.n_layers, "n_embd": info.n_embd}
    lines = [f"{key} = {json.dumps(value)}" for key, value in match.items()]
    return "\n".join(["[models]", *lines, "[figures]", "measured = true", ""])
