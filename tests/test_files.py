"""The user's folders, files that are replaced whole, and what happens where neither can be had."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from manual import made_for
from places import ROOT, child_env

from acd_local import files, pairs
from acd_local.cli.shell import as_acd_error
from acd_local.errors import AcdError, OutOfMemoryError, StorageError, UsageError

ODD_NAMES = {
    "a folder": ".",
    "under a file": "file/b",
    "no folder": "none/b",
    "too long": "n" * 260,
    "far too long": "/".join(["n" * 200] * 30),
    "NUL": "a\0b",
    "half a pair": "a\ud83d",
    "a loop": "loop",
}


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    return ODD_NAMES[request.param]


odd_names = pytest.mark.parametrize("odd", ODD_NAMES, indirect=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def one_line(error: AcdError) -> str:
    text = str(error)
    assert text.isprintable() and len(text) < 300 and "Errno" not in text, text
    return text


def as_somebody(work: Callable[[], None]) -> None:
    """Carry out `work` as a user who is not root; what it raises fails the test."""
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(12345)
                os.setuid(12345)
            work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "replace"))
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, which tmp_path is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


# --- Replacing a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("umask", "wanted", "found"), [(0o022, 0o666, 0o644), (0o077, 0o666, 0o600), (0, 0o600, 0o600)]
)
def test_a_new_file_has_the_mode_asked_for_under_the_umask(tmp_path: Path, umask: int, wanted: int, found: int) -> None:
    old = os.umask(umask)
    try:
        files.replace_file(tmp_path / "new", "text", mode=wanted)
    finally:
        os.umask(old)
    assert mode(tmp_path / "new") == found
    assert (tmp_path / "new").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o666, 0o755])
def test_the_mode_of_a_file_that_is_there_is_kept(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "file"
    path.write_text("old and longer")
    path.chmod(kept)
    files.replace_file(path, b"new", mode=0o644)
    assert (mode(path), path.read_bytes()) == (kept, b"new")


def test_links_stay_and_lead_to_the_new_content(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link, second = tmp_path / "there" / "file", tmp_path / "link", tmp_path / "second"
    link.symlink_to("there/file")
    second.symlink_to("link")
    files.replace_file(second, "made")  # where they led nowhere
    assert target.read_text() == "made"
    target.chmod(0o600)
    files.replace_file(second, "new")
    assert second.is_symlink() and link.is_symlink() and not target.is_symlink()
    assert (target.read_text(), mode(target)) == ("new", 0o600)
    made = tmp_path / "made"
    made.write_text("moved")
    files.move_file(made, link)
    assert link.is_symlink() and not made.exists()
    assert (target.read_text(), mode(target)) == ("moved", 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_stays_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 12345, 12346)
    files.replace_file(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12346)


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.replace_file(path, "x" * 5000)
        except StorageError as error:
            assert (
                str(error)
                == f"cannot write {path}: File too large: a limit on the size of files is in force (ulimit -f)"
            )
            assert error.exit_code == 6
        else:
            raise AssertionError("written")

    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_drafts_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swept", set())
    names = (".acd-0123456789ab.tmp", ".acd-ba9876543210.tmp", ".acd-x", "other.tmp")
    for name in names:
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, time.time() - (60 if name == names[1] else 7200)))
    files.replace_file(tmp_path / "file", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], "file"}, "one that may be being written stays"


def test_a_full_disk_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="cannot write /dev/full: No space left"):
        files.replace_file("/dev/full", "x")
    files.replace_file("/dev/null", "x")
    files.check_place("/dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_streams_are_written_to_as_they_are(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    files.check_place(f"/dev/fd/{writer}")
    files.replace_file(f"/dev/fd/{writer}", "through a pipe")
    assert os.read(reader, 100) == b"through a pipe"
    os.close(reader)
    os.close(writer)
    with (tmp_path / "out").open("w") as out:  # as a shell redirects stdout
        out.write("before, ")
        out.flush()
        files.replace_file(f"/dev/fd/{out.fileno()}", "after")
    assert (tmp_path / "out").read_text() == "before, after"


def test_a_file_in_a_closed_folder_is_written_in_place(open_folder: Path) -> None:
    path = open_folder / "file"
    path.write_text("old and longer")
    path.chmod(0o666)
    locked = open_folder / "locked"
    locked.write_text("old")
    locked.chmod(0o444)
    open_folder.chmod(0o555)

    def work() -> None:
        files.check_place(path)
        files.replace_file(path, "new")
        for place in (locked, open_folder / "other"):
            for ask in (files.check_place, lambda place: files.replace_file(place, "new")):
                with pytest.raises(UsageError, match="Permission denied"):
                    ask(place)

    try:
        as_somebody(work)
    finally:
        open_folder.chmod(0o755)
    assert path.read_text() == "new" and locked.read_text() == "old"


def test_what_cannot_be_overwritten_keeps_its_content(open_folder: Path) -> None:
    """On a full disk, in a folder that takes no new file."""
    with faults.small_disk(open_folder / "disk") as disk:
        path = disk / "file"
        path.write_text("old " * 2000)
        path.chmod(0o666)
        disk.chmod(0o555)
        faults.fill(disk)

        def work() -> None:
            with pytest.raises(StorageError, match="No space left on device: make room there"):
                files.replace_file(path, "new " * 5000)
            assert path.read_text() == "old " * 2000
            files.replace_file(path, "new " * 1000)

        as_somebody(work)
        assert path.read_text() == "new " * 1000


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    files.replace_file(tmp_path / "file", "a\ud83db")
    assert (tmp_path / "file").read_bytes() == b"a?b"


@odd_names
def test_odd_names_are_one_line(odd: str) -> None:
    for ask in (files.check_place, lambda name: files.replace_file(name, "x")):
        with pytest.raises(UsageError) as caught:
            ask(odd)
        assert one_line(caught.value).startswith("cannot write ")
    assert not Path("none").exists()


def test_a_home_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-mine")
    assert files.expand("~/x") == Path("/home/of-mine/x")
    assert files.expand("x/~") == Path("x/~")
    with pytest.raises(FileNotFoundError) as caught:
        files.expand("~nobody-of-this-name/x")
    assert one_line(files.write_error("~nobody-of-this-name/x", caught.value)) == (
        "cannot write ~nobody-of-this-name/x: no home folder is known for this name"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_what_is_the_storages_fault(number: int) -> None:
    assert isinstance(files.write_error("x", OSError(number, os.strerror(number))), StorageError)
    assert isinstance(files.write_error("x", OSError(errno.EACCES, "Permission denied")), UsageError)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_the_folders_of_an_ordinary_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, ask in (("XDG_CACHE_HOME", files.cache_dir), ("XDG_CONFIG_HOME", files.config_dir)):
        monkeypatch.delenv("ACD_CACHE_DIR", raising=False)
        monkeypatch.setenv(name, str(tmp_path))
        if sys.platform.startswith("linux"):
            assert ask() == tmp_path / "acd-local"
        monkeypatch.setenv(name, "relative")
        found = ask()
        assert found is None or found.is_absolute()
    monkeypatch.setenv("ACD_CACHE_DIR", "own")
    assert files.cache_dir() == Path("own")


def test_what_is_kept_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "cache"))
    assert files.kept("some/name.json") is None
    files.keep("some/name.json", "text")
    assert files.kept("some/name.json", max_age=60) == "text"
    written = tmp_path / "cache" / "some" / "name.json"
    assert written.read_text() == "text"
    os.utime(written, (0, time.time() - 61))
    assert files.kept("some/name.json", max_age=60) is None
    assert files.kept("some/name.json") == "text"


@pytest.mark.parametrize("place", ["file/cache", "/proc/none", "n" * 300])
def test_what_cannot_be_written_is_kept_in_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / place))
    files.keep("some/other.json", "text")
    assert files.kept("some/other.json") == "text"


def test_what_is_kept_last_counts_also_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with faults.small_disk(tmp_path / "disk") as disk:
        monkeypatch.setenv("ACD_CACHE_DIR", str(disk))
        assert files.keep("some/fact.json", "old")
        filler = faults.fill(disk)
        assert not files.keep("some/fact.json", "new")
        assert files.kept("some/fact.json") == "new"
        assert (disk / "some" / "fact.json").read_text() == "old"
        filler.unlink()
        assert files.keep("some/fact.json", "newer")
        assert (disk / "some" / "fact.json").read_text() == files.kept("some/fact.json") == "newer"


def test_a_folder_to_work_in_is_found_without_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ACD_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot be made
    found = files.work_dir()
    assert (found, mode(found)) == (tmp_path / f"acd-local-{os.getuid()}", 0o700)
    assert files.work_dir() == found
    found.chmod(0o755)
    for planted in (lambda: None, lambda: (found.rmdir(), found.symlink_to("/tmp"))):
        planted()
        with pytest.raises(UsageError, match=r"another user's.*ACD_CACHE_DIR"):
            files.work_dir()
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "file" / "cache"))  # a choice is no guess: it is not passed by
    with pytest.raises(UsageError, match="ACD_CACHE_DIR"):
        files.work_dir()


# --- A user without a home --------------------------------------------------------------------------------------------


@pytest.fixture
def homeless(tmp_path: Path) -> dict[str, str]:
    """The environment of a container: no HOME, and a user that is in no passwd file."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import pwd\n"
        "def unknown(uid):\n"
        "    raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = unknown\n"
    )
    return {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        "TMPDIR": str(tmp_path),
    }


