"""First contact with a model file: header check, then one load in a child process, remembered on disk.

llama.cpp answers some kinds of damage by aborting the process, which no Python code can catch. So a file that was
never loaded before (by path, size and time of change, for the installed llama-cpp-python) is first loaded by a child,
and only a file that the child survived is opened in this process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from acd_local import files
from acd_local.errors import InternalError, ModelError, OutOfMemoryError, tells_of_memory
from acd_local.runtime import child, gguf_header
from acd_local.runtime.gguf_header import GGUFInfo, shown

_FORMAT = 1  # of a verdict file
_REFUSED = 3  # the child's exit code when llama.cpp refused the file and lived
_SLOW_DISK = 50e6  # bytes per second that the child may take for large files


def verify(path: Path, *, timeout: float = 120.0, force: bool = False) -> GGUFInfo:
    """Make sure that loading `path` in this process is safe, and say what the model is.

    Args:
        path: a GGUF file; for a split model its first part.
        timeout: seconds the child may take, plus one per 50 MB of file.
        force: check again, even if the file was found good before.

    A frozen application (`sys.frozen`) has no Python to start as a child: there only the header is checked.
    The verdict is kept under the user's cache directory (or $ACD_CACHE_DIR); that it cannot be written is no error.

    Raises:
        ModelError: not found, damaged, not a model that generates text, or llama.cpp cannot load it.
        OutOfMemoryError: there is not enough memory to load it.
        InternalError: the child could not be run at all.
    """
    info = None if force else _remembered(path)
    if info is not None:
        return info
    parts = _signature((path,))  # taken before the check: a file that changes meanwhile is checked again next time
    info = gguf_header.read_header(path)
    if len(info.parts) > 1:
        parts = _signature(info.parts)
    if child.can_start():
        _load_in_child(path, timeout + info.size / _SLOW_DISK)
        _remember(path, parts, info)
    return info


# --- the verdicts on disk --------------------------------------------------------------------------------------------


def _verdict_name(path: Path) -> str:
    return f"verified/{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _signature(parts: tuple[Path, ...]) -> list[list[object]] | None:
    try:
        stats = [(p.resolve(), p.stat()) for p in parts]
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
        return None
    return [[str(p), s.st_size, s.st_mtime_ns] for p, s in stats]


def llama_version() -> str:
    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return ""


def _remembered(path: Path) -> GGUFInfo | None:
    try:
        verdict = json.loads(files.kept(_verdict_name(path)) or "")
        info = gguf_header.from_json(verdict["info"])
        parts = gguf_header.split_parts(path, len(info.parts))
        if [verdict["format"], verdict["llama"]] != [_FORMAT, llama_version()]:
            return None
        if verdict["parts"] != _signature(parts):
            return None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ModelError):
        return None
    return replace(info, path=path, parts=parts)


def _remember(path: Path, parts: list[list[object]] | None, info: GGUFInfo) -> None:
    verdict = {"format": _FORMAT, "llama": llama_version(), "parts": parts, "info": gguf_header.to_json(info)}
    with suppress(OSError, RuntimeError):  # as in _signature
        files.keep(_verdict_name(path), json.dumps(verdict))


# --- the parent's side -----------------------------------------------------------------------------------------------


def _load_in_child(path: Path, timeout: float) -> None:
    try:
        done = child.run_module("acd_local.runtime.probe", str(path.absolute()), timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{shown(path)}: llama.cpp did not finish loading it within {timeout:.0f} s") from None
    except OSError as error:
        raise InternalError(f"cannot start {shown(sys.executable)} to check the model: {error.strerror}") from None
    if done.returncode != 0:
        raise _error(path, done.returncode, done.stdout.decode("utf-8", "replace"), _lines(done.stderr))


def _error(path: Path, code: int, output: str, log: list[str]) -> Exception:
    if code == _REFUSED:
        try:
            answer = json.loads(output.splitlines()[-1])
            message = shown(answer["message"], 500)
        except (ValueError, KeyError, TypeError, IndexError):
            return ModelError(f"{shown(path)}: llama.cpp cannot load it")
        kind = OutOfMemoryError if answer.get("code") == OutOfMemoryError.code else ModelError
        return kind(f"{shown(path)}: {message}")
    if code in (1, 2):  # Python's own: the child never got to the file
        if tells_of_memory("\n".join(log)):
            return OutOfMemoryError(f"{shown(path)}: there is not enough memory to check it in a child process")
        return InternalError(
            f"the check of {shown(path)} in a child process failed: {log[-1] if log else 'no message'}"
        )
    if code == -getattr(signal, "SIGKILL", 9):
        return OutOfMemoryError(f"{shown(path)}: the system stopped the process that loaded it, probably out of memory")
    how = f"signal {-code}" if code < 0 else f"exit code {code & 0xFFFFFFFF:#x}"
    cause = _telling(log)
    return ModelError(f"{shown(path)}: llama.cpp aborted while loading it ({how})" + (f": {cause}" if cause else ""))


def _lines(raw: bytes) -> list[str]:
    return [shown(line.strip(), 300) for line in raw.decode("utf-8", "replace").splitlines() if line.strip()]


def _telling(log: list[str]) -> str:
    """The line that says why: an assertion, the text of a C++ exception, else the last one."""
    for mark in ("GGML_ASSERT", "what():", "error"):
        for line in reversed(log):
            if mark in line:
                return line.split("/")[-1] if mark == "GGML_ASSERT" else line.removeprefix("what():").strip()
    return log[-1] if log else ""


# --- the child's side ------------------------------------------------------------------------------------------------


def _end_with_parent() -> None:
    """A parent that was stopped while we load a large model must not leave us behind."""
    os.read(0, 1)
    os._exit(1)


def _child(path: Path) -> int:
    """Load the model, decode a token in each of two sequences: 0 when llama.cpp lives through it, else a JSON line."""
    import logging

    import numpy as np

    from acd_local.errors import AcdError
    from acd_local.runtime import llama

    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer: it ends this process
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)  # survives an abort
    doing = "load"
    try:
        with llama.Model(path, gpu_layers=0) as model:
            doing = "create a context for"
            with llama.Context(model, n_ctx=256, n_seq=2) as context:
                doing = "run"
                token = model.vocab.bos if 0 <= model.vocab.bos < model.n_vocab else 0
                rows = np.array([0, 1], np.int32)
                context.decode(np.full(2, token, np.int32), rows, np.zeros(2, np.int32), np.ones(2, np.int8))
                # Whether the numbers are finite is judged later, on a real prompt: this is about living through it.
                context.logits(2)
    except Exception as error:
        said = str(error) if isinstance(error, AcdError) else f"{type(error).__name__}: {error}"
        cause = said.split(f"{path}: ", 1)[-1].removeprefix("error loading model: ")
        # Only weights that do not fit are the machine's fault: the context is tiny.
        code = error.code if isinstance(error, AcdError) and doing == "load" else ModelError.code
        print(json.dumps({"code": code, "message": f"llama.cpp cannot {doing} it: {cause}"}), flush=True)
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_child(Path(sys.argv[1])))
