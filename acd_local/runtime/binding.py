"""Opens llama.cpp: its functions by llama-cpp-python's declarations, its log, its end, and the files of models.

No other module imports llama_cpp, and this one imports no numpy: a file can be loaded while numpy and the rest of the
package are imported.

llama.cpp writes its log through one process-wide callback. It is pointed at the logging module (logger
`acd_local.llama`) on import, so that file descriptors 1 and 2 are never written to.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from acd_local.errors import EngineClosedError
from acd_local.runtime import lifetime, machine
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.lifetime import Closing, Owned
from acd_local.runtime.threads import openmp_settings


def _postpone(name: str, afterwards: Callable[[], object]) -> None:
    """Let a package's modules be imported without its own code: that runs when it is asked for a name they do not hold.

    Args:
        afterwards: called when the code has run.
    """
    spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None or spec.loader is None:
        return
    package, execute = importlib.util.module_from_spec(spec), spec.loader.exec_module
    running, waiting = threading.RLock(), [execute]

    def complete(attribute: str) -> object:
        with running:
            if waiting:
                waiting.pop()(package)
                afterwards()
        try:
            return vars(package)[attribute]
        except KeyError:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}") from None

    vars(package)["__getattr__"] = complete
    sys.modules[name] = package


def _listen() -> None:
    """Take llama.cpp's log, which the package's own code would write to stderr."""
    C.llama_log_set(_log_callback, None)


# The package's own code imports chat formats, caches and server types, which take as long as all of this package.
_postpone("llama_cpp", _listen)
with openmp_settings():
    import llama_cpp._ggml as _ggml
    import llama_cpp.llama_cpp as _declared  # not `from llama_cpp`: that asks the package

C, GGML = _declared, _ggml.libggml


# ---------------------------------------------------------------------------------------------------------------------
# Log: llama.cpp -> logging


# enum ggml_log_level (1 debug, 2 info, 3 warn, 4 error) -> logging, one step quieter: its INFO is 100 lines per load.
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}


class LogSink:
    """Joins llama.cpp's log fragments into lines, hands them to logging and remembers the last problems."""

    def __init__(self) -> None:
        self.logger = logging.getLogger("acd_local.llama")
        self.problems: deque[str] = deque(maxlen=16)
        self._begun = threading.local()  # no lock: a fork could leave it held

    def __call__(self, level: int, text: bytes | None, _user_data: object) -> None:
        if sys.is_finalizing():
            return
        begun = self._begun.__dict__
        if level != 5:  # 5 continues the line before
            begun["level"] = _LOG_LEVELS.get(level, logging.DEBUG)
        level = begun.get("level", logging.DEBUG)
        *lines, begun["line"] = (begun.get("line", "") + (text or b"").decode("utf-8", "replace")).split("\n")
        for line in filter(None, map(str.strip, lines)):
            if level >= logging.INFO:
                self.problems.append(line)
            if self.logger.isEnabledFor(level):
                self.logger.log(level, line)

    def last_problem(self, default: str) -> str:
        """Return the most telling recent line, without llama.cpp's function-name prefix."""
        lines = [line.split(": ", 1)[-1] for line in self.problems]
        vague = ("failed to load model", "failed to initialize the context", "failed to create context")
        telling = [line for line in lines if not any(line.startswith(v) and line.endswith(v) for v in vague)]
        return telling[-1] if telling else (lines[-1] if lines else default)


LIBC = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
# libc's abs as a log callback that does nothing: no thread may enter an interpreter that has ended.
_log_nothing = ctypes.cast(LIBC.abs, C.llama_log_callback)

logging.getLogger("acd_local").addHandler(logging.NullHandler())  # a library's default: say nothing unless asked
LOG = LogSink()
_log_callback = C.llama_log_callback(LOG)
_listen()
C.llama_backend_init()


