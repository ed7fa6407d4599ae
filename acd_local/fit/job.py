"""Reads what a fit is asked for, and checks whether it can be done."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from acd_local import files, models, pairfile, pairs, vectors
from acd_local.errors import ModelError, PairError, UsageError
from acd_local.pairs import PromptPair
from acd_local.runtime import probe
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.threads import default_threads
from acd_local.softpair import SoftPair
from acd_local.tuning import anchors
from acd_local.tuning.anchors import Instruction
from acd_local.tuning.cache import model_folder

BUDGET = 1800.0  # seconds


@dataclass(frozen=True)
class Request:
    """The command's arguments.

    Attributes:
        model: as models.resolve takes it.
        out: NAME.toml; None: in the user's prompts folder, named after the model's file or the kept pair.
        keep: name or file of a pair whose texts, soft prompts and settings are kept: it is given a gate alone.
        anchors: the user's own instructions; None: the built-in ones.
        budget: seconds.
        seed: decides which instructions texts are chosen on and the result is judged on; nothing else is drawn.
        threads: None: $ACD_THREADS, or the physical cores.
        force: replace files of an earlier result.
        command: as it was typed, for the report.
    """

    model: str
    out: Path | None = None
    keep: str | None = None
    anchors: Path | None = None
    budget: float = BUDGET
    seed: int = 0
    threads: int | None = None
    force: bool = False
    command: str = ""


@dataclass(frozen=True)
class Job:
    """A request whose inputs are all good, and what was found on the way.

    Attributes:
        kept, soft: the pair that is given a gate, and its soft prompts, if any.
        manual: the pair `default`, whose safe text is one of the helpful ones.
    """

    request: Request
    out: Path
    info: GGUFInfo
    digest: str
    kept: PromptPair | None
    soft: SoftPair | None
    manual: PromptPair
    instructions: tuple[Instruction, ...]
    folder: Path
    threads: int


def prepare(request: Request) -> Job:
    """Check everything that can be wrong before anything is computed.

    Raises:
        UsageError, ModelError, PairError: one line each.
    """
    path = models.resolve(request.model)
    kept = None if request.keep is None else pairs.find(request.keep)
    out = request.out or _default_out(kept.name if kept else pair_name(path))
    pairfile.check_target(out, force=request.force)
    instructions = anchors.builtin() if request.anchors is None else anchors.read(request.anchors)
    info = probe.verify(path)
    if info.n_layers < 2:
        raise ModelError(f"{path.name}: acd fit needs a model of 2 layers or more: a gate reads one before the last")
    digest = models.sha256_of(path)
    return Job(
        request=request,
        out=out,
        info=info,
        digest=digest,
        kept=kept,
        soft=None if kept is None else _soft_of(kept, info),
        manual=pairs.find(pairs.DEFAULT),
        instructions=tuple(instructions),
        folder=model_folder("fit", digest),
        threads=request.threads or default_threads(),
    )


def pair_name(path: Path) -> str:
    """Make a pair's name of a model file's."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower())[:60].strip("-._") or "model"


def _default_out(name: str) -> Path:
    folder = files.config_dir()
    if folder is None:
        raise UsageError("no folder is known for your prompt pairs: give a place with -o")
    return folder / "prompts" / f"{name}.toml"


def _soft_of(pair: PromptPair, info: GGUFInfo) -> SoftPair | None:
    if not pairs.fits(pair, info):
        raise PairError(f"--keep: the prompt pair {pair.name!r} was made for another model")
    if pair.vectors_path is None:
        return None
    soft = vectors.load(pair.vectors_path, sha256=pair.sha256).soft
    if soft is not None:
        soft.check(info)
    return soft
