"""Anchors: instructions, and the model's own answers to them, sorted into the paper's three sets.

The instructions are ours (data/*.jsonl) or the user's. The answers are sampled on the user's model under the three
manual prompts (safe, opposite, none), cut short, and stay in the user's cache folder. Here alone a manual opposite
prompt is answered from: complying answers are what the losses push away from, and nothing returns or prints them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from acd_local import files
from acd_local.answers import Answer
from acd_local.batch import answer_all
from acd_local.errors import UsageError
from acd_local.evaluate import refusal
from acd_local.evaluate.sets import item_seed
from acd_local.options import Options
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import Framing

if TYPE_CHECKING:
    from acd_local.engine import Engine
    from acd_local.generation import AnswerStream

Kind = Literal["harmful", "harmless"]
PROMPTS = ("safe", "opposite", "none")
TOKENS = 64  # of an answer
VALIDATION_SHARE = 8  # one instruction in so many validates
SAMPLING = Options(plain=True, temp=0.7)
MAX_BYTES = 20_000_000

_DATA = Path(__file__).with_name("data")
_FILES: tuple[tuple[str, Kind], ...] = (("harmless", "harmless"), ("lookalike", "harmless"), ("harmful", "harmful"))


@dataclass(frozen=True)
class Instruction:
    """A request.

    Attributes:
        category: what it is about; of a harmful one it chooses the concern that refusals name.
        lookalike: harmless, but looks dangerous.
    """

    prompt: str
    kind: Kind
    category: str = ""
    lookalike: bool = False

    @property
    def id(self) -> str:
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]

    @property
    def validates(self) -> bool:
        """Whether it is kept out of training; decided by its text alone."""
        return int(self.id, 16) % VALIDATION_SHARE == 0


@dataclass(frozen=True)
class Pair:
    """An instruction and one answer, as token ids.

    Attributes:
        under: the manual prompt that the answer was sampled under, one of PROMPTS; empty where it was written.
    """

    instruction: Instruction
    answer: tuple[int, ...]
    under: str = ""


@dataclass(frozen=True)
class Anchors:
    """The paper's sets.

    Attributes:
        refused: D_HR, harmful instructions with refusing answers.
        complied: D_HA, harmful instructions with complying answers.
        answered: D_S, harmless instructions with their answers.
    """

    refused: tuple[Pair, ...]
    complied: tuple[Pair, ...]
    answered: tuple[Pair, ...]

    @property
    def written(self) -> int:
        """How many of `refused` are written forms, because the model refused too rarely."""
        return sum(not pair.under for pair in self.refused)

    def part(self, *, validation: bool) -> Anchors:
        """The training or the validation half."""

        def keep(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
            return tuple(p for p in pairs if p.instruction.validates == validation)

        return Anchors(keep(self.refused), keep(self.complied), keep(self.answered))


# --- Instructions -----------------------------------------------------------------------------------------------------


def builtin() -> list[Instruction]:
    """Our own instructions: broad harmless ones, look-alikes, and short harmful requests."""
    found = []
    for name, kind in _FILES:
        for line in (_DATA / f"{name}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            found.append(Instruction(row["prompt"], kind, row["category"], name == "lookalike"))
    return found


def digest(instructions: Iterable[Instruction]) -> str:
    """Hex SHA-256 over all that they say."""
    rows = [[i.prompt, i.kind, i.category, i.lookalike] for i in instructions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read(path: Path) -> list[Instruction]:
    """A user's anchors: JSON lines of {"prompt": text, "kind": "harmful" or "harmless"}, where they like with a
    "category" (text) and, if harmless, "lookalike" (boolean).

    Raises:
        UsageError: one line with file, line and field; or a kind is missing altogether.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: larger than {MAX_BYTES // 1_000_000} MB: anchors are short requests")
    found: dict[str, Instruction] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            instruction = _instruction(line, f"{path}: line {number}")
            found.setdefault(instruction.prompt, instruction)
    for kind in ("harmful", "harmless"):
        for what, wanted in (("to train on", False), ("to validate with", True)):
            if not any(i.kind == kind and i.validates == wanted and not i.lookalike for i in found.values()):
                raise UsageError(
                    f"{path}: no {kind} instruction {what}: give at least 50 of each kind, look-alikes apart"
                )
    return list(found.values())


def _instruction(line: bytes, place: str) -> Instruction:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise UsageError(f'{place}: not JSON: write {{"prompt": "...", "kind": "harmful" or "harmless"}}') from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UsageError(f"{place}: prompt: must be a text that is not empty")
    try:
        row["prompt"].encode()
    except UnicodeEncodeError:
        raise UsageError(f"{place}: prompt: holds half a surrogate pair, which is no text") from None
    if row.get("kind") not in ("harmful", "harmless"):
        raise UsageError(f"{place}: kind: must be harmful or harmless")
    category = row.get("category", "")
    if not isinstance(category, str):
        raise UsageError(f"{place}: category: must be a text")
    lookalike = row.get("lookalike", False)
    if not isinstance(lookalike, bool):
        raise UsageError(f"{place}: lookalike: must be true or false")
    if lookalike and row["kind"] == "harmful":
        raise UsageError(f"{place}: lookalike: only a harmless instruction can look dangerous and not be")
    return Instruction(row["prompt"].strip(), row["kind"], category, lookalike)


# --- Answers ----------------------------------------------------------------------------------------------------------


class AnswerCache:
    """The answers sampled so far, one record a line: {"id", "under", "label", "answer" (token ids)}.

    Args:
        path: of the file, in the user's cache folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # what a crash cut short is made again
            if len(whole) < len(data):
                files.replace_file(path, whole)
            for line in whole.splitlines():
                record = json.loads(line)
                if record.get("matcher", 1) == refusal.VERSION:  # what another one sorted is sampled anew
                    self._records[record["id"], record["under"]] = record

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._records

    def records(self) -> list[dict[str, Any]]:
        return list(self._records.values())

    def add(self, record: dict[str, Any]) -> None:
        self._records[record["id"], record["under"]] = record
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise files.write_error(self._path, error) from None


def tasks(instructions: Sequence[Instruction]) -> list[tuple[Instruction, str]]:
    """Which instruction is answered under which prompts: harmful ones under all three, harmless ones under one each.

    The harmless ones are many, and what they have to teach is how ordinary answers begin.
    """
    found = []
    for i in instructions:
        found += [(i, under) for under in PROMPTS if i.kind == "harmful" or PROMPTS[int(i.id, 16) % 3] == under]
    return found


def sample(
    engine: Engine,
    manual: PromptPair,
    work: Sequence[tuple[Instruction, str]],
    cache: AnswerCache,
    *,
    seed: int,
    stop: CancelToken,
    on_progress: Callable[[int, int], None],
) -> bool:
    """Answer what the cache does not hold yet, as many at once as the engine has conversations.

    Returns:
        Whether everything is there; False where `stop` was set.
    """
    missing = [(i, under) for i, under in work if (i.id, under) not in cache]
    done = len(work) - len(missing)

    def begin(task: tuple[Instruction, str]) -> AnswerStream:
        instruction, under = task
        options = replace(SAMPLING, max_tokens=TOKENS, seed=item_seed(seed, instruction.id))
        pair, framing = _framed(manual, under)
        return engine.generate(instruction.prompt, options, pair=pair, framing=framing, cancel=stop)

    for task, answer in answer_all(engine, missing, begin, stop=stop):
        if isinstance(answer, Exception):
            raise answer
        if answer.finish_reason != "cancelled":
            cache.add(_record(*task, answer))
            done += 1
            on_progress(done, len(work))
    return not stop.is_set


def _framed(manual: PromptPair, under: str) -> tuple[PromptPair, Framing]:
    if under == "opposite":
        swapped = PromptPair("anchors", manual.adversarial.reveal_for_negative_stream(), AdversarialText(manual.safe))
        return swapped, Framing.of(swapped)
    return manual, Framing(manual.safe if under == "safe" else None, None)


def _record(instruction: Instruction, under: str, answer: Answer) -> dict[str, Any]:
    verdict = refusal.classify(answer.text, instruction.prompt, finished=answer.finish_reason != "length")
    ids = [record.token for record in answer.tokens]
    found = {"id": instruction.id, "under": under, "label": verdict.label, "answer": ids}
    return found | {"matcher": refusal.VERSION}


# --- Sorting ----------------------------------------------------------------------------------------------------------


def collect(
    instructions: Sequence[Instruction],
    records: Sequence[dict[str, Any]],
    tokenize: Callable[[str], Sequence[int]],
    end: int,
) -> Anchors:
    """Sort the sampled answers into D_HR, D_HA and D_S; where few were refusals, written ones stand in D_HR.

    Args:
        tokenize: an answer's text to token ids.
        end: the token that ends an answer.
    """
    by_id = {i.id: i for i in instructions}
    sets: dict[tuple[Kind, str], list[Pair]] = {}
    for record in records:
        if (instruction := by_id.get(record["id"])) is not None and record["answer"]:
            key = instruction.kind, record["label"]
            sets.setdefault(key, []).append(Pair(instruction, tuple(record["answer"]), record["under"]))
    refused = sets.get(("harmful", "refusal"), [])
    written: list[Pair] = []
    harmful = [i for i in instructions if i.kind == "harmful"]
    if len(refused) < len(harmful):
        refused_ids = {pair.instruction.id for pair in refused}
        written = [Pair(i, (*tokenize(refusal_for(i)), end)) for i in harmful if i.id not in refused_ids]
    complied, answered = sets.get(("harmful", "answer"), []), sets.get(("harmless", "answer"), [])
    return Anchors((*refused, *written), tuple(complied), tuple(answered))


def refusal_for(instruction: Instruction) -> str:
    """A written refusal that names the instruction's concern; the same one for the same instruction."""
    forms, concerns = written_refusals()
    fitting = forms if instruction.category in concerns else [form for form in forms if "{concern}" not in form]
    form = fitting[int(instruction.id[:8], 16) % len(fitting)]
    return form.replace("{concern}", concerns.get(instruction.category, ""))


def written_refusals() -> tuple[list[str], dict[str, str]]:
    """The written forms, most with a place for {concern}, and the concern of every category."""
    forms = (_DATA / "refusals.txt").read_text("utf-8").split("\n")
    return [form for form in forms if form], json.loads((_DATA / "concerns.json").read_text("utf-8"))
