"""Holds an answer to a JSON schema: which tokens may come next, by llguidance. The one module that imports it.

llguidance is Rust, its failures are errors, and its work is bounded: it runs in this process.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from acd_local.errors import UsageError
from acd_local.runtime import schema
from acd_local.runtime.llama import ATTR_CONTROL, Logits, Vocab
from acd_local.runtime.schema import Checked, Schema

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# One space, or a new line and its indentation, wherever JSON allows space: an answer cannot go on with space for ever.
_SPACE = r" |\n[ \t]{0,40}"
# Without "u": a name could be said a second time by \u escapes, past the schema of the name.
_ESCAPES = 'nrbtf\\"'
_MAX_LEXER_STATES = 50_000  # 1 to 2 kB each
_MAX_TRIALS = 100
_NO_WAY_ON = "NoExtensionBias"  # llguidance's word where the vocabulary has no token to go on with
# Words of llguidance's, what it cannot honour where it says them, and why; None: in its own words.
_CAUSES: tuple[tuple[str, str, str | None], ...] = (
    ("min/maxProperties", "'minProperties' or 'maxProperties'", "beside properties that are not required"),
    ("circular references", "'$ref'", "a reference in a circle, beside other keywords"),
    ("patternProperty", "'patternProperties'", "expressions that one name can match both"),
    ("Unable to determine", "'pattern'", "too hard beside the lengths and expressions that hold there as well"),
    ("Regex is empty", "no text can satisfy what stands", "lengths, patterns and formats contradict each other"),
    ("nsatisfiable", "no text can satisfy what stands", None),
    ("", "what stands", None),
)


class SchemaGuard:
    """Keeps only the tokens that a JSON schema allows next, before any contrast is taken.

    Args:
        text: the schema.

    Raises:
        UsageError: no schema that can be honoured, see `schema.read`.
    """

    def __init__(self, vocab: Vocab, text: str) -> None:
        checked = schema.read(text)
        self._n_tokens = vocab.n_tokens
        self._matcher = _compile(_tokenizer(vocab), checked)

    def restrict(self, logits: Logits, beta: float) -> Logits:
        """Return a copy, shape (n_vocab,), with -inf at every token that is illegal here, whatever `beta` is.

        Tokens that end the answer are legal exactly where the text so far satisfies the schema.

        Raises:
            UsageError: the work for this text is over llguidance's limits.
        """
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            if (error := _first_line(self._matcher.get_error())) != _NO_WAY_ON:
                raise UsageError(f"the JSON schema is too complex: {error}")
            return np.full_like(logits, -np.inf)
        legal = np.unpackbits(np.frombuffer(mask, np.uint8), count=self._n_tokens, bitorder="little").view(np.bool_)
        return np.where(legal, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Go on behind a legal token that does not end the answer.

        Raises:
            UsageError: the text is over llguidance's limits.
        """
        if not self._matcher.consume_token(token):
            raise UsageError(f"the JSON schema is too complex: {_first_line(self._matcher.get_error())}")


class _Words:
    """A vocabulary as llguidance's tokenizers show it."""

    bos_token_id = None

    def __init__(self, vocab: Vocab) -> None:
        eog = vocab.eog_tokens()
        self.eos_token_id = min(eog, default=None)
        # What ends an answer, and control tokens, are no text even where they have one.
        self.special_token_ids = [t.id for t in vocab.special.values() if t.attr & ATTR_CONTROL or t.ends]
        self.tokens = [vocab.piece(i) for i in range(vocab.n_tokens)]
        for i in self.special_token_ids:
            self.tokens[i] = f"<|acd {i}|>".encode()

    def __call__(self, text: str) -> Sequence[int]:
        """Refuse to tokenize: this is asked where a grammar forces text, which ours never do (see `_grammar`)."""
        raise NotImplementedError


_tokenizers: weakref.WeakKeyDictionary[Vocab, LLTokenizer] = weakref.WeakKeyDictionary()
_building = threading.Lock()


def _tokenizer(vocab: Vocab) -> LLTokenizer:
    """Make llguidance's view of a vocabulary, once: some 0.4 s at 49k tokens, 1.5 s at 152k."""
    from llguidance import LLTokenizer, TokenizerWrapper

    with _building:
        if vocab not in _tokenizers:
            _tokenizers[vocab] = LLTokenizer(
                TokenizerWrapper(_Words(vocab)),
                eos_token=sorted(vocab.eog_tokens()) or None,
                slices=LLTokenizer.json_slices(),
            )
        return _tokenizers[vocab]


def _compile(tokenizer: LLTokenizer, checked: Checked) -> LLMatcher:
    matcher = _matcher(tokenizer, checked.schema)
    matcher.compute_bitmask()  # whatever is over a limit at once is refused before the model says anything
    if matcher.is_error() and _first_line(matcher.get_error()) != _NO_WAY_ON:
        path, error = _culprit(tokenizer, checked)
        what, why = next((what, why) for words, what, why in _CAUSES if words in error)
        schema.refuse(what, path, why or error.removeprefix("Unsatisfiable schema: "))
    return matcher


def _matcher(tokenizer: LLTokenizer, restated: Schema) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    return LLMatcher(tokenizer, _grammar(restated), log_level=0, limits=limits)


def _grammar(restated: Schema) -> str:
    options = {"whitespace_pattern": _SPACE, "json_allowed_escapes": _ESCAPES}
    body: dict[str, Any] = {"allOf": [restated]} if isinstance(restated, bool) else restated
    # no_forcing: else a mask holds one token only wherever the text is forced, the first of its usual tokenization.
    return '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps({"x-guidance": options} | body)


def _culprit(tokenizer: LLTokenizer, checked: Checked) -> tuple[str, str]:
    """Find path and cause of the smallest part that llguidance refuses by itself in the same words."""
    defs, trials = checked.schema["$defs"], 0
    node: Schema = checked.schema
    path, error = "", _first_line(_matcher(tokenizer, node).get_error())
    met: set[int] = set()
    descending = True
    while descending:
        descending = False
        for part in schema.parts(node, defs):
            if isinstance(part, bool) or id(part) in met or trials == _MAX_TRIALS:
                continue
            met.add(id(part))
            trials += 1
            if _first_line(_matcher(tokenizer, part | {"$defs": defs}).get_error()) == error:
                node, path, descending = part, checked.paths.get(id(part), path), True
                break
    return path, error


def _first_line(error: str) -> str:
    return error.split("failed to compile JSON schema: ", 1)[-1].split("\n", 1)[0].strip()[:200]
