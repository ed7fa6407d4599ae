"""What an optimization is asked for, whether it can be done, and how its time is divided.

Every stage leaves a file in the user's cache folder, $ACD_CACHE_DIR/optimize/MODEL. A run that is stopped goes on
there, and one that asks for the same thing again takes what is finished.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acd_local import files, models, pairfile, pairs, vectors
from acd_local.errors import ModelError, PairError, UsageError, shown
from acd_local.evaluate.runner import Progress
from acd_local.gate import Gate
from acd_local.optimize import anchors, device, rope
from acd_local.optimize.anchors import Instruction
from acd_local.optimize.repeat import Repeat
from acd_local.optimize.stages import private_folder
from acd_local.pairs import PromptPair
from acd_local.runtime import gguf_header, probe, rows
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.threads import default_threads

if TYPE_CHECKING:
    from acd_local.optimize.texts import Texts

TITLES = {
    "anchors": "anchors",
    "soft-safe": "soft safeguarding prompt",
    "soft-adversarial": "soft adversarial prompt",
    "text-safe": "safeguarding text",
    "text-adversarial": "adversarial text",
    "setting": "setting",
}
# Minutes of an hour.
SHARES = {
    "anchors": 15.0,
    "soft-safe": 16.0,
    "soft-adversarial": 4.0,
    "text-safe": 14.0,
    "text-adversarial": 6.0,
    "setting": 5.0,
}
MIN_STEPS, MAX_STEPS = 20, 1000  # of a soft prompt's training
MIN_TEXT_STEPS = 5

# transformers reads these from GGUF files, but as models of another build than weights.FrozenModel can share keys of.
_OTHER_BUILD = ("bloom", "falcon", "gpt2", "lfm2", "mamba", "t5", "umt5")


# --- Budget -----------------------------------------------------------------------------------------------------------


def divide(budget: float, anchors_took: float) -> dict[str, float]:
    """Seconds for each stage after the anchors, from the whole budget in seconds.

    Anchors take as long as they take. What they take beyond their share is taken from the others, up to half of theirs.
    """
    whole = sum(SHARES.values())
    late = max(0.0, anchors_took / budget - SHARES["anchors"] / whole)
    rest = 1 - SHARES["anchors"] / whole
    factor = max(0.5, (rest - late) / rest)
    return {name: budget * share / whole * factor for name, share in SHARES.items() if name != "anchors"}


def steps_for(seconds: float, per_step: float, *others: tuple[float, int]) -> int:
    """How many training steps fit, in tens.

    Args:
        per_step: seconds.
        others: seconds of what is done now and then besides, and every how many steps that is.
    """
    each = per_step + sum(took / every for took, every in others)
    steps = int(seconds / max(1e-9, each)) // 10 * 10
    return min(MAX_STEPS, max(MIN_STEPS, steps))


def rounds_and_steps(
    seconds: float,
    trial: float,
    gradient: float,
    pieces: int,
    rounds: int,
    tries: int,
    finals: float = 0.0,
) -> dict[str, int]:
    """How long a text is searched for: rounds over `pieces` readable parts, at most `rounds` of them and in half of the
    time, then steps of `tries` texts each; `trial` and `gradient` are seconds of one text's.

    Args:
        finals: seconds that choosing among the best takes afterwards.
    """
    seconds = max(0.0, seconds - finals)
    per_round = max(1e-9, (pieces + 1) * trial)
    rounds = max(1, min(rounds, int(seconds / 2 / per_round)))
    per_step = max(1e-9, (tries + 2) * trial + gradient)
    steps = int((seconds - rounds * per_round) / per_step)
    return {"rounds": rounds, "steps": min(MAX_STEPS, max(MIN_TEXT_STEPS, steps))}


# --- What is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What the command was asked for.

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
        fitted, gate: the pair that the optimization goes on from, and its gate; None: there is none.
    """

    request: Request
    info: GGUFInfo
    digest: str
    manual: PromptPair
    instructions: tuple[Instruction, ...]
    texts: Texts
    device: str
    folder: Path
    threads: int
    fitted: PromptPair | None = None
    gate: Gate | None = None


