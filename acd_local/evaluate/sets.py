"""Prompt sets to measure on: read from files, sampled, split into shards.

A set is named on the command line as NAME=FILE:KIND[:COLUMN=VALUE]. KIND says what its prompts are:

    harmful     requests that ought to be refused
    harmless    requests that ought to be answered
    labelled    both, told apart by a label column; gives the two sets NAME-safe and NAME-unsafe
    choice      multiple-choice questions as TruthfulQA's JSON has them (question, mc1_targets, mc2_targets)
    facts       questions with short known answers, one of which has to occur in the answer (question, answers)

and may be left out where the file tells. COLUMN=VALUE keeps the rows with that value (VALUE1|VALUE2: either).

    .csv            a header with a prompt column
    .txt            one prompt per line
    .json           a list of strings, a list of objects, or topics: {topic: {subtopic: [strings]}}
    .jsonl          one string or object per line

Names of columns and fields, in any case; where several are there, the first of a line counts:

    prompt          goal, prompt, instruction, question, behavior; or turns, of which the first is taken
    input           follows the prompt after a blank line (Alpaca)
    context         contextstring, context: precedes the prompt after a blank line (HarmBench)
    type            category, semanticcategory, type: the group of prompts in figures; the topic in JSON of topics
    reference       output, response, answer, best answer, reference: an answer to score, of harmless prompts alone
                    (and never AdvBench's target, the opening of a complying answer)
    label           label, kind: safe or harmless, unsafe or harmful

Whatever is wrong with a file is a `UsageError` of one line that names file, place and remedy.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast, get_args

from acd_local.errors import UsageError, printable
from acd_local.files import read_text, reason
from acd_local.options import MAX_SEED

Kind = Literal["harmful", "harmless", "choice", "facts"]

MAX_FILE = 200_000_000  # bytes
MAX_LINE = 1_000_000  # characters of a line, and of a text in JSON
MAX_FIELD = 131_072  # characters of a CSV field: Python's own limit, kept

_PROMPT = ("goal", "prompt", "instruction", "question", "behavior", "turns")
_CONTEXT = ("contextstring", "context")
_TYPE = ("category", "semanticcategory", "type")
_REFERENCE = ("output", "response", "answer", "best answer", "reference")
_LABEL = ("label", "kind")
_LABELS: dict[str, Kind] = {"safe": "harmless", "harmless": "harmless", "unsafe": "harmful", "harmful": "harmful"}
_KINDS = (*get_args(Kind), "labelled")
_SPEC = "NAME=FILE:KIND[:COLUMN=VALUE]"
_TOPICS_DEPTH = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_SUFFIX = re.compile(rf"(?P<file>.+):(?P<kind>{'|'.join(_KINDS)})(?::(?P<column>[^:=]+)=(?P<value>.*))?", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # U+0080 to U+009F stay: mis-saved quotes in old sets


@dataclass(frozen=True)
class Item:
    """One prompt.

    Attributes:
        id: 16 hex digits of the SHA-256 of the prompt: its identity whatever the set, its order or the shard.
        prompt: what the user says; a context, where there is one, precedes it after a blank line.
        type: the kind of prompt, for figures by type; "" if unknown.
        reference: an answer to score; None if there is none, and for harmful prompts.
        mc1: (choice, whether it is true), exactly one true; empty unless the set's kind is choice.
        mc2: the same with any number of true and false choices, one of either at least.
        answers: one of which a right answer holds; empty unless the set's kind is facts.
    """

    id: str
    prompt: str
    type: str = ""
    reference: str | None = None
    mc1: tuple[tuple[str, bool], ...] = ()
    mc2: tuple[tuple[str, bool], ...] = ()
    answers: tuple[str, ...] = ()

    def is_answered_by(self, text: str) -> bool:
        """Tell whether one of the known answers stands in a text, as whole words, in whatever case."""
        words = unicodedata.normalize("NFKC", text).casefold()
        known = (unicodedata.normalize("NFKC", answer).casefold() for answer in self.answers)
        return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", words) for answer in known)


@dataclass(frozen=True)
class EvalSet:
    """Prompts of one kind under one name; no two items have the same id.

    Attributes:
        source: the file's name, with the filter if there was one; or "built in".
    """

    name: str
    kind: Kind
    items: tuple[Item, ...]
    source: str

    def digest(self) -> str:
        """Return 16 hex digits over what is asked and expected, whatever the order: whether two sets are the same."""
        known = [[i.id, i.type, i.reference, i.mc1, i.mc2, *([i.answers] if i.answers else [])] for i in self.items]
        lines = sorted(map(json.dumps, known))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# --- Reading ----------------------------------------------------------------------------------------------------------


def read(spec: str) -> list[EvalSet]:
    """Read the set that NAME=FILE:KIND[:COLUMN=VALUE] means; of KIND labelled the two sets NAME-safe and NAME-unsafe.

    Of prompts that occur several times in a set the first one counts. A labelled file with one label gives one set.

    Raises:
        UsageError: the spec is malformed, or the file is missing, broken or has no such prompts.
    """
    name, path, kind, wanted = _parsed(spec)
    try:
        rows = _rows(path)
        if wanted is not None:
            rows = _filtered(rows, *wanted)
        sets = _sets(name, kind or _guessed(rows), rows, path.name)
    except _Fault as fault:
        raise UsageError(printable(f"{path}: {fault}")) from None
    if wanted is None:
        return sets
    return [replace(s, source=printable(f"{s.source} ({wanted[0]}={wanted[1]})")) for s in sets]


def smoke() -> list[EvalSet]:
    """Make the built-in sets smoke-harmful and smoke-harmless, 20 prompts each: enough to see that all works."""
    text = resources.files(__package__).joinpath("smoke.jsonl").read_text("utf-8")
    sets = _sets("smoke", "labelled", list(_jsonl_rows(text)), "built in")
    return [replace(s, name=f"smoke-{s.kind}") for s in sets]


def _parsed(spec: str) -> tuple[str, Path, str | None, tuple[str, str] | None]:
    """Name, file, kind and (column, value) of a spec, read from the right: a file's name may hold colons."""
    name, equals, rest = spec.partition("=")
    if not equals or not rest:
        raise UsageError(f"{_quoted(spec)} is no set: write {_SPEC}")
    if not _NAME.fullmatch(name):
        raise UsageError(f"{_quoted(name)} is no name of a set: up to 40 letters, digits, '.', '_' and '-'")
    if not (match := _SUFFIX.fullmatch(rest)):
        _refuse_other_kind(rest)
        return name, _expanded(rest), None, None
    wanted = None if match["column"] is None else (match["column"].strip(), match["value"].strip())
    return name, _expanded(match["file"]), match["kind"], wanted


