"""The user's config.toml: what it may say, where a mistake in it is told, and what is kept when it is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from acd_local import Engine, models, settings
from acd_local.errors import ModelError, StorageError, UsageError

WHOLE = """# mine
model = "coder"  # the small one
threads = 2
pair = "as-is"
ctx_size = 512
gate = false

[models]
# aliases
coder = "demo"
"qwen2.5" = "~/models/qwen.gguf"
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACD_CONFIG_DIR", str(tmp_path))
    return tmp_path / "config.toml"


def test_a_whole_file_is_read(config: Path) -> None:
    assert settings.read() == settings.Settings(config)
    config.write_text("\ufeff" + WHOLE.replace("\n", "\r\n"), "utf-8")
    found = settings.read()
    assert (found.model, found.threads, found.pair, found.ctx_size, found.gate) == ("coder", 2, "as-is", 512, False)
    assert found.models == {"coder": "demo", "qwen2.5": "~/models/qwen.gguf"}
    lines = [found.line(key) for key in ("model", "gate", "models.coder", "models.qwen2.5", "models.none")]
    assert lines == [2, 6, 10, 11, 8]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("thread = 2", "line 1: unknown option 'thread': did you mean threads?"),
        ("\nctx-size = 2", "line 2: unknown option 'ctx-size': did you mean ctx_size?"),
        ("temp = 0.1", "line 1: unknown option 'temp': temp is an option of an answer"),
        ("model = 3", "line 1: model must be a name or a path as a string, not an integer"),
        ('pair = ""', "line 1: pair must be a name or a path as a string, not ''"),
        ("# a\nthreads = 0", "line 2: threads must be a whole number from 1 to 512, not 0"),
        ("threads = true", "line 1: threads must be a whole number"),
        ("ctx_size = 1e9", "line 1: ctx_size must be a whole number"),
        ('gate = "off"', "line 1: gate must be true or false, not 'off'"),
        ("models = 1", "line 1: models must be a table of aliases, [models], not an integer"),
        ('[models]\nx = "a.gguf"', "line 2: the alias 'x' must stand for an absolute path, one from ~ on, demo or hf:"),
        ("[models]\nx = 1", "line 2: the alias 'x' must stand for a string, not an integer"),
        (
            '[models]\nqwen2.5 = "demo"',
            "line 2: the alias 'qwen2' must stand for a string; a name with a dot needs quo",
        ),
        ('[models]\ndemo = "/a.gguf"', "line 2: 'demo' cannot be an alias"),
        ('[models]\n"a.gguf" = "/a.gguf"', "line 2: 'a.gguf' cannot be an alias"),
        ('[models]\n"a/b" = "/a.gguf"', "line 2: 'a/b' cannot be an alias"),
        ("threads = 2\nthreads = 3", "line 2: Cannot overwrite a value (at the end of the file)"),
        ("threads = ", "line 1: Invalid value"),
        ("x = " + "[" * 5000, "nested too deeply"),
        ("a = '\0'", "line 1: holds a NUL byte"),
    ],
)
def test_a_mistake_is_told_with_file_and_line(config: Path, text: str, says: str) -> None:
    config.write_text(text, "utf-8")
    with pytest.raises(UsageError) as caught:
        settings.read()
    message = str(caught.value)
    assert message.startswith(f"{config}: ") and says in message and "\n" not in message


def test_a_file_that_cannot_be_read(config: Path) -> None:
    config.mkdir()
    with pytest.raises(UsageError, match=r"config\.toml: cannot be read"):
        settings.read()


# --- Aliases ----------------------------------------------------------------------------------------------------------


