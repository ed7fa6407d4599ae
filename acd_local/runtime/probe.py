"""Checks a model file at first contact: its header, then one load in a child process, remembered on disk.

llama.cpp answers some kinds of damage by aborting the process, which no Python code can catch. So a file that was
never loaded before (by path, size and time of change, for this machine and its llama.cpp) is first loaded by a child,
and only a file that the child survived is opened in this process.

A child also dies where llama.cpp itself crashes on this processor. So a file that kills its child is tried once more
without llama.cpp's extra buffer types, and where that fails as well, a tiny model of our own tells whose fault it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acd_local import files
from acd_local.errors import AcdError, InternalError, ModelError, OutOfMemoryError, shown, tells_of_memory
from acd_local.runtime import child, gguf_header, machine
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.threads import physical_cores

if TYPE_CHECKING:
    from acd_local.runtime.llama import Context

_FORMAT = 3  # of a verdict file
_REFUSED = 4  # the child's exit code when llama.cpp refused the file and lived
_SAMPLE = Path(__file__).with_name("sample.gguf")  # 4- and 8-bit weights, written by tests/helpers/tiny_gguf.py
_CRASHES = ("SIGSEGV", "SIGABRT", "SIGILL", "SIGBUS", "SIGFPE", "SIGTRAP", "SIGSYS")
_ABORTED, _STOPPED = 3, 0xC000013A  # Windows: the exit codes of abort() and of Ctrl-C
_WITHOUT = "--no-extra-buffers"  # what the child is told
_BATCHES = (8, 40)  # rows of one sequence
# Something of every script and of every length in UTF-8: vocabularies may lack what their tokenizer counts on.
_TEXT = "".join(map(chr, (*range(1, 0x300), *range(0x300, 0xD800, 64), *range(0xE000, 0x110000, 4096))))
_SLOW_DISK = 50e6  # bytes per second that the child may take for large files


def verify(path: Path, *, timeout: float = 120.0, force: bool = False) -> GGUFInfo:
    """Make sure that loading `path` in this process is safe, and say what the model is.

    Args:
        path: a GGUF file; for a split model its first part.
        timeout: seconds the child may take, plus one per 50 MB of file.
        force: check again, even if the file was found good before.

    Where no child can be started (see `child.can_start`) only the header is checked.
    The verdict is kept under the user's cache directory (or $ACD_CACHE_DIR); that it cannot be written is no error.

    Raises:
        ModelError: not found, damaged, not a model that generates text, or llama.cpp cannot load it.
        OutOfMemoryError: there is not enough memory to load it.
        InternalError: the child could not be run at all, or llama.cpp crashes on every model here.
    """
    info = None if force else remembered(path)
    if info is not None:
        return info
    parts = signature((path,))  # taken before the check: a file that changes meanwhile is checked again next time
    info = gguf_header.read_header(path)
    if len(info.parts) > 1:
        parts = signature(info.parts)
    if child.can_start():
        said = _try(path, timeout + info.size / _SLOW_DISK)
        info = gguf_header.from_json(gguf_header.to_json(info) | said)
        _remember(path, parts, info)
    return info


# --- the verdicts on disk --------------------------------------------------------------------------------------------


def _verdict_name(path: Path) -> str:
    return f"verified/{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def signature(parts: tuple[Path, ...]) -> list[list[object]] | None:
    """Tell a model's files from others without reading them: path, size and time of change; None: not there."""
    try:
        stats = [(p.resolve(), p.stat()) for p in parts]
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
        return None
    return [[str(p), s.st_size, s.st_mtime_ns] for p, s in stats]


def remembered(path: Path) -> GGUFInfo | None:
    """Return what `verify` would, where the file is known to be good; else None."""
    try:
        verdict = json.loads(files.kept(_verdict_name(path)) or "")
        info = gguf_header.from_json(verdict["info"])
        parts = gguf_header.split_parts(path, len(info.parts))
        if [verdict["format"], verdict["machine"], verdict["extra_buffers"]] != _circumstances():
            return None
        if verdict["parts"] != signature(parts):
            return None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ModelError):
        return None
    return replace(info, path=path, parts=parts)