def _refuse_other_kind(rest: str) -> None:
    """Say of FILE:harmfull or FILE:Column=x that the kind is wrong, not that there is no such file."""
    file, colon, tail = rest.partition(":")
    while colon and not _is_file(_expanded(rest)):
        if _is_file(_expanded(file)):
            kind = _quoted(tail.partition(":")[0])
            raise UsageError(printable(f"{file}: no kind {kind}; known: {', '.join(_KINDS)}; write {_SPEC}"))
        part, colon, tail = tail.partition(":")
        file = f"{file}:{part}"


def _expanded(file: str) -> Path:
    """Replace ~ in a path: few shells do that after NAME=."""
    try:
        return Path(file).expanduser()
    except RuntimeError:  # no such user
        return Path(file)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


class _Fault(Exception):
    """A fault of a file, without its name in front."""


@dataclass(frozen=True)
class _Row:
    """One prompt as the file has it.

    Attributes:
        place: "line 3" or "entry 3".
        fields: by name; names lower-case and without surrounding white space.
    """

    place: str
    fields: Mapping[str, Any]

    def first(self, names: Iterable[str]) -> tuple[str, Any]:
        """Find the first of these fields that is there, with its name; ("", None) if none is."""
        return next(((name, self.fields[name]) for name in names if name in self.fields), ("", None))


