"""The page in Debian's Chromium, against real services of this process on the shipped model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.support.http_here import ServicesHere, services_here
from twotower.deployments.access.keys import ApiKey, new_key
from twotower.deployments.config import ServiceConfig
from twotower.towers.checkpoint.weights import SHIPPED_MODEL

pytest.importorskip("playwright", reason="needs the extra 'clients'")
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import CHROMIUM, chromium

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium"),
]
KEY, DIGEST = new_key()
PROMPT = "class Stack:\n    def push(self, item):\n        "
DARK_GROUND, LIGHT_GROUND = "rgb(15, 20, 25)", "rgb(246, 247, 248)"
MILLISECONDS = 20_000
# Room for an output that takes far longer than it takes to stop it.
CONTEXT, LONG = 2048, 2000
LATER_BLOCK = re.compile(r"block ([2-9]|\d\d)")


@pytest.fixture(scope="module")
def services() -> Iterator[ServicesHere]:
    """One that answers this machine, and one that wants a key."""
    key = ApiKey(name="alice", sha256=DIGEST)
    configs = [ServiceConfig(max_context=CONTEXT, api_keys=keys) for keys in ([], [key])]
    with services_here(SHIPPED_MODEL, configs) as services:
        yield services


@pytest.fixture(scope="module")
def browser(services: ServicesHere) -> Iterator[Browser]:
    """Ends before the services do: they wait for connections."""
    assert services
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, services: ServicesHere) -> Iterator[Page]:
    yield from opened(browser, services.urls[0])


def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page in a fresh profile; what its scripts fail with fails the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda line: failures.extend(refused(line.text)))
    page.set_default_timeout(MILLISECONDS)
    page.goto(url)
    yield page
    context.close()
    assert failures == []


def refused(line: str) -> list[str]:
    """A line of the console, if it says that the page's own policy has stopped something."""
    return [line] if "Content Security Policy" in line else []


def ask(page: Page, **fields: str) -> None:
    """Fills fields of the form; the pace is that of the service."""
    expect(page.locator("#model")).to_contain_text(f"{CONTEXT} tokens")
    page.locator("#pace").select_option("0")
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)