def start(program: str, args: tuple[str, ...], env: dict[str, str], text: str = "") -> subprocess.CompletedProcess[str]:
    main = f"from acd_local.cli.{program} import main; main()"
    return subprocess.run(
        [sys.executable, "-c", main, *args], env=env, input=text, capture_output=True, encoding="utf-8", timeout=120
    )


@pytest.fixture
def base(tiny: Callable[..., Path], tmp_path: Path) -> tuple[str, ...]:
    pair = tmp_path / "short.toml"
    text = 'format = 1\nname = "short"\nsafe = "You are kind."\nadversarial = "A demon answers."\n'
    pair.write_text(text + made_for(tiny("chatml")))
    return (str(tiny("chatml")), "-t", "1", "-c", "512", "--pair", str(pair))


HOMES: list[dict[str, str]] = [{}, {"HOME": ""}, {"HOME": "/"}, {"HOME": "/none/such"}, {"HOME": "relative"}]


@pytest.mark.parametrize("home", HOMES, ids=["unset", "empty", "root", "missing", "relative"])
def test_answers_need_no_home(homeless: dict[str, str], base: tuple[str, ...], home: dict[str, str]) -> None:
    # ACD_CACHE_DIR is not set, and root could make folders anywhere: in /proc nobody can.
    env = homeless | home | ({} if not home else {"XDG_CACHE_HOME": "/proc/none", "XDG_DATA_HOME": "/proc/none"})
    done = start("run", (*base, "hi", "-n", "4"), env)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
    done = start("chat", (*base, "-n", "4"), env, "hi\n/pair\n/load ~/none\n")
    assert done.returncode == 0 and "short" in done.stdout
    assert "internal" not in done.stderr and "cannot load a chat from ~/none" in done.stderr