def _rows(path: Path) -> list[_Row]:
    readers: dict[str, Callable[[str], Iterator[_Row]]] = {
        ".csv": _csv_rows,
        ".txt": _txt_rows,
        ".json": _json_rows,
        ".jsonl": _jsonl_rows,
    }
    _check_file(path)
    if path.suffix.lower() not in readers:
        raise _Fault(f"files of this kind are not read; a set is one of {', '.join(readers)}")
    text = read_text(path, MAX_FILE, "split it").replace("\r", "\n")
    if not text.strip():
        raise _Fault("is empty")
    rows = list(readers[path.suffix.lower()](text))
    if not rows:
        raise _Fault("has no prompts")
    return rows


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise _Fault("is a folder, not a file")
        if not path.is_file():
            raise _Fault("not a file" if path.exists() else "no such file")
    except (OSError, ValueError) as error:
        raise _Fault(f"cannot be read: {reason(error)}") from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number the lines; not by str.splitlines, which cuts at U+2028 and the like too."""
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > MAX_LINE:
            raise _Fault(f"line {number}: longer than {MAX_LINE:,} characters: this is no prompt")
        yield number, line


def _txt_rows(text: str) -> Iterator[_Row]:
    for number, line in _lines(text):
        if line.strip():
            yield _Row(f"line {number}", {"prompt": line})


def _csv_rows(text: str) -> Iterator[_Row]:
    reader = csv.reader((line + "\n" for _, line in _lines(text)), strict=True)
    header: list[str] = []
    start = 1  # of the row: a quoted field may span lines
    try:
        for cells in reader:
            if not header:
                header = [cell.strip() for cell in cells] if any(cell.strip() for cell in cells) else []
                _check_header(header, start)
            elif len(cells) > len(header):
                raise _Fault(
                    f"line {start}: {len(cells)} fields under {len(header)} columns: quote a field that holds commas"
                )
            elif any(cell.strip() for cell in cells):
                yield _Row(f"line {start}", _named(zip(header, cells, strict=False)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise _Fault(f"line {start}: {_csv_message(str(error))}") from None


def _check_header(header: list[str], line: int) -> None:
    names = [name.lower() for name in header if name]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise _Fault(f"line {line}: two columns named {_quoted(double)}")
    if header and not set(names) & set(_PROMPT):
        raise _Fault(f"line {line}: no prompt column ({', '.join(_PROMPT[:-1])}); found: {_listed(header)}")


def _csv_message(message: str) -> str:
    if "field limit" in message:
        return f"a field of over {MAX_FIELD:,} characters: a quote before it may never be closed"
    if "unexpected end" in message:
        return "a quote opened here is never closed"
    return f"broken CSV: {message}"


def _jsonl_rows(text: str) -> Iterator[_Row]:
    for number, line in _lines(text):
        if line.strip():
            yield _entry(f"line {number}", _parsed_json(line, number))


def _json_rows(text: str) -> Iterator[_Row]:
    data = _parsed_json(text)
    if not isinstance(data, list | dict):
        raise _Fault(f"must be a list of prompts or an object of topics, not {_kind_of(data)}")
    several = isinstance(data, dict) and len(data) > 1  # {"data": [...]} names no topic
    for number, (topic, value) in enumerate(_leaves(data), 1):
        row = _entry(f"entry {number}", value)
        yield replace(row, fields={"category": topic, **row.fields}) if several else row


def _leaves(data: Any) -> Iterator[tuple[str, Any]]:
    """List (top topic, entry) of nested topics, in order; the topic of a plain list is ""."""
    if isinstance(data, list):
        yield from (("", value) for value in data)
        return
    if len(data) > 1 and not set(_PROMPT).isdisjoint(_named(data.items())):
        raise _Fault(f"an object of columns, {_listed(data)}: write a list of objects instead")
    for topic, part in data.items():
        open_parts = [(part, 1)]
        while open_parts:
            part, depth = open_parts.pop()
            if isinstance(part, list):
                yield from ((topic, value) for value in part)
            elif not isinstance(part, dict):
                raise _Fault(f"topic {_quoted(topic)}: must hold a list of prompts, not {_kind_of(part)}")
            elif depth >= _TOPICS_DEPTH:
                raise _Fault(f"topic {_quoted(topic)}: nested too deeply: topics may have {_TOPICS_DEPTH} levels")
            else:
                open_parts += [(value, depth + 1) for value in reversed(part.values())]


def _parsed_json(text: str, line: int | None = None) -> Any:
    """Parse a JSON text; `line`: its number, where it is one line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one value per line is .jsonl" if line is None and error.msg == "Extra data" else ""
        raise _Fault(f"line {line or error.lineno}: column {error.colno}: broken JSON: {error.msg}{hint}") from None
    except RecursionError:
        message = "nested too deeply: these are no prompts"
    except ValueError as error:  # a number of thousands of digits
        message = f"broken JSON: {error}"
    raise _Fault(f"line {line}: {message}" if line else message)


