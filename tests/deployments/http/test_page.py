"""The page's files: whole, served with the right headers, and nothing from outside."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from twotower.deployments.http.page import page_routes

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deployments/http/page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
# Elements without an end tag.
VOID = {"meta", "link", "input", "br"}
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


class Page(HTMLParser):
    """The elements of a page in order, each with its attributes; tags have to be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    @property
    def ids(self) -> list[str]:
        return [each["id"] or "" for _, each in self.elements if "id" in each]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page((FOLDER / "index.html").read_text())


async def answer(path: str, method: str = "GET") -> httpx.Response:
    """The answer of the page's routes alone."""
    app = FastAPI()
    app.include_router(page_routes())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return await client.request(method, path)


@pytest.mark.parametrize("path", ["/", *(f"/page/{file.name}" for file in FILES)])
async def test_each_file_is_served_under_a_strict_policy(path: str) -> None:
    file = FOLDER / (path.removeprefix("/page/") if path != "/" else "index.html")
    response = await answer(path)
    assert response.status_code == 200
    assert response.content == file.read_bytes()
    assert response.headers["content-type"].split(";")[0] == TYPES[file.suffix]
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert (await answer(path, "HEAD")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/", "/page/page.py", "/page/../page.py", "/page/%2e%2e/app.py"]
)
async def test_no_other_file_is_served(path: str) -> None:
    assert (await answer(path)).status_code == 404


async def test_all_that_the_page_names_is_served(page: Page) -> None:
    named = [each["src"] for each in page.all("script")]
    named += [each["href"] for each in page.all("link") if each["href"] != "data:,"]
    for script in SCRIPTS:
        named += [f"page/{name}" for name in re.findall(r'from "\./(.+?)"', script.read_text())]
    assert {"page/page.css", "page/page.js", "page/trace.js"} <= set(named)
    for name in set(named):
        assert (await answer(f"/{name}")).status_code == 200, name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_comes_from_outside(file: Path) -> None:
    assert re.findall(r"(?:https?:)?//[\w.]|@import|url\(", file.read_text()) == []


def test_nothing_is_inline_that_the_policy_would_stop(page: Page) -> None:
    assert page.all("style") == []
    assert all(each.get("src") for each in page.all("script"))
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag


def test_each_control_has_a_label_and_each_reference_a_target(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    labelled = {each["for"] for each in page.all("label")}
    for control in page.all("input", "select", "textarea"):
        assert control["id"] in labelled
    for _, attributes in page.elements:
        for name in ("for", "aria-describedby", "aria-labelledby"):
            assert set((attributes.get(name) or "").split()) <= set(page.ids)


def test_each_field_has_a_place_for_its_error(page: Page) -> None:
    for control in page.all("input", "select", "textarea"):
        if control["id"] not in ("beside", "pace", "replay"):
            assert f"{control['id']}-error" in (control["aria-describedby"] or "").split()


def test_each_element_that_the_script_asks_for_exists(page: Page) -> None:
    asked = set(re.findall(r'\bat\("([\w-]+)"\)', (FOLDER / "page.js").read_text()))
    assert {"prompt", "live", "replay"} <= asked <= set(page.ids)


def test_the_package_has_the_page() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "page/*" in settings["tool"]["setuptools"]["package-data"]["*"]


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder where node takes the page's scripts for modules."""
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for script in SCRIPTS:
        shutil.copy(script, tmp_path)
    return tmp_path


def node(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["node", *arguments], cwd=folder, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluated(folder: Path, names: str, module: str, source: str) -> object:
    """What an expression gives that uses exports of a module."""
    program = f"import {{ {names} }} from './{module}.js'; "
    program += f"console.log(JSON.stringify({source}))"
    return json.loads(node(folder, "--input-type=module", "-e", program))


@needs_node
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_scripts_parse(modules: Path, script: Path) -> None:
    node(modules, "--check", script.name)


@needs_node
def test_numbers_go_out_as_they_are_typed(modules: Path) -> None:
    typed = (
        '{seed: "9223372036854775807", temperature: " 0.70 ", block_size: "abc", max_tokens: ""}'
    )
    body = evaluated(
        modules, "requestBody", "service", f'requestBody({{prompt: "a\\"b"}}, {typed})'
    )
    assert body == (
        '{"prompt":"a\\"b","seed":9223372036854775807,"temperature":0.70,"block_size":"abc"}'
    )


# A block of three tokens in three steps; its draft of the middle step has not come.
DRAFT = {
    "start": 5,
    "step": 0,
    "token_ids": [7, 8, 9],
    "tokens": ["a", "x", None],
    "masked": [False, True, True],
    "confidences": [0.9, 0.4, 0.0],
}
BLOCK = {
    "start": 5,
    "token_ids": [7, 8, 9],
    "tokens": ["a", "b", "c"],
    "commit_steps": [0, 2, 1],
    "confidences": [0.9, 0.6, 0.7],
    "nfe": 3,
    "context_passes": 1,
}


@needs_node
def test_a_block_gives_a_frame_for_each_step_whatever_drafts_were_lost(modules: Path) -> None:
    source = f"""(() => {{
        let now = 10;
        const trace = new Trace("mask_diffusion", () => now);
        now = 12;
        const live = trace.draft({json.dumps(DRAFT)});
        const frames = trace.block({json.dumps(BLOCK)}, "abc");
        return [live, ...frames, trace.end(null)].map((frame) => [
          frame.step,
          frame.cells.map(({{ text, step }}) => `${{text}}@${{step}}`).join(" "),
          frame.nfe, frame.tokens, frame.rate, frame.before, tokensPerPass(frame),
        ]);
    }})()"""
    assert evaluated(modules, "Trace, tokensPerPass", "trace", source) == [
        [0, "a@0 x@null null@null", 1, 1, None, "", 1],
        [-1, "null@null null@null null@null", 0, 0, None, "", None],
        [0, "a@0 x@null null@null", 1, 1, 1.5, "", 1],
        [1, "a@0 x@null c@1", 2, 2, 1.5, "", 1],
        [2, "a@0 b@2 c@1", 3, 3, 1.5, "", 1],
        [0, "", 3, 3, 1.5, "abc", 1],
    ]


@needs_node
def test_ar_shows_no_masks_and_counts_passes_of_the_context_tower(modules: Path) -> None:
    block = BLOCK | {"commit_steps": [0, 1, 2], "nfe": 0, "context_passes": 2}
    source = f"""new Trace("ar", () => 1).block({json.dumps(block)}, "abc").map((frame) => [
        frame.cells.map((cell) => cell.text).join(""), frame.context, tokensPerPass(frame)])"""
    assert evaluated(modules, "Trace, tokensPerPass", "trace", source) == [
        ["a", 0, None],
        ["ab", 1, 2],
        ["abc", 2, 1.5],
    ]


@needs_node
@pytest.mark.parametrize(("mode", "figure"), [("mask_diffusion", 1), ("auto", 0.75)])
def test_where_the_context_tower_checks_its_passes_count_too(
    modules: Path, mode: str, figure: float
) -> None:
    source = f"""[new Trace("{mode}", () => 1).block({json.dumps(BLOCK)}, "abc")
        .map(tokensPerPass).at(-1)]"""
    assert evaluated(modules, "Trace, tokensPerPass", "trace", source) == [figure]