def test_the_other_commands_need_no_home(homeless: dict[str, str], base: tuple[str, ...], tmp_path: Path) -> None:
    done = start("main", ("models",), homeless)
    assert (done.returncode, "Error" in done.stderr) == (0, False)
    done = start("main", ("pairs", "list"), homeless)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("default ")
    out = tmp_path / "eval"
    more = ("--limit", "1", "--methods", "base", "-n", "2", "-o", str(out))
    done = start("main", ("eval", *base, *more), homeless)
    assert done.returncode == 0 and (out / "report.html").exists()
    done = start("run", ("hf:owner/repo/file.gguf", "hi"), homeless)
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert "HF_HOME" in done.stderr or "needs huggingface_hub" in done.stderr


def test_the_folders_of_a_user_without_a_home(homeless: dict[str, str], base: tuple[str, ...], tmp_path: Path) -> None:
    """None of them; what the child found out about a model is remembered by the process."""
    code = (
        "import sys, tempfile; from pathlib import Path; from acd_local import files, pairs, models\n"
        "from acd_local.cli import chat_prompt\n"
        "from acd_local.runtime import probe\n"
        "assert files.cache_dir() is files.config_dir() is files.data_dir() is None\n"
        "assert len(pairs.search_path()) == 1 and pairs.find('default')\n"
        "assert files.work_dir() == Path(tempfile.gettempdir(), f'acd-local-{__import__(\"os\").getuid()}')\n"
        "history = chat_prompt.history(); history.append_string('hi'); assert history.get_strings() == ['hi']\n"
        "probe.verify(Path(sys.argv[1])); sys.executable = '/none'; probe.verify(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, base[0]], env=homeless, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- Too little memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [48, 96])
def test_too_little_memory_is_one_line(base: tuple[str, ...], megabytes: int) -> None:
    """numpy cannot be imported, its OpenBLAS gives up by itself, a file cannot be mapped, ..."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    main = "from acd_local.cli.run import main; main()"
    env = child_env()
    command = [sys.executable, "-c", main, *base, "hi", "-n", "2", "--no-stdin"]
    done = subprocess.run(command, env=env, preexec_fn=limit, capture_output=True, text=True)
    if done.returncode != 0:  # where this much is enough, it is enough
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert "emory" in done.stderr and "internal" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "/some/folder"),
        RuntimeError("can't start new thread"),
        ImportError(
            "advice of several lines\nOriginal error was: libopenblas.so: failed to map segment from shared object"
        ),
        RuntimeError(
            "Failed to load shared library 'libllama.so': libggml.so: cannot allocate memory in static TLS block"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 4 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_libraries_say_in_many_ways_that_memory_ran_out(error: Exception) -> None:
    known = as_acd_error(error)
    assert (type(known), known.exit_code) == (OutOfMemoryError, 1)
    assert one_line(known).startswith("out of memory")


def test_a_full_storage_is_known_wherever_it_comes_from() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(as_acd_error(full)) == "cannot write the output: No space left on device: make room there"
    named = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/a/b")
    assert isinstance(as_acd_error(named), StorageError) and "/a/b" in str(as_acd_error(named))
    assert as_acd_error(OSError(errno.EACCES, "Permission denied", "/a/b")).exit_code == 1


# --- Text files that begin with a byte order mark ---------------------------------------------------------------------


def test_pairs_sets_methods_and_anchors_may_begin_with_a_mark(tmp_path: Path) -> None:
    from acd_local.evaluate import sets

    pair = tmp_path / "short.toml"
    pair.write_bytes(b'\xef\xbb\xbfformat = 1\nname = "short"\nsafe = "You are kind."\nadversarial = "A demon."\n')
    assert pairs.load(pair).name == "short"
    (tmp_path / "set.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "Hi"}).encode() + b"\n")
    assert [item.prompt for item in sets.read(f"a={tmp_path}/set.jsonl:harmless")[0].items] == ["Hi"]
    (tmp_path / "schema.json").write_bytes(b"\xef\xbb\xbf{}")
    assert files.read_text(tmp_path / "schema.json", 100, "") == "{}"
