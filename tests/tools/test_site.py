"""Links of pages, which are written for the repository, as the site has them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {"index.md", "contributing.md", "changes.md", "model.md", "architecture.md", "wings.svg"}


def turned(page: str, markdown: str) -> str:
    site = pytest.importorskip("tools.site", exc_type=ImportError)
    config = SimpleNamespace(config_file_path=str(ROOT / "mkdocs.yml"))
    files: Any = SimpleNamespace(get_file_from_path=lambda name: name if name in PAGES else None)
    own = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    result: str = site.on_page_markdown(markdown, own, config, files)
    return result


@pytest.mark.parametrize(
    ("page", "written", "shown"),
    [
        ("index.md", "[a](docs/model.md#modes)", "[a](model.md#modes)"),
        ("index.md", "[a](CONTRIBUTING.md)", "[a](contributing.md)"),
        ("index.md", "![a](docs/wings.svg)", "![a](wings.svg)"),
        ("architecture.md", "[a](../CONTRIBUTING.md#wings)", "[a](contributing.md#wings)"),
        ("architecture.md", "[a](model.md)", "[a](model.md)"),
        ("architecture.md", "[a](https://example.com/a)", "[a](https://example.com/a)"),
        # The site has no such file: the words stay.
        ("index.md", "see [the `code`](LICENSE).", "see the `code`."),
        ("architecture.md", "[a](../protos/v1/generation.proto)", "a"),
    ],
)
def test_a_link_leads_to_the_page(page: str, written: str, shown: str) -> None:
    assert turned(page, written) == shown


def test_a_link_to_nothing_stops_the_build() -> None:
    site = pytest.importorskip("tools.site", exc_type=ImportError)
    with pytest.raises(site.PluginError, match=r"README.md: no file docs/none.md"):
        turned("index.md", "[a](docs/none.md)")
