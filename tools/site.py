"""A hook of mkdocs: pages from outside docs/, and links that are written for the repository.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages. A link to a file that is a page leads
there; a link to any other file of the repository, which the site does not have, becomes its text.
"""

from __future__ import annotations

import os
import posixpath
import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

# Pages that stand at the top of the repository, and their names in the site.
TOP_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
# ](target) and ](target#anchor) of links and pictures; addresses with a scheme are left alone.
LINK = re.compile(
    r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)"
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of TOP_PAGES."""
    for source, name in TOP_PAGES.items():
        path = posixpath.join(posixpath.dirname(config.config_file_path), source)
        files.append(File.generated(config, name, abs_src_path=path))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page's text with its links turned to pages of the site."""
    root = posixpath.dirname(config.config_file_path)
    sources = {name: source for source, name in TOP_PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = posixpath.dirname(source)

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["path"]))
        if not os.path.exists(posixpath.join(root, target)):
            raise PluginError(f"{source}: no file {target}, which a link leads to")
        name = TOP_PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(name) is None or not (
            target in TOP_PAGES or target.startswith("docs/")
        ):
            return match["text"][1:-1]
        return f"{match['text']}({name}{match['anchor'] or ''})"

    return LINK.sub(turned, markdown)