def _circumstances() -> list[object]:
    """Return what a verdict holds for: format, machine, extra_buffers."""
    return [_FORMAT, machine.identity(), machine.extra_buffers()]


def _remember(path: Path, parts: list[list[object]] | None, info: GGUFInfo) -> None:
    where = dict(zip(("format", "machine", "extra_buffers"), _circumstances(), strict=True))
    verdict = where | {"parts": parts, "info": gguf_header.to_json(info)}
    with suppress(OSError, RuntimeError):  # as in signature
        files.keep(_verdict_name(path), json.dumps(verdict))


# --- the parent's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ending:
    """The end of a child, what it said on stdout (JSON lines, taken together), and its log."""

    code: int
    said: dict[str, Any]
    log: list[str]

    @property
    def lacked_memory(self) -> bool:
        return self.code not in (0, _REFUSED) and tells_of_memory("\n".join(self.log))

    @property
    def crashed(self) -> bool:
        """Whether llama.cpp ended the process, rather than we, somebody outside, or a lack of memory."""
        if self.lacked_memory:
            return False
        if sys.platform == "win32":
            status = self.code & 0xFFFFFFFF
            return status == _ABORTED or (status >> 28 == 0xC and status != _STOPPED)
        return -self.code in [getattr(signal, name, None) for name in _CRASHES]


def _try(path: Path, timeout: float) -> dict[str, Any]:
    """Let children load `path` and decode with it, until it is clear whether this process may, and how.

    Returns:
        What llama.cpp says of the model, for `gguf_header.from_json`.

    Raises: see `verify`.
    """
    extra = machine.extra_buffers()
    ending = first = _run(path, timeout, extra)
    if first.crashed and extra:
        ending = _run(path, timeout, False)
        if ending.code == 0:
            machine.avoid_extra_buffers(_slowdown(first, ending))
    if ending.crashed and not _sample_runs():
        raise InternalError(
            f"llama.cpp crashes on every model here ({_how(ending.code)}), so that {shown(path)} could not be tried: "
            "this build does not fit the processor. Install a prebuilt wheel of llama-cpp-python, or build one here: "
            "pip install --no-cache-dir --force-reinstall --no-binary llama-cpp-python llama-cpp-python"
        )
    if ending.code != 0:
        raise _error(path, ending)
    return {name: ending.said[name] for name in ("special", "chat_template") if name in ending.said}


