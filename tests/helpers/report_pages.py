"""Reads report pages and the figures in them, and checks that they are sound and need nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "input"}
TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "h1", "h2", "h3", "p", "b",
    "dl", "dt", "dd", "code", "div", "span", "mark", "table", "caption", "thead", "tbody", "tr", "th", "td", "details",
    "summary", "figure", "figcaption", "svg", "desc", "g", "defs", "use", "path", "clippath", "rect", "text",
    "noscript", "form", "label", "select", "option", "input", "button", "script",
}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes, text and scripts of a page, with the nesting checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            kind = self.tags[-1][1].get("type") or self.open[-1]
            self.raw[kind] = self.raw.get(kind, "") + data
        else:
            self.texts.append(data)

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self) -> set[str]:
        return {key for _, attrs in self.tags for key in attrs}

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if attrs.get("id")]  # type: ignore[misc]

    def data(self) -> Any:
        return json.loads(self.raw["application/json"])


def checked(text: str) -> Page:
    """The page, which must be sound and need nothing else."""
    text.encode()
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not page.attributes() & {"src", "srcset", "action", "xlink:href", "data", "poster"}
    assert not [key for key in page.attributes() if key.startswith("on")]
    for tag, attrs in page.tags:
        assert "href" not in attrs or (tag == "use" and (attrs["href"] or "").startswith("#"))
        for key in ("style", "clip-path"):
            assert not re.search(r"url\((?!#)|https?:|@import", attrs.get(key) or "")
        assert "style" not in attrs or tag in ("g", "path", "use", "text", "rect")  # figures alone
    for code in (page.raw["style"], page.raw.get("script", "")):
        assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|innerHTML|import\(", code)
    policy = next(a["content"] or "" for t, a in page.tags if t == "meta" and "http-equiv" in a)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    if "script" in page.raw:
        digest = base64.b64encode(hashlib.sha256(page.raw["script"].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy and len(scripts) == 2
    else:
        assert "script" not in policy and not scripts
    assert len(page.ids()) == len(set(page.ids()))
    for plot in figures(text):
        parsed(plot)
    return page


# --- Figures ----------------------------------------------------------------------------------------------------------


def figures(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, re.S)


def parsed(figure: str) -> ElementTree.Element:
    """The figure as XML, checked: a title, a description, numbers, everything inside the frame."""
    root = ElementTree.fromstring(figure)
    ids = root.attrib["aria-labelledby"].split()
    assert [root[0].tag, root[1].tag] == ["title", "desc"] and [root[0].attrib["id"], root[1].attrib["id"]] == ids
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for node in root.iter():
        for key, most in (("x", width), ("y", height)):
            if key in node.attrib:
                value = float(node.attrib[key])
                assert math.isfinite(value) and -1 <= value <= most + 1, node.attrib
        assert "nan" not in node.attrib.get("d", "")
    return root


def figure(text: str, key: str) -> ElementTree.Element:
    """The figure of a page with that key."""
    return next(root for root in map(parsed, figures(text)) if root[0].attrib["id"] == f"fig-{key}-t")


def texts(root: ElementTree.Element) -> list[str]:
    return [node.text or "" for node in root.iter("text")]


def curves(root: ElementTree.Element, colour: int, faint: bool = False) -> list[list[tuple[float, float]]]:
    """The points of the lines of that colour; not those of the legend, which no frame clips."""
    style = re.compile(rf"stroke: var\(--s{colour}\);.*{'opacity: 0.35' if faint else 'width: 2'}")
    paths = [n.get("d", "") for n in root.iter("path") if "clip-path" in n.attrib and style.search(n.attrib["style"])]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def marks(root: ElementTree.Element, colour: int) -> list[tuple[float, float, str]]:
    """Place and hover text of the marks of that colour."""
    found = [n for n in root.iter("use") if f"fill: var(--s{colour})" in n.attrib["style"] and len(n)]
    return [(float(n.attrib["x"]), float(n.attrib["y"]), n[0].text or "") for n in found]


def ticks(root: ElementTree.Element) -> tuple[dict[float, float], dict[float, float]]:
    """Where the labels of the ticks stand, across and up, by their number."""
    across, up = {}, {}
    for node in root.iter("text"):
        number = (node.text or "").replace("\u2212", "-")
        if "var(--soft)" in node.attrib["style"] and re.fullmatch(r"-?[\d.]+", number):
            if "text-anchor: middle" in node.attrib["style"]:
                across[float(number)] = float(node.attrib["x"])
            else:
                up[float(number)] = float(node.attrib["y"]) - 4.2  # from the base line to the middle of a digit
    return across, up


def at(known: dict[float, float], value: float) -> float:
    """Where a value stands by the ticks."""
    (low, a), (high, b) = min(known.items()), max(known.items())
    return a + (value - low) / (high - low) * (b - a)