def until_done(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Done", timeout=MILLISECONDS)


def answered(url: str, **body: Any) -> dict[str, Any]:
    """What the API gives without a stream."""
    data = json.dumps(body).encode()
    request = Request(f"{url}/v1/completions", data, {"content-type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def until_free(services: ServicesHere) -> None:
    """Waits until no row is left, for less time than LONG tokens take."""
    deadline = time.monotonic() + 5
    while services.handle.rows():
        assert time.monotonic() < deadline, f"{services.handle.rows()} rows are left"
        time.sleep(0.02)


@pytest.mark.parametrize("chosen", ["mask_diffusion", "verified", "auto"])
def test_what_is_streamed_is_what_the_api_gives(
    page: Page, services: ServicesHere, chosen: str
) -> None:
    # More than 53 bits: the seed must not pass through a number of JavaScript.
    seed = 2**62 + 12345
    ask(page, prompt=PROMPT, max_tokens="40", temperature="0.8", seed=str(seed))
    page.locator("#mode").select_option(chosen)
    expect(page.locator("#quality")).to_be_visible(visible=chosen == "auto")
    page.locator("#start").click()
    until_done(page)
    for column, mode in (("denoised", chosen), ("ar", "ar")):
        body = {"max_tokens": 40, "temperature": 0.8, "seed": seed, "mode": mode}
        expected = answered(services.urls[0], prompt=PROMPT, **body)
        part = page.locator(f"#{column}")
        assert part.locator("[data-part=text]").text_content() == expected["choices"][0]["text"]
        cost = expected["usage"]["twotower"]
        passes = cost["nfe"] + (cost["context_passes"] if mode != "mask_diffusion" else 0)
        tokens = expected["usage"]["completion_tokens"]
        per_pass = part.locator("[data-part=per-pass]").inner_text()
        if mode in ("verified", "auto"):
            # Who drafts, and so the passes, follow the pace of the machine.
            assert 0.8 <= float(per_pass) <= 16
        else:
            # The second request has its prompt from the prefix cache: less by its pass.
            assert float(per_pass) == pytest.approx(tokens / passes, rel=0.05)
    until_free(services)


def test_a_block_is_seen_while_it_is_denoised(page: Page) -> None:
    ask(page, prompt=PROMPT, max_tokens="32", confidence_threshold="1", steps_per_block="16")
    page.locator("#pace").select_option("100")
    page.locator("#beside").uncheck()
    expect(page.locator("#ar")).to_be_hidden()
    seen = page.evaluate_handle(SEEN)
    page.locator("#start").click()
    until_done(page)
    # At a threshold of 1 each step commits one token of the 16 but the first, which the context
    # tower draws, shown with step 1.
    frames = {place: counts for place, *counts in seen.json_value()}
    assert frames["block 2, masks"] == [16, []]
    for step in range(1, 16):
        steps = [1, *range(1, step + 1)]
        assert frames[f"block 2, step {step} of 15"] == [15 - step, steps]
    # The replay has the same passes, with the arrow keys.
    page.locator("#replay").focus()
    page.keyboard.press("ArrowLeft")
    progress = page.locator("#denoised [data-part=progress]")
    expect(progress).to_have_text("block 2, step 15 of 15")
    page.keyboard.press("ArrowLeft")
    expect(progress).to_have_text("block 2, step 14 of 15")
    assert page.locator("#denoised [data-part=block] :is(.guess, .mask)").count() == 1


# Of each frame that is drawn: where it stands, how many cells are masked, and the steps that have
# committed the others.
SEEN = """() => {
  const seen = [];
  const part = (name) => document.querySelector(`#denoised [data-part=${name}]`);
  new MutationObserver(() => {
    const block = part("block");
    const steps = [...block.querySelectorAll(".done[data-step]")].map((each) => each.dataset.step);
    const count = (kind) => block.querySelectorAll(kind).length;
    const sorted = steps.map(Number).sort((one, other) => one - other);
    seen.push([part("progress").textContent, count(".mask, .guess"), sorted]);
  }).observe(part("progress"), { childList: true });
  return seen;
}"""


def test_stop_frees_both_rows(page: Page, services: ServicesHere) -> None:
    ask(page, prompt=PROMPT, max_tokens=str(LONG), confidence_threshold="1")
    page.locator("#start").click()
    expect(page.locator("#denoised [data-part=progress]")).to_have_text(LATER_BLOCK)
    assert services.handle.rows() > 0
    page.locator("#stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    until_free(services)
    expect(page.locator("#start")).to_be_enabled()
    progress = page.locator("#denoised [data-part=progress]").inner_text()
    assert 16 <= int(progress.removesuffix(" tokens")) < LONG


ERRORS = {
    "block_size": ("0", "got 0, expected a whole number"),
    "seed": ("abc", "got 'abc'"),
    "max_tokens": ("100000", f"at most {CONTEXT} tokens of context"),
    "prompt": ("", "at least 1 token"),
}


def test_an_error_stands_next_to_its_field(page: Page) -> None:
    good = {"prompt": PROMPT, "block_size": "16", "seed": "4", "max_tokens": "8"}
    for name, (value, words) in ERRORS.items():
        ask(page, **(good | {name: value}))
        page.locator("#start").click()
        expect(page.locator(f"#{name}-error")).to_contain_text(words)
        field = page.locator(f"#{name}")
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_have_accessible_description(page.locator(f"#{name}-error").inner_text())
        expect(field).to_be_focused()
        assert page.locator("[aria-invalid]").count() == 1
    ask(page, **good)
    page.locator("#start").click()
    until_done(page)
    expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_a_key_is_asked_for_and_stays_in_the_page(browser: Browser, services: ServicesHere) -> None:
    for page in opened(browser, services.urls[1]):
        key = page.get_by_label("API key")
        expect(key).to_be_focused()
        expect(page.locator("#key-error")).not_to_be_empty()
        key.fill("tt-of-nobody")
        page.locator("#start").click()
        expect(page.locator("#key-error")).not_to_be_empty()
        key.fill(KEY)
        page.locator("#max_tokens").fill("8")
        page.locator("#start").click()
        until_done(page)
        expect(page.locator("#key-error")).to_be_hidden()
        assert KEY not in page.url
        kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert kept == [0, 0, ""]


def test_nothing_sticks_out_at_any_width(page: Page) -> None:
    ask(page, max_tokens="16")
    page.locator("#start").click()
    until_done(page)
    page.locator("#replay").focus()
    page.keyboard.press("ArrowLeft")
    for width in (320, 360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        boxes = [page.locator(f"#{each}").bounding_box() for each in ("denoised", "ar")]
        denoised, ar = [box["y"] for box in boxes if box is not None]
        assert (denoised < ar) == (width < 1080)


def test_a_model_without_tokenizer_and_denoiser_is_asked_in_ids(
    page: Page, services: ServicesHere
) -> None:
    known = {"id": "bare", "max_model_len": 512, "modes": ["ar"], "has_tokenizer": False}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [known]}))
    page.reload()
    prompt = page.get_by_label("token ids with commas")
    prompt.fill("5, 6,7")
    page.locator("#max_tokens").fill("8")
    expect(page.locator("#mode option")).to_have_text(["ar"])
    expect(page.locator("#beside")).to_be_disabled()
    expect(page.locator("#ar")).to_be_hidden()
    with page.expect_request("**/v1/completions") as sent:
        page.locator("#start").click()
    assert json.loads(sent.value.post_data or "")["prompt"] == [5, 6, 7]
    until_done(page)
    until_free(services)


@pytest.mark.parametrize(("scheme", "ground"), [("dark", DARK_GROUND), ("light", LIGHT_GROUND)])
def test_colours_follow_the_system_and_can_be_read(
    browser: Browser, services: ServicesHere, scheme: str, ground: str
) -> None:
    for page in opened(browser, services.urls[0], color_scheme=scheme):
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        # WCAG AA: 4.5 for text, on the page's ground as on its surfaces.
        assert page.evaluate(CONTRASTS) >= 4.5


# The least contrast of a colour of text with what it stands on.
CONTRASTS = """() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const parts = style.getPropertyValue(name).trim().slice(1).match(/../g);
    const [r, g, b] = parts.map((part) => parseInt(part, 16) / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const contrast = (one, other) => {
    const [a, b] = [light(one), light(other)];
    return Math.max(a, b) / Math.min(a, b);
  };
  const pairs = ["--ink", "--muted", "--accent", "--error"]
    .flatMap((text) => [[text, "--ground"], [text, "--surface"]]);
  return Math.min(contrast("--on-accent", "--accent"), ...pairs.map((pair) => contrast(...pair)));
}"""


def test_all_of_it_with_the_keyboard(page: Page, services: ServicesHere) -> None:
    ask(page)
    page.locator("#prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("import os\n")
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.role"))
    fields = ["mode", "confidence_threshold", "steps_per_block", "block_size", "max_tokens"]
    assert reached[:8] == ["start", *fields, "temperature", "seed"]
    assert reached[8:12] == ["pace", "beside", "region", "region"]
    page.locator("#max_tokens").fill(str(LONG))
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Control+Enter")
    expect(page.locator("#denoised [data-part=progress]")).to_have_text(LATER_BLOCK)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped.")
    until_free(services)
    # Start and Stop hand the focus to each other: the one that cannot be used cannot have it.
    page.locator("#start").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#start")).to_be_focused()


def test_a_screen_reader_is_told_blocks_and_the_state(page: Page) -> None:
    ask(page, prompt=PROMPT, max_tokens="32")
    told = page.evaluate_handle(
        """() => {
          const told = [];
          const live = document.getElementById("live");
          new MutationObserver(() => told.push(live.textContent)).observe(live, {childList: true});
          return told;
        }"""
    )
    page.locator("#start").click()
    until_done(page)
    text = page.locator("#denoised [data-part=text]").text_content()
    # A block each, and nothing of its steps.
    blocks = [each for each in told.json_value() if each]
    assert len(blocks) == 2
    assert "".join(blocks) == text
    assert page.locator("#live").get_attribute("aria-live") == "polite"
    tree = page.locator("body").aria_snapshot()
    for line in SPOKEN:
        assert line in tree, tree


SPOKEN = (
    "main:",
    'form "Request":',
    "status:",
    'region "mask_diffusion":',
    'region "ar":',
    'slider "Confidence threshold"',
    'switch "ar beside it"',
    'slider "Replay"',
)