def _slowdown(with_extra: _Ending, without: _Ending) -> float | None:
    try:
        return float(without.said["row_seconds"]) / float(with_extra.said["row_seconds"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _sample_runs() -> bool:
    """Tell whether llama.cpp runs our own tiny model: as models are loaded here, else without extra buffer types.

    That those must be left out is remembered.
    """
    extra = machine.extra_buffers()
    with suppress(AcdError):  # no crash: nothing is known against llama.cpp
        if not _run(_SAMPLE, 60.0, extra).crashed:
            return True
        if extra and not _run(_SAMPLE, 60.0, False).crashed:
            machine.avoid_extra_buffers()
            return True
        return False
    return True


def _run(path: Path, timeout: float, extra_buffers: bool) -> _Ending:
    given = [str(path.absolute()), *([] if extra_buffers else [_WITHOUT])]
    try:
        done = child.run_module("acd_local.runtime.probe", *given, timeout=timeout)
    except TimeoutError:
        raise ModelError(f"{shown(path)}: llama.cpp did not finish loading it within {timeout:.0f} s") from None
    except OSError as error:
        raise InternalError(f"cannot start {shown(sys.executable)} to check the model: {error.strerror}") from None
    said: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        with suppress(ValueError, TypeError):
            said |= json.loads(line)
    return _Ending(done.returncode, said, _lines(done.stderr))


def _error(path: Path, ending: _Ending) -> AcdError:
    code, said, log = ending.code, ending.said, ending.log
    if code == _REFUSED:
        message = shown(str(said.get("message", "llama.cpp cannot load it")), 500)
        kind = OutOfMemoryError if said.get("code") == OutOfMemoryError.code else ModelError
        return kind(f"{shown(path)}: {message}")
    if ending.lacked_memory:
        return OutOfMemoryError(f"{shown(path)}: there is not enough memory to check it in a child process")
    if code in (1, 2):  # Python's own, or OpenMP's
        last = log[-1] if log else "no message"
        return InternalError(f"the check of {shown(path)} in a child process failed: {last}")
    if code == -getattr(signal, "SIGKILL", 9):
        return OutOfMemoryError(f"{shown(path)}: the system stopped the process that loaded it, probably out of memory")
    if not ending.crashed:
        return InternalError(f"the check of {shown(path)} in a child process was stopped ({_how(code)})")
    cause = _telling(log)
    how = _how(code)
    return ModelError(f"{shown(path)}: llama.cpp aborted while loading it ({how})" + (f": {cause}" if cause else ""))


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code & 0xFFFFFFFF:#x}"


def _lines(raw: bytes) -> list[str]:
    return [shown(line.strip(), 300) for line in raw.decode("utf-8", "replace").splitlines() if line.strip()]


def _telling(log: list[str]) -> str:
    """Find the line that says why: an assertion, the text of a C++ exception, else the last one."""
    for mark in ("GGML_ASSERT", "what():", "error"):
        for line in reversed(log):
            if mark in line:
                return line.split("/")[-1] if mark == "GGML_ASSERT" else line.removeprefix("what():").strip()
    return log[-1] if log else ""


# --- the child's side ------------------------------------------------------------------------------------------------


def _end_with_parent() -> None:
    """End with the parent: one that was stopped while we load a large model must not leave us behind."""
    os.read(0, 1)
    os._exit(1)


def _child(path: Path, extra_buffers: bool) -> int:
    """Load the model, tokenize and decode with it: 0 when llama.cpp lives through it, else a JSON line says why not."""
    import logging

    from acd_local.runtime import llama

    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer: it ends this process
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)  # survives an abort
    doing = "load"
    try:
        with llama.Model(path, gpu_layers=0, extra_buffers=extra_buffers) as model:
            special, template = [*model.vocab.special.values()], model.chat_template()
            print(json.dumps({"special": special, "chat_template": template or ""}), flush=True)
            doing = "read a text with"
            for parse_special in (False, True):
                model.vocab.tokenize(_TEXT, parse_special=parse_special)
            doing = "create a context for"
            with llama.Context(model, n_ctx=256, n_seq=2, threads=physical_cores()) as context:
                doing = "run"
                _decode(context)
    except Exception as error:
        said = str(error) if isinstance(error, AcdError) else f"{type(error).__name__}: {error}"
        cause = said.split(f"{path}: ", 1)[-1].removeprefix("error loading model: ")
        # Only weights that do not fit are the machine's fault: the context is tiny.
        code = error.code if isinstance(error, AcdError) and doing == "load" else ModelError.code
        print(json.dumps({"code": code, "message": f"llama.cpp cannot {doing} it: {cause}"}), flush=True)
        return _REFUSED
    return 0


def _decode(context: Context) -> None:
    """Decode batches of every kind: kernels differ by rows. One row's time is said first: longer batches may crash.

    Whether the numbers are finite is judged later, on a real prompt: this is about living through it.
    """
    bos, length, times = context.model.vocab.bos, 0, list[float]()
    token = bos if 0 <= bos < context.model.n_vocab else 0

    def rows(n: int, beside: int = 0) -> float:
        """Make the next `n` rows of sequence 0, and the first `beside` of sequence 1."""
        nonlocal length
        seqs, outputs = [0] * n + [1] * beside, [0] * (n - 1) + [1] * (1 + beside)
        started = time.perf_counter()
        context.decode([token] * (n + beside), seqs, [*range(length, length + n), *range(beside)], outputs)
        context.logits(sum(outputs))
        length += n
        return time.perf_counter() - started

    rows(1)  # reads the weights from the disk
    while len(times) < 8 and sum(times) < 0.5:
        times.append(rows(1))
    print(json.dumps({"row_seconds": min(times)}), flush=True)
    rows(1, beside=1)
    for n in _BATCHES:
        rows(n)


if __name__ == "__main__":
    sys.exit(_child(Path(sys.argv[1]), _WITHOUT not in sys.argv[2:]))
