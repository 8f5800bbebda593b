"""Pictures of the page for the README, from the page itself on the shipped model: a moment in the
middle of a block, and an animation of a block that fills. `python -m tools.pictures` writes them;
it needs Debian's chromium and the extra `clients`.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import chromium
from tests.support.http_here import services_here
from twotower.deployments.config import ServiceConfig
from twotower.towers.checkpoint.weights import SHIPPED_MODEL

DOCS = Path(__file__).parents[1] / "docs"
PICTURE, ANIMATION = DOCS / "playground.png", DOCS / "playground.gif"
# Pixels of a screen's pixel: the README shows pictures at half of their size.
SCALE = 2
# What is shown: the step of the picture, and the block of the animation.
MOMENT = "block 3, step 2 of"
BLOCK = "block 3,"
# Asked at each frame of the screen: the moment is short.
AT = """(moment) => document.querySelector("#denoised [data-part=progress]").textContent
  .startsWith(moment)"""
MILLISECONDS = 120_000
# Of a frame of the animation, and of its last one.
FRAME, LAST = 450, 2000
COLOURS = 96


def main() -> None:
    """Writes both pictures."""
    config = ServiceConfig(max_context=512)
    with services_here(SHIPPED_MODEL, [config]) as services, chromium() as browser:
        PICTURE.write_bytes(picture(browser, services.urls[0]))
        ANIMATION.write_bytes(animation(browser, services.urls[0]))
    for file in (PICTURE, ANIMATION):
        print(f"{file.relative_to(DOCS.parent)}: {file.stat().st_size / 1000:.0f} kB")


def picture(browser: Browser, url: str) -> bytes:
    """The whole page while it runs, as PNG."""
    page = _page(browser, url, 1280, 800)
    page.locator("#pace").select_option("300")
    page.locator("#start").click()
    page.wait_for_function(AT, arg=MOMENT, timeout=MILLISECONDS)
    image = Image.open(io.BytesIO(page.screenshot()))
    page.context.close()
    data = io.BytesIO()
    _few_colours(image).save(data, "PNG", optimize=True)
    return data.getvalue()


def animation(browser: Browser, url: str) -> bytes:
    """The passes of a block, from masks to text, as GIF that goes round."""
    page = _page(browser, url, 1000, 780)
    page.locator("#pace").select_option("0")
    # Surer, so that the block takes more steps.
    page.locator("#confidence_threshold").fill("0.95")
    page.locator("#start").click()
    expect(page.locator("#replay")).to_be_enabled(timeout=MILLISECONDS)
    images = [_few_colours(image) for image in _passes(page)]
    page.context.close()
    times = [FRAME] * (len(images) - 1) + [LAST]
    data = io.BytesIO()
    images[0].save(
        data, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0, optimize=True
    )
    return data.getvalue()


def _page(browser: Browser, url: str, width: int, height: int) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": height}, device_scale_factor=SCALE
    )
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#model")).not_to_be_empty()
    page.locator("#seed").fill("7")
    return page


def _passes(page: Page) -> list[Image.Image]:
    """The column after each pass of the block, by its replay."""
    slider = page.locator("#replay")
    progress = page.locator("#denoised [data-part=progress]")
    slider.focus()
    images: list[Image.Image] = []
    page.keyboard.press("Home")
    for _ in range(int(slider.get_attribute("max") or 0)):
        if progress.inner_text().startswith(BLOCK):
            images.append(Image.open(io.BytesIO(page.locator("#denoised").screenshot())))
        page.keyboard.press("ArrowRight")
    return images


def _few_colours(image: Image.Image) -> Image.Image:
    return image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
