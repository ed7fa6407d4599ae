"""Every error this package raises on purpose, as one tree.

Each class carries the process exit code the command line tools end with and the short machine name that the JSON
outputs use, so that no layer has to map messages to codes.
"""

from __future__ import annotations


class AcdError(Exception):
    """Base class. `str(error)` is one line that names what is wrong and what to do.

    Attributes:
        exit_code: what the command line tools exit with.
        code: short machine-readable name, stable across releases.
    """

    exit_code: int = 1
    code: str = "internal"


class InternalError(AcdError):
    """A state the code does not expect, or a failure inside llama.cpp that is nobody's input error."""


class OutOfMemoryError(AcdError):
    """The model, its KV cache or a compute buffer could not be allocated."""

    code = "out_of_memory"


class NumericalError(AcdError):
    """The model produced NaN or infinite logits: nothing can be sampled from them."""

    code = "numerical"


class EngineClosedError(AcdError):
    """The engine (or chat) was used after `close()`, in a forked child, or while the process ends."""

    code = "closed"


class EngineBusyError(AcdError):
    """No answer can be begun now: this very thread streams another one, or too many requests wait already."""

    code = "busy"


class UsageError(AcdError):
    """An option or argument is out of range, unknown or contradictory."""

    exit_code = 2
    code = "usage"


class ModelError(AcdError):
    """The model was not found, or is not a GGUF file that llama.cpp can load and generate text from."""

    exit_code = 3
    code = "model"


class ContextError(AcdError):
    """The conversation, or a single message, does not fit the context of one stream."""

    exit_code = 4
    code = "context"


class PairError(AcdError):
    """A prompt pair is missing, broken, or does not fit the model."""

    exit_code = 5
    code = "pair"


class StorageError(AcdError):
    """A file cannot be written as the storage is full or fails, wherever it happens."""

    exit_code = 6
    code = "storage"


_NO_MEMORY = (
    "failed to map segment",
    "annot allocate memory",
    "can't allocate memory",
    "can't start new thread",
    "MemoryError",
    "bad_alloc",
    "mem_buffer != NULL",  # ggml
    "Thread creation failed",  # libgomp
    "Memory allocation still failed",  # OpenBLAS, numpy's
)


def tells_of_memory(text: str) -> bool:
    """Tell whether a library's message means that memory ran out: each says it in its own way, and in other classes."""
    return any(words in text for words in _NO_MEMORY)


def printable(text: str) -> str:
    """Return `text` on one line: what would not print is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(text: object, limit: int = 200) -> str:
    """Return `text` fit for one line of a message: unprintable characters escaped, long text cut."""
    line = printable(str(text))
    return line if len(line) <= limit else f"{line[: limit // 2]}...{line[-limit // 2 :]}"
