"""The page of uvc report --html in headless Chromium, offline: no error, its pictures, no sideways scroll."""

import shutil

import pytest
from test_page import HOSTILE, folder_of

from uvc.app.page import write_page

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright, and a Chromium")
SYSTEMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Sizes of text on the screen that are too small to read, in pixels.
SMALLEST = """() => Math.min(...[...document.querySelectorAll('svg text')].map(
    t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width
         / t.ownerSVGElement.viewBox.baseVal.width))"""
# Texts of one picture that lie over one another, by more than a pixel each way.
OVERLAPS = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
        Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
        Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3).map(([b]) => a + ' / ' + b)); })"""
OUTSIDE = """() => [...document.querySelectorAll('svg text')].filter(t => {
    const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1; }).map(t => t.textContent)"""


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the system's, or playwright's own."""
    path = next(filter(None, map(shutil.which, SYSTEMS)), None)
    with playwright.sync_playwright() as session:
        try:
            opened = session.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_and_readable_offline(width, scheme, browser, tmp_path):
    folders = [folder_of(tmp_path / "a"), folder_of(tmp_path / ("long" * 30), model=HOSTILE, seed=43)]
    write_page(folders, tmp_path / "page.html")
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [page.url]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [picture.bounding_box() for picture in page.locator("svg").all()]
    assert all(box["x"] + box["width"] <= width for box in boxes)
    assert len(boxes) == 2 + 2 * 6
    assert all(box["width"] > 250 and box["height"] > 40 for box in boxes)
    assert page.evaluate(SMALLEST) > 8.0
    assert page.evaluate(OVERLAPS) == [] and page.evaluate(OUTSIDE) == []
    context.close()