def _entry(place: str, value: Any) -> _Row:
    if isinstance(value, str):
        return _Row(place, {"prompt": value})
    if not isinstance(value, dict):
        raise _Fault(f"{place}: must be a text or an object, not {_kind_of(value)}")
    return _Row(place, _named(value.items()))


def _named(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Name fields in lower case; of several in different case the first counts. JSON's null is no field."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if value is not None:
            fields.setdefault(name.strip().lower(), value)
    return fields


# --- From rows to sets ------------------------------------------------------------------------------------------------


def _filtered(rows: list[_Row], column: str, value: str) -> list[_Row]:
    name = column.lower()
    found = [(row, _plain(row.fields[name]).lower()) for row in rows if name in row.fields]
    if not found:
        raise _Fault(f"no column {_quoted(column)} to choose rows by; found: {_columns(rows)}")
    wanted = {part.strip().lower() for part in value.split("|")}
    kept = [row for row, text in found if text in wanted]
    if not kept:
        values = dict.fromkeys(_plain(row.fields[name]) for row, _ in found)
        raise _Fault(f"no row has {_quoted(f'{column}={value}')}; values there: {_listed(values)}")
    return kept


def _guessed(rows: list[_Row]) -> str:
    """Guess the kind of a file whose spec names none."""
    if all("mc1_targets" in row.fields for row in rows):
        return "choice"
    if all("answers" in row.fields for row in rows):
        return "facts"
    if all(_plain(row.first(_LABEL)[1]).lower() in _LABELS for row in rows):
        return "labelled"
    raise _Fault("harmful or harmless? Write FILE:harmful or FILE:harmless")


def _sets(name: str, kind: str, rows: list[_Row], source: str) -> list[EvalSet]:
    found: dict[Kind, dict[str, Item]] = {"harmless": {}, "harmful": {}, "choice": {}, "facts": {}}
    for row in rows:
        try:
            row_kind = _label(row) if kind == "labelled" else cast(Kind, kind)
            item = _item(row, row_kind)
            found[row_kind].setdefault(item.id, item)
        except _Fault as fault:
            raise _Fault(f"{row.place}: {fault}") from None
    suffix = {"harmless": "-safe", "harmful": "-unsafe"} if kind == "labelled" else {}
    return [
        EvalSet(name + suffix.get(row_kind, ""), row_kind, tuple(items.values()), printable(source))
        for row_kind, items in found.items()
        if items
    ]


def _item(row: _Row, kind: Kind) -> Item:
    column, value = row.first(_PROMPT)
    if not column:
        raise _Fault(f"no prompt field ({', '.join(_PROMPT)}); found: {_listed(row.fields)}")
    prompt = _checked_text(column, _first_turn(value))
    if not prompt:
        raise _Fault(f"{column}: is empty")
    context = _checked_text(*row.first(_CONTEXT))
    addition = _checked_text("input", row.fields.get("input"))
    prompt = "\n\n".join(part for part in (context, prompt, addition) if part)
    return Item(
        id=hashlib.sha256(prompt.encode()).hexdigest()[:16],
        prompt=prompt,
        type=" ".join(_checked_text("type", _plain(row.first(_TYPE)[1])).split()),
        reference=_reference(row) if kind == "harmless" else None,
        mc1=_choices(row, "mc1_targets") if kind == "choice" else (),
        mc2=_choices(row, "mc2_targets") if kind == "choice" else (),
        answers=_answers(row) if kind == "facts" else (),
    )


def _reference(row: _Row) -> str | None:
    """Find the answer to score, if there is one in words (an exam's may be a number)."""
    column, value = row.first(_REFERENCE)
    text = _first_turn(value)
    return (_checked_text(column, text) or None) if isinstance(text, str) else None


def _answers(row: _Row) -> tuple[str, ...]:
    """Read the known answers of a fact: a list of texts, or one."""
    value = row.fields.get("answers")
    found = tuple(_checked_text("answers", text) for text in (value if isinstance(value, list) else [value]))
    if not found or not all(found):
        raise _Fault("answers: must be a text, or a list of them, none of them empty")
    return found


def _label(row: _Row) -> Kind:
    column, value = row.first(_LABEL)
    if not column:
        raise _Fault(f"no label field; found: {_listed(row.fields)}")
    if (label := _plain(value).lower()) not in _LABELS:
        raise _Fault(f"{column}: {_quoted(label)} is no label: it must be one of {', '.join(_LABELS)}")
    return _LABELS[label]


def _choices(row: _Row, name: str) -> tuple[tuple[str, bool], ...]:
    """Read mc1_targets or mc2_targets: {choice: 0 or 1}.

    Empty choices are left out: TruthfulQA has some by mistake, and as no tokens they would be the likeliest of all.
    """
    targets = row.fields.get(name)
    if not isinstance(targets, dict):
        raise _Fault(f"{name}: must be an object of choices with 0 or 1; a choice set is TruthfulQA's JSON")
    if not all(isinstance(truth, int) and truth in (0, 1) for truth in targets.values()):
        raise _Fault(f"{name}: a choice must have 0 (false) or 1 (true)")
    choices = tuple((_checked_text(name, text), truth == 1) for text, truth in targets.items())
    choices = tuple((text, truth) for text, truth in choices if text)
    true = sum(truth for _, truth in choices)
    if name == "mc1_targets" and true != 1:
        raise _Fault(f"{name}: must have one true choice, not {true}")
    if not 0 < true < len(choices):
        raise _Fault(f"{name}: must have true and false choices")
    return choices


def _first_turn(value: Any) -> Any:
    """Return the first turn of a conversation given as a list; anything else as it is."""
    return value[0] if isinstance(value, list) and value else value


def _checked_text(name: str, value: Any) -> str:
    """Return a field's text without surrounding white space; "" for None."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Fault(f"{name}: must be a text, not {_kind_of(value)}")
    if len(value) > MAX_LINE:
        raise _Fault(f"{name}: longer than {MAX_LINE:,} characters: this is no prompt")
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    if control := _CONTROL.search(text):
        raise _Fault(f"{name}: holds the control character U+{ord(control[0]):04X}: remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Fault(f"{name}: holds half a character, U+{ord(text[error.start]):04X}: remove it") from None
    return text.strip()


def _plain(value: Any) -> str:
    """Make a value comparable with what somebody typed; "" for lists, objects and None."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return value.strip() if isinstance(value, str) else ""


def _columns(rows: Iterable[_Row]) -> str:
    return _listed(dict.fromkeys(name for row in rows for name in row.fields))


def _listed(names: Iterable[str]) -> str:
    shown = [_quoted(name) for name in names]
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return (", ".join(shown[:12]) or "nothing") + more


def _quoted(text: str) -> str:
    return printable(repr(text if len(text) <= 60 else text[:57] + "..."))


def _kind_of(value: Any) -> str:
    kinds: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "nothing" if value is None else "a text")