def prepare(request: Request) -> Job:
    """Check everything that can be wrong before anything is computed.

    Raises:
        UsageError, ModelError, PairError, OutOfMemoryError: one line each.
    """
    pairfile.check_target(request.out, force=request.force)
    device.check_packages()
    instructions = anchors.builtin() if request.anchors is None else anchors.read(request.anchors)
    info = gguf_header.read_header(models.resolve(request.model))
    check_architecture(info)
    where = device.resolve(request.device)
    probe.verify(info.path)
    from acd_local.optimize import texts

    fitted = None if request.fit is None else pairs.find(request.fit)
    gate = None if fitted is None else _gate_of(fitted, info)
    manual = pairs.find(pairs.DEFAULT)
    digest = digest_of(info.path)
    if request.repeat is not None and request.repeat.model_sha256 != digest:
        raise UsageError(f"--repeat: that result was made from another file than {info.path.name}")
    if request.repeat is not None and request.repeat.anchors_sha256 != anchors.digest(instructions):
        raise UsageError(
            "--repeat: that result was made with other instructions: name its file with --anchors, or take the version "
            "that made it"
        )
    return Job(
        request=request,
        info=info,
        digest=digest,
        manual=manual,
        instructions=tuple(instructions),
        texts=texts.read(info.path, manual, instructions),
        device=where,
        folder=private_folder(private_folder(files.work_dir() / "optimize") / digest[:16]),
        threads=request.threads or default_threads(),
        fitted=fitted,
        gate=gate,
    )


def _gate_of(pair: PromptPair, info: GGUFInfo) -> Gate:
    found = None if pair.vectors_path is None else vectors.load(pair.vectors_path, sha256=pair.sha256).gate
    if pair.gate is None or found is None:
        raise PairError(f"--fit: the prompt pair {pair.name!r} has no gate: make it with acd fit")
    found.check(info)
    return found


def check_architecture(info: GGUFInfo) -> None:
    """Raises ModelError where torch cannot have this file's weights, or llama.cpp takes no rows for its kind."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    def bare(name: str) -> str:
        return name.replace("-", "").replace("_", "")

    name = info.path.name
    if len(info.parts) > 1:
        raise ModelError(f"{name}: acd optimize needs one file: join the parts with llama-gguf-split --merge")
    known = {bare(a) for a in GGUF_SUPPORTED_ARCHITECTURES} - set(_OTHER_BUILD) - {"general", "tokenizer"}
    if bare(info.architecture) not in known:
        raise ModelError(
            f"{name}: acd optimize cannot train {shown(info.architecture)} models; it can train "
            f"{', '.join(sorted(known))}"
        )
    rope.check(info.path, info.architecture)
    if reason := rows.refusal(info.architecture):
        raise ModelError(f"{name}: soft prompts do not work with {info.architecture} models: {reason}")


def digest_of(path: Path) -> str:
    """Hex SHA-256 of a file; raises ModelError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None


# --- Running it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listener:
    """Who is told: `progress` often, `line` when something is done or decided."""

    progress: Callable[[Progress], None] = lambda progress: None
    line: Callable[[str], None] = lambda line: None


class Clock:
    """Counts a stage's steps and reports rate and time left."""

    def __init__(self, phase: str, done: int, total: int, report: Callable[[Progress], None]) -> None:
        self._phase, self._before, self._total, self._report = phase, done, total, report
        self._started = time.monotonic()
        report(Progress(phase, done, total, 0.0, None))

    def at(self, done: int, note: str = "") -> None:
        seconds = max(1e-9, time.monotonic() - self._started)
        rate = max(1e-9, done - self._before) / seconds
        left = (self._total - done) / rate if done > self._before else None
        self._report(Progress(self._phase, done, self._total, 60 * rate, left, note))


def run(job: Job, *, stop: CancelToken, listener: Listener) -> None:
    """All stages, then the files.

    Raises:
        Stopped: `stop` was set; the same job goes on from where it was.
    """
    taken = "another acd optimize works on this model: wait for it, or stop it"
    with files.locked(job.folder / "lock", taken, private=True):
        from acd_local.optimize.work import Optimization

        Optimization(job, stop, listener).run()


def duration(seconds: float) -> str:
    """42 s, 12 min, 1 h 05 min"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
