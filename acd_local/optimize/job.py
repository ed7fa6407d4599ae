"""Reads what an optimization is asked for, and checks whether it can be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acd_local import models, pairfile, pairs, vectors
from acd_local.errors import PairError, UsageError, shown
from acd_local.optimize import device
from acd_local.pairs import PromptPair
from acd_local.runtime import gguf_header, probe
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.threads import default_threads
from acd_local.tuning import anchors
from acd_local.tuning.anchors import Instruction
from acd_local.tuning.cache import model_folder
from acd_local.vectors import Vectors

if TYPE_CHECKING:
    from acd_local.optimize.prompt_tokens import PromptTokens

REPEATED = ("seed", "budget", "weights", "dtype", "max_tokens", "soft_only")  # what --repeat takes from a result
_SOFT_STEPS = ("soft_safe_steps", "soft_adversarial_steps")
_TEXT_STEPS = ("text_safe_rounds", "text_safe_steps", "text_adversarial_rounds", "text_adversarial_steps")


@dataclass(frozen=True)
class Repeat:
    """The choices of a run that its options leave open.

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
        """Return {"rounds", "steps"} of a text's search."""
        rounds = self.steps[f"text_{role}_rounds"]
        return {"rounds": rounds, "steps": self.steps[f"text_{role}_steps"] - rounds}


@dataclass(frozen=True)
class Request:
    """The command's arguments.

    Attributes:
        model: as models.resolve takes it.
        out: NAME.toml.
        anchors: the user's own instructions; None: the built-in ones.
        budget: seconds.
        weights: of the losses' three terms: positive, negative, retain.
        max_tokens: limit of either text prompt.
        soft_only: leave out the text pair; the file then holds the manual one.
        threads: None: $ACD_THREADS, or the physical cores.
        force: replace files of an earlier result.
        command: as it was typed, for the report.
        repeat: what an earlier result says beyond these options; None: it is decided anew.
        fit: name or file of a pair with a gate: the result has the gate too, and refuses what passes it.
    """

    model: str
    out: Path
    anchors: Path | None = None
    budget: float = 3600.0
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    max_tokens: int = 96
    soft_only: bool = False
    threads: int | None = None
    force: bool = False
    command: str = ""
    repeat: Repeat | None = None
    fit: str | None = None


@dataclass(frozen=True)
class Job:
    """A request whose inputs are all good, and what was found on the way.

    Attributes:
        fitted, beside: the pair that the optimization goes on from, and its gate and steering vectors; None: there is
            none.
    """

    request: Request
    info: GGUFInfo
    digest: str
    manual: PromptPair
    instructions: tuple[Instruction, ...]
    tokens: PromptTokens
    device: str
    folder: Path
    threads: int
    fitted: PromptPair | None = None
    beside: Vectors | None = None


def prepare(request: Request) -> Job:
    """Check everything that can be wrong before anything is computed.

    Raises:
        UsageError, ModelError, PairError, OutOfMemoryError: one line each.
    """
    pairfile.check_target(request.out, force=request.force)
    device.check_packages()
    instructions = anchors.builtin() if request.anchors is None else anchors.read(request.anchors)
    info = gguf_header.read_header(models.resolve(request.model))
    from acd_local.optimize import prompt_tokens, weights  # they import torch: first it was asked whether it is there

    weights.check_file(info)
    where = device.resolve(request.device)
    probe.verify(info.path)

    fitted = None if request.fit is None else pairs.find(request.fit)
    beside = None if fitted is None else _beside(fitted, info)
    manual = pairs.find(pairs.DEFAULT)
    digest = models.sha256_of(info.path)
    if request.repeat is not None and request.repeat.model_sha256 != digest:
        raise UsageError(f"--repeat: that result was made from another file than {info.path.name}")
    if request.repeat is not None and request.repeat.anchors_sha256 != anchors.digest(instructions):
        raise UsageError(
            "--repeat: that result was made with other instructions: name its file with --anchors, or use the version "
            "that made it"
        )
    return Job(
        request=request,
        info=info,
        digest=digest,
        manual=manual,
        instructions=tuple(instructions),
        tokens=prompt_tokens.read(info.path, manual, instructions),
        device=where,
        folder=model_folder("optimize", digest),
        threads=request.threads or default_threads(),
        fitted=fitted,
        beside=beside,
    )


def _beside(pair: PromptPair, info: GGUFInfo) -> Vectors:
    found = None if pair.vectors_path is None else vectors.load(pair.vectors_path, sha256=pair.sha256)
    if pair.gate is None or found is None or found.gate is None:
        raise PairError(f"--fit: the prompt pair {pair.name!r} has no gate: make it with acd fit")
    for part in (found.gate, found.steering):
        if part is not None:
            part.check(info)
    return found


def read_repeat(path: Path) -> tuple[dict[str, Any], Repeat]:
    """Read the options of the run that made a result, by the names of REPEATED, and the rest.

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
    names = _SOFT_STEPS if soft_only else _SOFT_STEPS + _TEXT_STEPS
    weights = get("weights", list)
    if len(weights) != 3 or not all(isinstance(w, int | float) for w in weights):
        raise UsageError(f"{place}: provenance.weights must be three numbers")
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
