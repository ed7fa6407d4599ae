"""Makes a site of these pages, for mkdocs: adds the pages that lie elsewhere, and leads links where the site has them.

The pages are written to be read in the repository, where README.md links to docs/ and docs/ back to it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Files of the repository that are pages of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
} | {
    f"examples/{path.parent.name}/README.md": f"examples/{path.parent.name}.md" for path in ROOT.glob("examples/*/*.md")
}
_FROM = {page: source for source, page in ELSEWHERE.items()}
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere in the repository."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to files of the repository to their pages; where there is none, their text alone stays."""
    source = _FROM.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def lead(link: re.Match[str]) -> str:
        text, target = link.groups()
        name, mark, anchor = target.partition("#")
        if "://" in target or not name:
            return link[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        goal = ELSEWHERE.get(found) or (found.removeprefix("docs/") if found.startswith("docs/") else None)
        if goal is None and (ROOT / found).exists():
            return text
        goal = posixpath.relpath(goal or found, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{text}]({goal}{mark}{anchor})"

    return _LINK.sub(lead, markdown)
