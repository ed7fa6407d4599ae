"""How the cost of a token grows: what is measured at which place, not how much it is; the plots; the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny_gguf
from manual import DEFAULT

from acd_local.bench import growth, plot
from acd_local.bench.growth import CONTRAST, Growth, Point
from acd_local.bench.measuring import ENGINE_PLAIN, PLAIN, bare_context, go_on_plain, plain_prompt
from acd_local.bench.questions import story
from acd_local.bench.rounds import Measured
from acd_local.engine import Engine
from acd_local.evaluate import page
from acd_local.runtime.prefixes import common_prefix

Command = Callable[..., tuple[int, str, str]]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "LENGTHS", (320, 400, 9000))
    monkeypatch.setattr(growth, "CONVERSATIONS", (1, 3))


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        yield engine


@pytest.mark.usefixtures("_small")
def test_points_of_three_axes(tiny: Callable[..., Path]) -> None:
    files = [str(tiny("chatml", n_vocab=3000)), str(tiny("chatml"))]
    lines: list[str] = []
    found = growth.run(files[0], files[1:], tokens=4, rounds=2, threads=1, ctx_size=700, progress=lines.append)
    assert [round(point.at, -1) for point in found.lengths] == [320, 400]  # 9000 do not fit
    assert [point.at for point in found.conversations] == [1, 3]
    assert [point.at for point in found.vocabularies] == [534, 3000]
    assert [Path(file).name for file in files] == [point.model for point in reversed(found.vocabularies)]
    for point in [*found.lengths, *found.conversations, *found.vocabularies]:
        assert list(point.answers) == [PLAIN, ENGINE_PLAIN, CONTRAST]
        assert all(len(answers) == 2 for answers in point.answers.values())
        assert all(a.steps > 0 and a.seconds > 0 for answers in point.answers.values() for a in answers)
        assert point.ratio(PLAIN) == 1.0
    assert all(list(point.prompt) == [PLAIN, CONTRAST] for point in found.lengths)
    assert {a.steps for a in found.conversations[1].answers[PLAIN]} == {3 * 3}
    assert len(lines) == 2 + 2 + 2
    assert len(found.summary()["lengths"]) == 2 * 3


def test_a_longer_story_begins_like_a_shorter_one(engine: Engine) -> None:
    short, long = (plain_prompt(engine, story(engine, n)) for n in (200, 700))
    assert abs(len(long) - len(short) - 500) < 5
    assert common_prefix(short, long) > len(short) - 60


@pytest.mark.parametrize("writer", [tiny_gguf.write_llama, tiny_gguf.write_mamba])
def test_plain_answers_go_on_behind_what_is_held(tiny: Callable[..., Path], writer: Callable[..., Path]) -> None:
    """Also in memories that cannot forget their last tokens."""
    with (
        Engine(tiny("chatml", writer=writer), pair=DEFAULT, ctx_size=512, threads=1) as engine,
        bare_context(engine) as bare,
    ):
        prompt = plain_prompt(engine, "What is red?")
        for _ in range(2):
            assert go_on_plain(bare, prompt, 5, len(prompt) - 1).steps == 4
            assert bare.position_range(0)[1] == len(prompt) + 3


def test_plain_answers_of_several_conversations(engine: Engine) -> None:
    prompts = [plain_prompt(engine, "What is red wine?"[:n]) for n in (4, 9, 17)]
    with bare_context(engine, n_seq=3) as bare:
        found = growth.decode_plain_together(bare, prompts, 6)
        assert found.steps == 3 * 5 and found.outside is not None and 0 < found.outside < found.seconds
        assert [bare.position_range(seq)[1] for seq in range(3)] == [len(prompt) + 4 for prompt in prompts]


def test_answers_of_one_token_are_no_measure() -> None:
    point = Point(1, {PLAIN: [Measured(4, 2.0, 1.0), Measured(4, 4.0)], CONTRAST: [Measured(0, 0.0), Measured(2, 6.0)]})
    assert (point.milliseconds(PLAIN), point.milliseconds(CONTRAST)) == (750.0, 3000.0)
    assert (point.ratio(CONTRAST), point.outside(PLAIN), point.outside(CONTRAST)) == (3.0, 250.0, None)


def made_up() -> Growth:
    def points(*places: int, model: str = "") -> list[Point]:
        answers = {way: [Measured(10, 0.1 * i, 0.01)] for i, way in enumerate((PLAIN, ENGINE_PLAIN, CONTRAST), start=1)}
        return [Point(at, answers, model=model) for at in places]

    vocabularies = [*points(534, model="small & <new>.gguf"), *points(3000, model="large.gguf")]
    return Growth("model", "pair", 1, 11, 1, points(256, 512), points(1, 2), vocabularies)


def test_three_plots_in_one_file() -> None:
    pytest.importorskip("matplotlib")
    root = ElementTree.fromstring(plot.draw(made_up()))
    titles = [found.text for found in root.findall(f"{SVG}svg/{SVG}title")]
    assert titles == [title for title, _ in plot.AXES.values()]
    told = [found.text or "" for found in root.findall(f"{SVG}svg/{SVG}desc")]
    assert all("plain llama.cpp: 10" in text and "contrast: 30" in text for text in told[:2])
    assert "contrast, outside llama_decode: 1 at 512" in told[0]
    assert "contrast small & <new>: 30 at 534" in told[2]


@pytest.mark.usefixtures("_small")
def test_the_command_draws_and_tells(acd: Command, tiny: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, model, other = str(tmp_path / "growth.svg"), str(tiny("chatml")), str(tiny("chatml", n_vocab=3000))
    code, out, err = acd("bench", model, "--plot", file, "--also", other, "--rounds", "1", "-t", "1", "-c", "700")
    assert code == 0 and ElementTree.parse(file).getroot().tag == f"{SVG}svg"
    assert "1 threads, 16 tokens x 1 rounds" in out  # tokens: its own default
    assert out.count("acd --plain") == 2 + 2 + 2 and all(Path(name).name in out for name in (model, other))
    assert "acd bench: context: 400" in err


def test_what_cannot_be_drawn_is_refused_before_the_measurement(
    acd: Command, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "run", None)
    model = str(tiny("chatml"))
    assert acd("bench", model, "--plot", tmp_path / "growth.png")[::2] == (
        2,
        "acd: --plot writes SVG: choose a name that ends in .svg, not growth.png\n",
    )
    assert acd("bench", model, "--also", model)[0] == 2
    assert acd("bench", model, "--plot", tmp_path / "no" / "growth.svg")[0] != 0
    monkeypatch.setattr(page, "can_draw", lambda: False)
    code, _, err = acd("bench", model, "--plot", tmp_path / "growth.svg")
    assert code == 2 and "pip install 'acd-local[report]'" in err
    assert not list(tmp_path.iterdir())