# --- Choosing ---------------------------------------------------------------------------------------------------------


def sample(s: EvalSet, limit: int | None, seed: int) -> EvalSet:
    """Draw `limit` items without replacement, or all if there are fewer; None leaves the set as it is.

    The draw is the start of an order fixed by seed and ids alone, so that it depends neither on the order of the file
    nor on the limit: a larger one adds items to those of a smaller one.

    Raises:
        UsageError: limit < 1.
    """
    if limit is None:
        return s
    if limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    order = sorted(s.items, key=lambda item: _digest("sample", seed, item.id))
    return replace(s, items=tuple(order[:limit]))


def shard(s: EvalSet, index: int, count: int) -> EvalSet:
    """Take part `index` (from 1) of `count`: every count-th item in the order of ids. Sizes differ by one at most.

    Raises:
        UsageError: count < 1, or index not in 1 .. count.
    """
    if not 1 <= index <= count:
        raise UsageError(f"shard {index}/{count}: must be i/n with i from 1 to n")
    mine = set(sorted(item.id for item in s.items)[index - 1 :: count])
    return replace(s, items=tuple(item for item in s.items if item.id in mine))


def item_seed(run_seed: int, item_id: str) -> int:
    """Derive the sampler's seed for one prompt, 0 .. MAX_SEED: from the run's seed and the prompt's identity alone."""
    return int.from_bytes(_digest("seed", run_seed, item_id)[:8], "big") % (MAX_SEED + 1)


def _digest(purpose: str, seed: int, item_id: str) -> bytes:
    return hashlib.sha256(f"{purpose}:{seed}:{item_id}".encode()).digest()
