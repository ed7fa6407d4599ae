"""What a result says about how it was made, to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acd_local import pairs
from acd_local.errors import UsageError, shown

OPTIONS = ("seed", "budget", "weights", "dtype", "max_tokens", "soft_only")  # what a result sets
_SOFT = ("soft_safe_steps", "soft_adversarial_steps")
_TEXT = ("text_safe_rounds", "text_safe_steps", "text_adversarial_rounds", "text_adversarial_steps")


@dataclass(frozen=True)
class Repeat:
    """What else than its options decided a run.

    Attributes:
        model_sha256: of the model's file.
        anchors_sha256: of its instructions, see `anchors.digest`.
        conversations: that anchors were answered in at once.
        micro: examples that went through the model together.
        steps: of the stages, by the names in provenance.steps; those of texts hold their rounds.
    """

    model_sha256: str
    anchors_sha256: str
    conversations: int
    micro: int
    steps: Mapping[str, int] = field(hash=False)

    def search(self, role: str) -> dict[str, int]:
        """{"rounds", "steps"} of a text's search."""
        rounds = self.steps[f"text_{role}_rounds"]
        return {"rounds": rounds, "steps": self.steps[f"text_{role}_steps"] - rounds}


def read(path: Path) -> tuple[dict[str, Any], Repeat]:
    """The options of the run that made a result, by the names of OPTIONS, and the rest.

    Raises:
        UsageError: the file does not say all of it; one line.
        PairError: it is no pair.
    """
    place, said = f"--repeat {shown(path)}", pairs.load(path).provenance

    def get(key: str, kind: type | tuple[type, ...], table: Mapping[str, Any] = said) -> Any:
        value = table.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{place}: provenance has no {key}: only a result of this acd optimize can be repeated")
        return value

    steps = get("steps", dict)
    soft_only = "text_safe_steps" not in steps
    names = _SOFT if soft_only else _SOFT + _TEXT
    weights = get("weights", list)
    if len(weights) != 3 or not all(isinstance(w, int | float) for w in weights):
        raise UsageError(f"{place}: provenance.weights are no three numbers")
    options = {
        "seed": get("seed", int),
        "budget": float(get("budget_seconds", (int, float))),
        "weights": tuple(map(float, weights)),
        "dtype": get("dtype", str),
        "soft_only": soft_only,
    }
    if not soft_only:
        options["max_tokens"] = get("max_tokens", int)
    repeat = Repeat(
        model_sha256=get("model_sha256", str),
        anchors_sha256=get("anchors_sha256", str),
        conversations=get("conversations", int),
        micro=get("micro", int),
        steps={name: get(name, int, steps) for name in names},
    )
    return options, repeat