@atexit.register
def _end() -> None:
    """Leave llama.cpp before its static data is destroyed; Metal aborts the process where anything is not freed."""
    C.llama_log_set(_log_nothing, None)
    lifetime.end(free=supports_gpu_offload())


def supports_gpu_offload() -> bool:
    """Tell whether this build of llama.cpp can put layers on a GPU (llama_supports_gpu_offload)."""
    return bool(C.llama_supports_gpu_offload())


# ---------------------------------------------------------------------------------------------------------------------
# Files of models


class LoadWatch:
    """llama.cpp's progress callback: loading stops as the process ends, or where it raises, which C cannot pass on."""

    def __init__(self, on_progress: Callable[[float], object] | None) -> None:
        self._on_progress = on_progress
        self.raised: BaseException | None = None
        self.callback = C.llama_progress_callback(self._goes_on)

    def _goes_on(self, fraction: float, _user_data: object) -> bool:
        try:
            if self._on_progress is not None:
                self._on_progress(fraction)
        except BaseException as error:
            self.raised = error
        return self.raised is None and not lifetime.ending()


def load(
    owned: Owned,
    path: Path,
    *,
    gpu_layers: int | None = None,
    extra_buffers: bool | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> bool:
    """Load a model's file (llama_model_load_from_file) and tell whether llama.cpp could; arguments as of `llama.Model`.

    Args:
        owned: what becomes the model's.

    Raises: what `on_progress` does; `owned` is closed then.
    """
    params = C.llama_model_default_params()
    params.use_extra_bufts = machine.extra_buffers() if extra_buffers is None else extra_buffers
    params.n_gpu_layers = (-1 if supports_gpu_offload() else 0) if gpu_layers is None else gpu_layers
    watch = LoadWatch(on_progress)
    params.progress_callback = watch.callback
    pointer = owned.make(lambda: C.llama_model_load_from_file(os.fsencode(path), params))
    if watch.raised is not None:
        owned.close()
        raise watch.raised
    return pointer is not None


class Opening(Closing):
    """A model's file that a thread loads while this one goes on; `llama.Model` takes it over.

    llama.cpp's log is left out meanwhile: for each of its lines the thread would have to wait for the interpreter.

    Args:
        info: of a file that is known to be good. gpu_layers, on_progress: see `llama.Model`; the latter is called by
            the thread.
    """

    def __init__(
        self,
        info: GGUFInfo,
        *,
        gpu_layers: int | None = None,
        on_progress: Callable[[float], object] | None = None,
    ) -> None:
        self.info = info
        self._gpu_layers, self._on_progress = gpu_layers, on_progress
        self._owned = Owned(None, C.llama_model_free)
        self._loaded = self._left = False
        self._raised: BaseException | None = None
        C.llama_log_set(_log_nothing, None)
        self._thread = threading.Thread(target=self._load, name="acd-load", daemon=True)
        self._thread.start()

    def take(self, owner: object) -> Owned | None:
        """Wait, and hand the model's memory over; None where loading failed: loading once more says why.

        Raises: what `on_progress` did.
        """
        self._wait()
        if self._raised is not None:
            raise self._raised
        if not self._loaded:
            self._owned.close()
            return None
        self._left = True
        self._owned.belong_to(owner)
        return self._owned

    def close(self) -> None:
        """Stop loading, and free what nobody has taken: nothing can be taken any more."""
        if not self._left:
            self._left = True
            self._wait()
            self._owned.close()
            self._loaded, self._raised = False, None

    def _load(self) -> None:
        try:
            self._loaded = load(self._owned, self.info.path, gpu_layers=self._gpu_layers, on_progress=self._report)
        except BaseException as error:
            self._raised = error

    def _report(self, fraction: float) -> None:
        if self._left:
            raise EngineClosedError(lifetime.CLOSED)
        if self._on_progress is not None:
            self._on_progress(fraction)

    def _wait(self) -> None:
        self._thread.join()
        _listen()
