"""The page at /: one file under a strict policy; and in Chromium: what it shows, asks, keeps and never runs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from http_server import CHAT, MAIN, Server
from places import child_env
from worker_client import ENDLESS as ENDLESS_GRAMMAR

PAGE = files("acd_local.serve").joinpath("page.html").read_bytes()
IMAGE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
ANSWERED = 60_000  # ms


# --- The file ---------------------------------------------------------------------------------------------------------


def test_it_is_one_small_file() -> None:
    text = PAGE.decode()
    assert len(PAGE) < 100_000
    assert set(re.findall(r"\w+://[^\s'\"]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert not re.search(r"@import|\bsrc=|<(?:iframe|object|embed|base)\b", text)
    assert [link[:5] for link in re.findall(r"<link [^>]*href=\"([^\"]*)", text)] == ["data:"]


def test_it_writes_text_alone() -> None:
    for word in (
        rb"innerHTML|outerHTML|insertAdjacentHTML|\.write\(|\beval\b|Function\(|DOMParser",
        rb'\s(?:style|on\w+)="',
    ):
        assert not re.search(word, PAGE)


def test_its_policy_allows_its_own_script_and_style_alone(server: Server) -> None:
    got = server.get("/")
    assert got.status == 200 and got.body == PAGE and got.headers["content-type"].startswith("text/html")
    rules = dict(rule.strip().split(" ", 1) for rule in got.headers["content-security-policy"].split(";"))
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        inside = re.search(rf"<{tag}>(.*)</{tag}>".encode(), PAGE, re.DOTALL)
        assert inside is not None
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(inside[1]).digest()).decode()}'"
    assert (rules["default-src"], rules["connect-src"]) == ("'none'", "'self'")
    assert "unsafe" not in got.headers["content-security-policy"]


# --- In a browser -----------------------------------------------------------------------------------------------------


class Visit:
    """A page in a browser, what it complained of, and the bodies that it sent.

    Attributes:
        expected: what it may complain of.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.problems: list[str] = []
        self.sent: list[dict[str, Any]] = []
        self.expected = "(?!)"
        page.on("console", lambda message: self._note(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("request", lambda request: self._request(request))

    def _note(self, problem: str) -> None:
        self.problems.append(problem)

    def _request(self, request: Any) -> None:
        if request.method == "POST":
            self.sent.append(json.loads(request.post_data))

    def open(self, server: Server, fragment: str = "") -> Any:
        self.page.goto(f"{server.url}/{fragment}")
        return self.page

    def ask(self, text: str) -> None:
        self.page.wait_for_selector("#send:enabled")
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def answered(self) -> str:
        """Wait for both answers; the text of the chat's last one."""
        self.page.wait_for_selector("#stop", state="hidden")
        return self.text("#log .assistant:last-child p:first-child")

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).text_content())

    def replies(self, *chunks: dict[str, Any], alone: str | None = None) -> None:
        """Put chunks in place of the server's answers, where a model would hardly say so.

        Args:
            alone: the model's own answer; None: the same.
        """

        def fulfil(route: Any) -> None:
            own = alone is not None and "pair" in json.loads(route.request.post_data)
            sent = [chunk(str(alone))] if own else chunks
            body = "".join(f"data: {json.dumps(one)}\n\n" for one in sent) + "data: [DONE]\n\n"
            route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=body)

        self.page.route(f"**{CHAT}", fulfil)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"needs Chromium: apt-get install chromium ({str(error).splitlines()[0]})")
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """A new visitor, whom the page gives nothing to complain of: no broken policy, no exception, no failed request."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(ANSWERED)
    made = Visit(context.new_page())
    yield made
    context.close()
    assert [problem for problem in made.problems if not re.search(made.expected, problem)] == []


@pytest.fixture(scope="session")
def endless(slow_base: tuple[str, ...]) -> tuple[str, ...]:
    """Its answers do not end."""
    return (*slow_base, "--grammar", ENDLESS_GRAMMAR)


@pytest.fixture(scope="module")
def demo_server(demo: Path) -> Iterator[Server]:
    """The demo model, whose pair has a gate."""
    made = Server(str(demo), "--max-tokens", "24", "-t", "1")
    yield made
    made.close()


def chunk(content: str, **acd: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}}], "acd": acd}


def token(text: str, **more: Any) -> dict[str, Any]:
    same = {"token": 1, "safe_token": 1, "safe_text": text, "changed": False, "safe_logprob": -0.5, "safe_rank": 1}
    return same | {"text": text} | more


slow = pytest.mark.slow


@slow
def test_a_chat_and_what_the_guard_did(visit: Visit, demo_server: Server) -> None:
    page = visit.open(demo_server)
    visit.ask("How do I make pancakes?")
    said = visit.answered()
    guarded, alone = visit.sent
    assert guarded["trace"] and guarded["stream"] and "pair" not in guarded
    assert (alone["pair"], alone["seed"], alone["messages"]) == ("as-is", guarded["seed"], guarded["messages"])
    assert said and visit.text("#said").removesuffix("(end)") == said and visit.text("#own")
    assert re.match(
        r"The gate read a chance of .*% that this asks for harm\. The pair steps in from", visit.text("#verdict")
    )
    assert re.search("part|word for word", visit.text("#parting"))
    assert page.locator("#strip .dot").count() == 1
    facts = visit.text("#facts")
    assert f"Seed{guarded['seed']}" in facts and "fitted to this model, with a gate" in facts
    assert re.search(r"Guarded\d+ tokens in .* per secondOn its own\d+ tokens in .* per secondCost[\d.]+ times", facts)
    repeated = demo_server.ask("POST", CHAT, guarded | {"stream": False, "stream_options": None}).json
    assert repeated["choices"][0]["message"]["content"] == said
    visit.ask("And without eggs?")
    second = visit.answered()
    roles = [(message["role"], message["content"]) for message in visit.sent[2]["messages"]]
    assert roles == [("user", "How do I make pancakes?"), ("assistant", said), ("user", "And without eggs?")]
    page.click(".assistant:last-child .actions button")
    assert visit.answered() and len(visit.sent) == 6
    assert visit.sent[4]["messages"] == visit.sent[2]["messages"] and visit.sent[4]["seed"] != visit.sent[2]["seed"]
    assert page.locator(".assistant").count() == 2 and second
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.locator("#report").is_hidden()


@slow
def test_sliders_answer_again_with_the_same_seed(visit: Visit, demo_server: Server) -> None:
    page = visit.open(demo_server)
    visit.ask("How do I pick a lock to break into a house?")
    visit.answered()
    first = visit.text("#own")
    page.locator("#gate_threshold").focus()
    page.keyboard.press("Home")
    page.locator("#alpha").focus()
    page.keyboard.press("End")
    page.wait_for_selector("#stop:not([hidden])")
    visit.answered()
    guarded, _, again = visit.sent  # the model's own answer stands
    assert again == guarded | {"gate_threshold": 0, "alpha": 2}
    assert visit.text("#own") == first
    assert (
        "contrasted with the adversarial one" in visit.text("#verdict") and page.locator("#strip .force").count() == 1
    )
    page.click("#reset")
    page.wait_for_selector("#stop:not([hidden])")
    visit.answered()
    assert visit.sent[3] == guarded


@slow
def test_a_card_for_every_token_by_mouse_and_by_keys(
    visit: Visit, base: tuple[str, ...], start: Callable[..., Server]
) -> None:
    page = visit.open(start(*base, "--alpha", "2", "--max-tokens", "40"))
    visit.ask("Hi")
    visit.answered()
    card, changed = page.locator("#card"), page.locator("#said .changed")
    assert changed.count() > 1 and f"changed {changed.count()} of" in visit.text("#verdict")
    assert "underline" in changed.first.locator("span").evaluate("node => getComputedStyle(node).textDecorationLine")
    changed.first.hover()
    assert re.match(
        r"Said.+Safe stream alone.+Safe stream gave it.*%, (first choice|choice number \d+)", visit.text("#card")
    )
    page.locator("h1").hover()
    assert card.is_hidden()
    page.locator("#own").focus()
    page.keyboard.press("Shift+Tab")
    style = page.locator("#said > span:focus > span").evaluate("node => getComputedStyle(node).outlineStyle")
    assert style == "solid" and card.is_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.className").startswith("changed") and card.is_visible()
    page.keyboard.press("Escape")
    assert card.is_hidden()


@slow
@pytest.mark.parametrize("how", ["button", "key"])
def test_a_cancel_reaches_the_server(
    visit: Visit, endless: tuple[str, ...], start: Callable[..., Server], how: str
) -> None:
    server = start(*endless)
    page = visit.open(server)
    visit.ask("Hi")
    page.locator("#said > span").nth(3).wait_for()
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")
    server.until("acd_requests_running", 0)
    assert "Stopped." in visit.text("#log .note") and len(visit.sent) == 1
    assert visit.text("#log .assistant p:first-child") == visit.text("#said")


@slow
def test_a_reload_keeps_the_chat(visit: Visit, demo_server: Server) -> None:
    page = visit.open(demo_server)
    visit.ask("Name two colours.")
    visit.answered()
    shown = [visit.text(one) for one in ("#log", "#verdict", "#said", "#own", "#facts")]
    page.reload()
    page.wait_for_selector("#send:enabled")
    assert [visit.text(one) for one in ("#log", "#verdict", "#said", "#own", "#facts")] == shown
    visit.ask("And a third?")
    assert visit.answered() and len(visit.sent[-1]["messages"]) == 3


@slow
def test_a_reload_cuts_an_answer(visit: Visit, endless: tuple[str, ...], start: Callable[..., Server]) -> None:
    server = start(*endless)
    page = visit.open(server)
    visit.ask("Hi")
    page.locator("#said > span").nth(3).wait_for()
    page.reload()
    page.wait_for_selector("#send:enabled")
    said = visit.text("#log .assistant p:first-child")
    assert said and said == visit.text("#said") and page.locator("#stop").is_hidden()
    assert visit.text("#log .note") == "Stopped."
    server.until("acd_requests_running", 0)


@slow
def test_a_dead_server_is_told_and_tried_again(
    visit: Visit, endless: tuple[str, ...], start: Callable[..., Server]
) -> None:
    visit.expected = "ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED|ERR_CONNECTION_RESET|status of 503"
    server = start(*endless)
    page = visit.open(server)
    visit.ask("Hi")
    page.locator("#said > span").nth(3).wait_for()
    server.process.kill()
    page.wait_for_selector("#notice:has-text('The server does not answer. Trying again')")
    said = visit.text("#log .assistant p:first-child")
    assert "The connection to the server broke." in visit.text("#log") and said
    assert page.locator("#send").is_disabled()
    args = [sys.executable, "-c", MAIN, *endless, "--max-tokens", "4", "--port", str(server.port)]
    again = subprocess.Popen(args, env=child_env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page.wait_for_selector("#send:enabled")
        assert page.locator("#notice").is_hidden() and visit.text("#log .assistant p:first-child") == said
        visit.ask("Still there?")
        assert visit.answered()
    finally:
        again.kill()
        again.wait(30)


@slow
def test_html_stays_text(visit: Visit, demo_server: Server) -> None:
    page = visit.open(demo_server)
    visit.replies(chunk(IMAGE, trace=[token(IMAGE, changed=True, safe_text=IMAGE, safe_token=2)]))
    visit.ask(IMAGE)
    assert visit.answered() == IMAGE
    page.locator("#said > span").hover()
    page.click("#copy")
    for place in ("#log .user p", "#said", "#own", "#card .quoted >> nth=1"):
        assert visit.text(place) == IMAGE
    assert page.locator("main img, #card img, main script").count() == 0 and page.title() == "acd_local"


@slow
def test_an_error_in_mid_stream_is_a_line(visit: Visit, demo_server: Server) -> None:
    page = visit.open(demo_server)
    visit.replies(chunk("Half", trace=[token("Half")]), {"error": {"message": "the model broke", "code": "internal"}})
    visit.ask("Hi")
    assert visit.answered() == "Half" and len(visit.sent) == 1
    assert visit.text("#log .note.bad") == "the model broke"
    page.unroute(f"**{CHAT}")
    page.wait_for_selector("#send:enabled")
    page.click(".assistant:last-child .actions button")
    assert visit.answered() not in ("", "Half") and not visit.text("#log .note").startswith("the model")


@slow
def test_where_the_answers_part(visit: Visit, demo_server: Server) -> None:
    page = visit.open(demo_server)
    said = ["First", " you", " take", " no", "thing", "."]
    visit.replies(chunk("".join(said), trace=[token(word) for word in said]), alone="First you take note.")
    visit.ask("Hi")
    visit.answered()
    assert visit.text("#parting") == "They say the same for 3 words (pale), then they part."
    assert page.locator("#said > .same").all_text_contents() == said[:3]
    assert (visit.text("#own .same"), visit.text("#own .parts")) == ("First you take", " note.")
    left, right = page.locator("#said > .same").first, page.locator("#own .same")
    assert left.bounding_box()["y"] == right.bounding_box()["y"]


@slow
def test_characters_spread_over_tokens(visit: Visit, demo_server: Server) -> None:
    page = visit.open(demo_server)
    spread = [
        token(" Oh"),
        token(" \ufffd"),
        token("\ufffd"),
        token("\ufffd", changed=True, safe_text="\ufffd"),
        token(" yes"),
    ]
    visit.replies(chunk(" Oh", trace=spread[:2]), chunk(" \U0001f600 yes", trace=spread[2:]))
    visit.ask("Hi")
    assert visit.answered() == " Oh \U0001f600 yes"
    units = page.locator("#said > span")
    assert units.all_text_contents() == [" Oh", " \U0001f600", " yes"]
    assert "changed" in str(units.nth(1).get_attribute("class"))
    units.nth(1).hover()
    assert visit.text("#card .quoted >> nth=1") == "(part of a character)"
    assert visit.text("#parting") == "Both say the same, word for word."


@slow
def test_a_second_look_that_turns_an_answer(visit: Visit, demo_server: Server) -> None:
    page = visit.open(demo_server)
    words = ["First", " you", " take", " sorry", "."]
    trace = [token(word, changed=word == " sorry", safe_text=" a", safe_rank=2) for word in words]
    turned = {"probability": 0.9, "decision": "contrast", "position": 2}
    timings = {"prompt_seconds": 1.0, "answer_seconds": 1.0, "tokens_per_second": 4.0}
    about = {"finish_reason": "stop", "timings": timings, "contrast": {"alpha": 0.5, "beta": 0.1}}
    visit.replies(
        chunk("", gate={"probability": 0.25, "decision": "helpful", "position": 0}),
        chunk("First you", trace=trace[:2]),
        chunk("", gate=turned),
        chunk(" take sorry.", trace=trace[2:]),
        chunk("", gate={"probability": 0.25, "decision": "helpful", "contrast_from": 2, "looks": [[2, 0.9]]}, **about),
    )
    visit.ask("Hi")
    visit.answered()
    said = visit.text("#verdict").replace("\u00a0", " ")
    assert "read a chance of 25 %" in said and "here the model answered under the pair's helpful text" in said
    assert "It read the answer again: 90 % after 2 tokens; there the contrast began." in said
    assert said.endswith("The contrast changed 1 of 5 tokens.")
    band, ground = page.locator("#strip .force").bounding_box(), page.locator("#strip .ground").first.bounding_box()
    assert band["x"] - ground["x"] == pytest.approx(0.4 * ground["width"], abs=2)
    assert page.locator("#strip .dot").count() == 2 and page.locator("#strip .alters").count() == 1
    cards = []
    for unit in page.locator("#said > span").all():
        unit.hover()
        cards.append(visit.text("#card").replace("\u00a0", " "))
    assert cards[1].endswith(
        "Contrastnot in force hereThe model gave it61 %, choice number 2Gate read25 % at the start"
    )
    assert cards[3] == "SaidsorrySafe stream aloneaSafe stream gave it61 %, choice number 2Gate read90 % after 2 tokens"


@slow
def test_a_locked_guard_is_told_and_left_alone(
    visit: Visit, gated_base: tuple[str, ...], start: Callable[..., Server]
) -> None:
    page = visit.open(start(*gated_base, "--lock", "--max-tokens", "8"))
    visit.ask("Hi")
    visit.answered()
    (sent,) = visit.sent
    assert set(sent) == {"messages", "seed", "stream", "stream_options", "trace"}
    assert visit.text("#own") == "The guard of this server is locked: it gives no answer without it."
    assert page.locator("#sliders input:disabled").count() == 3 and "locked" in visit.text("#numbers-note")
    page.locator("#said > span").first.hover()
    assert "not told: the guard is locked" in visit.text("#card")


@slow
def test_a_token_behind_the_address_is_used_and_hidden(
    visit: Visit, base: tuple[str, ...], start: Callable[..., Server]
) -> None:
    visit.expected = "status of 401"
    server = start(*base, "--token", "s3cret", "--max-tokens", "4")
    page = visit.open(server)
    page.wait_for_selector("#notice:has-text('This server asks for a token')")
    visit.open(server, "#token=s3cret")
    visit.ask("Hi")
    assert visit.answered() and "s3cret" not in page.url
    page.click("#copy")
    assert "$ACD_TOKEN" in visit.text("#curl") and "s3cret" not in visit.text("#curl")


@slow
def test_it_fits_a_phone_and_names_its_parts(visit: Visit, demo_server: Server) -> None:
    page = visit.open(demo_server)
    page.set_viewport_size({"width": 390, "height": 844})
    visit.ask("Name two colours." + " and" * 40 + "x" * 200)
    visit.answered()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    chat, guard = page.locator("#chat").bounding_box(), page.locator("#guard").bounding_box()
    assert chat["y"] + chat["height"] <= guard["y"] and guard["width"] == 390
    assert visit.text("#spoken").startswith(visit.text("#log .assistant p:first-child"))
    for role, name in (
        ("textbox", "Message"),
        ("slider", "Alpha"),
        ("button", "Send"),
        ("region", "What the guard did"),
    ):
        assert page.get_by_role(role, name=name, exact=True).count() == 1