def test_an_alias_stands_for_a_model(config: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own file").touch()
    config.write_text(
        f'[models]\nsmall = "demo"\nown = "{tmp_path}/own file"\ngone = "/none.gguf"\nloop = "hf:small"\n'
    )
    assert models.resolve("small") == demo and models.resolve("own") == tmp_path / "own file"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").touch()
    assert models.resolve("small") == demo and models.resolve("./small") == Path("small")
    with pytest.raises(ModelError, match=r"config\.toml: line 4: the model gone: no such file: /none\.gguf"):
        models.resolve("gone")
    with pytest.raises(ModelError, match="the model loop: hf:small is not of the form"):
        models.resolve("loop")
    with pytest.raises(ModelError, match="no such file: other"):
        models.resolve("other")


def test_a_broken_file_troubles_nobody_who_names_a_path(config: Path, demo: Path) -> None:
    config.write_text("threads = ")
    assert models.resolve(str(demo)) == demo and models.resolve("demo") == demo
    with pytest.raises(UsageError, match="line 1: Invalid value"):
        models.resolve("small")


def test_an_engine_takes_aliases_and_nothing_else(config: Path, tiny: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACD_THREADS", "1")
    config.write_text(f'pair = "no such pair"\nctx_size = 256\nthreads = 3\n[models]\nt = "{tiny("chatml")}"\n')  # type: ignore[operator]
    with Engine("t", pair="as-is") as engine:
        assert engine.pair is None and engine.n_ctx != 256 and engine.threads == 1


# --- Changes ----------------------------------------------------------------------------------------------------------


def test_changes_keep_comments_and_all_else(config: Path) -> None:
    config.write_text(WHOLE)
    settings.set_value("threads", 4)
    settings.set_value("models.coder", "hf:o/r/f.gguf")
    settings.set_value("models.new", "demo")
    settings.unset("pair")
    settings.unset("models.qwen2.5")
    assert config.read_text() == (
        "# mine\n"
        'model = "coder"  # the small one\n'
        "threads = 4\n"
        "ctx_size = 512\n"
        "gate = false\n"
        "\n"
        "[models]\n"
        "# aliases\n"
        'coder = "hf:o/r/f.gguf"\n'
        'new = "demo"\n'
    )


def test_a_file_is_made_and_a_table_goes_with_its_last_alias(config: Path) -> None:
    settings.set_value("models.qwen2.5", "demo")
    settings.set_value("gate", False)
    found = settings.read()
    assert found.gate is False and found.models == {"qwen2.5": "demo"} and config.read_text().startswith("# Settings")
    settings.unset("models.qwen2.5")
    assert "models" not in config.read_text() and settings.read().gate is False


def test_what_would_be_refused_is_not_written(config: Path) -> None:
    for key, value in (("threads", 0), ("gate", "off"), ("models.demo", "demo"), ("models.x", "x"), ("thread", 1)):
        with pytest.raises(UsageError):
            settings.set_value(key, value)
    assert not config.exists()
    config.write_text("pairr = 1\n")
    with pytest.raises(UsageError, match="line 1: unknown option 'pairr'"):
        settings.set_value("threads", 2)
    assert config.read_text() == "pairr = 1\n"
    settings.unset("pairr")  # a key that is none can be removed
    settings.set_value("threads", 2)
    with pytest.raises(UsageError, match="pairr is not set in"):
        settings.unset("pairr")


def test_a_file_that_can_be_read_but_not_changed(config: Path) -> None:
    text = f"x = {'[' * 150}{']' * 150}\n"
    config.write_text(text)
    for change in (lambda: settings.unset("x"), lambda: settings.set_value("threads", 2)):
        with pytest.raises(UsageError, match=r"config\.toml: cannot be changed: "):
            change()
    assert config.read_text() == text


def test_no_folder_and_a_full_one(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACD_CONFIG_DIR", str(tmp_path / "a" / "b"))
    assert settings.set_value("threads", 2) == tmp_path / "a" / "b" / "config.toml"
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACD_CONFIG_DIR", str(tmp_path / "file"))
    with pytest.raises((UsageError, StorageError), match="cannot write"):
        settings.set_value("threads", 2)
