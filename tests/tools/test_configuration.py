"""The page of settings: what it says of a model, and that the committed one is up to date."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field

from tools import configuration
from twotower.deployments.config import ServiceConfig


class Inner(BaseModel):
    """Settings inside."""

    most: int = Field(ge=1, le=2**31 - 1, description="a | b")


class Outer(BaseModel):
    """Settings outside."""

    kind: Literal["x", "y"] = "x"
    place: str = Field("here", pattern=r"^(here|there)$")
    share: float | None = Field(None, gt=0, le=1, description="none = all")
    labels: dict[str, str] = Field(default_factory=dict)
    inner: Inner | None = None
    several: list[Inner] = Field(default_factory=list)
    words: list[str] = Field(default_factory=list)
    on: bool = False


@pytest.mark.parametrize(
    "line",
    [
        "| `kind` | `x`, `y` | `x` |  |  |",
        "| `place` | text | `here` | `here`, `there` |  |",
        "| `share` | number | none | above 0, at most 1 | none = all |",
        "| `labels` | names with a text each | none |  |  |",
        "| `inner` | settings below | none |  |  |",
        "| `several` | list of settings below | none |  |  |",
        "| `words` | list of text | none |  |  |",
        "| `on` | true, false | `false` |  |  |",
        "## `several[]`",
        "| `several[].most` | whole number | required | at least 1 | a \\| b |",
        "## `inner`",
        "| `inner.most` | whole number | required | at least 1 | a \\| b |",
    ],
)
def test_a_setting_is_a_line(line: str) -> None:
    assert line in configuration.page(Outer).splitlines()


def test_every_setting_of_the_service_is_on_the_committed_page() -> None:
    page = configuration.TARGET.read_text(encoding="utf-8")
    assert page == configuration.page(ServiceConfig), "run make configuration"
    assert all(f"| `{name}` |" in page for name in ServiceConfig.model_fields)


def test_a_page_that_differs_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(configuration, "page", lambda _model: "another\n")
    assert configuration.main(["--check"]) == 1
    assert "run make configuration" in capsys.readouterr().out
