"""Hooks of mkdocs: a file outside docs/ that a page links to becomes a page of the site.

On GitHub `../trainer/loop.py` shows that file. The site holds a copy of every linked file under source/, so
the same link works in both, and nothing needs to know where the repository is published.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()[^)\s#:]+")
"""The path of a Markdown link: no anchor, and no address with a scheme."""

API = re.compile(r"<!-- ::: madpo\.([\w.]+) -->")
"""A place for the docstring of an object, which mkdocstrings fills in; GitHub shows nothing there. `madpo.x`
is the folder `x`, and is looked for as such: typings/madpo has links, which mkdocstrings does not follow."""

_origins: dict[str, Path] = {}
"""Page of the site -> the file that it shows."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file outside docs/ that a page links to, and for those that these link to."""
    pages = list(files.documentation_pages())
    _origins.update({page.src_uri: DOCS / page.src_uri for page in pages})
    for page in pages:  # grows
        folder = _origins[page.src_uri].parent
        for link in LINK.findall(page.content_string):
            target = (folder / link).resolve()
            name = _name_on_site(target)
            if name.startswith("source/") and name not in _origins and target.exists():
                _origins[name] = target / "README.md" if target.is_dir() else target
                added = File.generated(config, name, content=_content(target))
                files.append(added)
                pages.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point every link at the page that shows its file, and uncover the places for docstrings."""
    folder = _origins[page.file.src_uri].parent
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(_name_on_site((folder / link[0]).resolve()), here or ".")

    return API.sub(r"::: \1", LINK.sub(moved, markdown))


def _name_on_site(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = f"source/{path.relative_to(ROOT).as_posix()}"
    if path.is_dir():
        return f"{name}/README.md"
    return name if path.suffix in (".md", ".svg") else f"{name}.md"


def _content(path: Path) -> str:
    """A page as it is; of a folder its README.md, or its files; of anything else its text."""
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir() and (path / "README.md").is_file():
        path = path / "README.md"
    if path.is_dir():
        text = title + "\n".join(f"- {each.name}" for each in sorted(path.iterdir()))
    elif path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
    else:
        text = f"{title}``````{path.suffix[1:]}\n{path.read_text(encoding='utf-8')}\n``````\n"
    return f"---\nsearch: {{exclude: true}}\n---\n\n{text}"
