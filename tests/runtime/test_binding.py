"""Files that are loaded while Python does something else, and the binding's own package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_gguf import FAMILIES

from acd_local import Engine, Options, quickcheck
from acd_local.ahead import open_ahead
from acd_local.errors import EngineClosedError, ModelError, PairError
from acd_local.runtime import binding, lifetime, llama, probe
from acd_local.runtime.binding import Opening
from acd_local.runtime.gguf_header import GGUFInfo

GREEDY = Options(temp=0, max_tokens=8)


@pytest.fixture
def info(tiny: Callable[..., Path]) -> GGUFInfo:
    return probe.verify(tiny("chatml"))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = list(lifetime._owned)
    yield
    assert list(lifetime._owned) == before


def test_a_file_that_was_opened_ahead_answers_as_any_other(info: GGUFInfo) -> None:
    parts: list[float] = []
    with Engine(info.path, pair="as-is", ctx_size=512, threads=1) as engine:
        expected = engine.generate("Hello", GREEDY).run().text
    opening = open_ahead(str(info.path), on_progress=parts.append)
    assert opening is not None
    with Engine(opening, pair="as-is", ctx_size=512, threads=1) as engine:
        assert engine.generate("Hello", GREEDY).run().text == expected
        opening.close()
        assert engine.generate("Hello", GREEDY).run().text == expected, "what was taken is the engine's"
    assert parts[0] == 0.0 and parts[-1] == 1.0 and parts == sorted(parts)


def test_what_is_not_known_to_be_good_is_not_opened(tiny: Callable[..., Path], tmp_path: Path) -> None:
    new = tmp_path / "new.gguf"
    new.write_bytes(tiny("chatml").read_bytes())
    assert open_ahead(str(new)) is None
    with pytest.raises(ModelError, match="no such file"):
        open_ahead(str(tmp_path / "none.gguf"))


def test_what_nobody_takes_is_freed(info: GGUFInfo) -> None:
    for opening in (Opening(info), Opening(info)):
        opening.close()
        opening.close()
        assert opening.take(object()) is None
    with Opening(info) as opening, pytest.raises(PairError, match="no-such-pair"):
        Engine(opening, pair="no-such-pair")


def test_what_belongs_to_a_model_is_freed_with_it(info: GGUFInfo) -> None:
    model = llama.Model(Opening(info))
    owned = model.owned
    del model
    with pytest.raises(EngineClosedError):
        owned.check()


def test_a_file_that_cannot_be_loaded_any_more_is_an_error_with_its_cause(info: GGUFInfo, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match=r"cannot load .*broken\.gguf: \w+"):
        llama.Model(Opening(replace(info, path=broken)))


def test_what_the_listener_raises_comes_out(info: GGUFInfo) -> None:
    def stop(fraction: float) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        llama.Model(Opening(info, on_progress=stop))


def test_the_log_is_heard_again(info: GGUFInfo, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "acd_local.llama")
    with llama.Model(Opening(info)) as model:
        assert not caplog.records
        llama.Context(model, n_ctx=256, n_seq=1).close()
        assert caplog.records


def test_a_check_of_the_pair_does_without_the_opened_copy(info: GGUFInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    load = quickcheck.check

    def spy(*args: object, **given: object) -> object:
        try:
            return load(*args, **given)
        finally:
            closed.append(opening.take(object()) is None)

    monkeypatch.setattr(quickcheck, "check", spy)
    monkeypatch.setenv("ACD_CACHE_DIR", str(info.path.parent / "unchecked"))
    opening = Opening(info)
    with Engine(opening, ctx_size=512, threads=1) as engine:
        assert engine.generate("Hello", GREEDY).run().text
    assert closed == [True]


def test_special_tokens_are_known_from_the_check(tiny: Callable[..., Path]) -> None:
    for family in FAMILIES:
        info = probe.verify(tiny(family))
        assert info.special
        with llama.Model(info.path) as asked, llama.Model(info.path, special=info.special) as told:
            assert told.vocab.special == asked.vocab.special
            assert told.vocab.eog_tokens() == asked.vocab.eog_tokens()
            assert (info.chat_template or None) == asked.chat_template()


def test_special_tokens_of_another_vocabulary_are_not_believed(info: GGUFInfo) -> None:
    assert info.special
    stale = [*info.special, info.special[-1]._replace(id=info.n_vocab)]
    with llama.Model(info.path, special=stale) as model:
        assert model.vocab.special == {token.id: token for token in info.special}


def test_the_bindings_package_is_whole_for_who_asks_it() -> None:
    code = """
import sys
import acd_local.engine
from acd_local.runtime import binding
assert "llama_cpp.llama" not in sys.modules
heard = []
binding.LOG.logger.addFilter(lambda record: heard.append(record.getMessage()))
binding.LOG.logger.setLevel("DEBUG")
import llama_cpp
from llama_cpp import Llama
assert llama_cpp.__version__ and llama_cpp.llama_cpp is binding.C and "Llama" in dir(llama_cpp)
assert not hasattr(llama_cpp, "nonsense")
params = llama_cpp.llama_model_default_params()
assert not llama_cpp.llama_model_load_from_file(b"/no/such/file", params)
assert any("/no/such/file" in line for line in heard), "its log is another's"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_who_has_the_package_keeps_it() -> None:
    code = "import llama_cpp as before; import acd_local.engine, llama_cpp; assert llama_cpp is before; before.Llama"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert binding.C is llama.C
