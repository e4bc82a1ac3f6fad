"""The demo in Debian's chromium, on the embedded model: draw, run, look, stop. Leaves screenshots in outputs/."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pages
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from diffgraft.app.demo import improve, server
from diffgraft.app.demo.studio import Job, Studio
from diffgraft.app.metadata import read_settings

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
SHOTS = Path(__file__).parents[1] / "outputs" / "screenshots"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 240_000
expect.set_options(timeout=60_000)  # five seconds are too few for a page's first moments on a busy machine
MOON = [(0.74, 0.16), (0.5, 0.16), (0.42, 0.28), (0.28, 0.42), (0.2, 0.55), (0.26, 0.7), (0.4, 0.74), (0.66, 0.7)]
WIDTHS = {"wide": 1280, "narrow": 390}


@pytest.fixture(scope="module")
def studio():
    return Studio()


@pytest.fixture(scope="module")
def address(studio, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        blocks = server.serve(studio, prevent_thread_lock=True)
        yield blocks.local_url
        pages.close(blocks)


@pytest.fixture(scope="module")
def chromium():
    found = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=list(WIDTHS))
def page(request, chromium, address):
    """The page at one width; it may ask nobody but our server, and must not break."""
    tab = chromium.new_page(viewport={"width": WIDTHS[request.param], "height": 900})
    tab.set_default_timeout(PATIENCE)
    hosts, broken = set(), []
    tab.on("request", lambda asked: hosts.add(urlsplit(asked.url).hostname))
    tab.on("pageerror", lambda error: broken.append(str(error)))
    tab.goto(address)
    tab.name = request.param
    yield tab
    assert hosts - {None, ""} == {"127.0.0.1"} and not broken
    tab.close()


@pytest.fixture
def seen(monkeypatch):
    """Runs stand still in their third step until this is set: a fast run on a busy machine is over before its page
    has shown that it goes on.
    """
    event, before = threading.Event(), Job.before

    def wait(job, *given):
        before(job, *given)
        if job._done == 3:
            event.wait(PATIENCE / 1000)

    monkeypatch.setattr(Job, "before", wait)
    yield event
    event.set()


def open_tab(page, title):
    page.get_by_role("tab", name=title).click()


def press(page, label):
    page.locator("button.lg", has_text=label).locator("visible=true").click()


def seed_used(page):
    return page.get_by_label("Seed used").locator("visible=true")


def drawer(page, seed=7, steps=8):
    """Open the settings, choose few steps and a seed."""
    page.get_by_role("button", name="Seed and steps").locator("visible=true").click()
    for box, value in (
        (page.get_by_label("Seed", exact=True), seed),
        (page.get_by_role("spinbutton", name="number input for Steps"), steps),
    ):
        field = box.locator("visible=true")
        field.element_handle().wait_for_element_state("stable")  # what is typed while the drawer slides can be lost
        field.fill(str(value))
        field.press("Tab")
        expect(field).to_have_value(str(value))


def along(page, box, points):
    """Drag the brush along points, given as shares of the picture, which stands in the middle of the canvas."""
    side = min(box["width"], box["height"]) * 0.84
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    for number, (x, y) in enumerate(points):
        page.mouse.move(left + x * side, top + y * side, steps=6)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def shot(page, name):
    page.wait_for_timeout(200)  # what fades in
    page.screenshot(path=SHOTS / f"{name}-{page.name}.png", full_page=True)


def comes_free(studio):
    """Whether the model is given back soon: within a call of the denoiser, and what a busy machine adds."""
    return pages.comes_true(lambda: not studio._turn.locked() and not studio._stops, 15)


def told_to_stop(studio):
    """Whether what runs was told to stop."""
    return any(event.is_set() for events in list(studio._stops.values()) for event in events)


def fits(page):
    """Nothing sticks out sideways."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")


def pictures_arrive(page, count=2):
    """Wait until so many pictures of the open tab are there."""
    page.wait_for_function(f"""() => [...document.querySelectorAll("img")]
        .filter(one => one.offsetParent && one.naturalWidth).length >= {count}""")


def test_every_tab_opens_with_a_result_and_the_first_click_paints(page):
    gallery = page.get_by_role("tabpanel").locator("visible=true").locator(".grid-wrap")
    expect(gallery.nth(0).locator("img")).to_have_count(2)
    expect(gallery.nth(1).locator("img")).to_have_count(3)
    expect(gallery.nth(1).get_by_text("house", exact=True)).to_be_visible()
    shot(page, "opened")
    drawer(page, seed=7, steps=4)
    press(page, "Paint")
    expect(seed_used(page)).to_have_value("7", timeout=PATIENCE)
    expect(gallery.nth(0).locator("img")).to_have_count(2)
    expect(gallery.nth(0).get_by_text("plain, seed 7")).to_be_visible()
    for title in server.TABS:
        open_tab(page, title)
        expect(seed_used(page)).not_to_have_value("")
        pictures_arrive(page)
    open_tab(page, "Generate")
    assert fits(page)
    shot(page, "generate")


def blob(page, number, x, y):
    """Paint an outline in a colour of the brush around a place, given as shares of the canvas of "Place them"."""
    canvas = page.locator(".dg-canvas")
    if not canvas.locator("button.color").count():
        canvas.get_by_label("Color", exact=True).click()
    canvas.locator("button.color").nth(number).click()
    box = canvas.locator("canvas").first.bounding_box()
    side = min(box["width"], box["height"]) * 0.84
    left, top = box["x"] + (box["width"] - side) / 2 + x * side, box["y"] + (box["height"] - side) / 2 + y * side
    page.mouse.move(left - 20, top - 20)
    page.mouse.down()
    for right, down in ((20, -20), (20, 20), (-20, 20), (-20, -20)):
        page.mouse.move(left + right, top + down, steps=4)
    page.mouse.up()


@pytest.mark.parametrize("page", ["wide"], indirect=True)
def test_places_are_painted_and_a_picture_goes_on_and_gives_its_settings_back(page, seen, tmp_path):
    page.get_by_role("button", name="Place them").click()
    canvas = page.locator(".dg-canvas")
    canvas.get_by_label("Brush", exact=True).click()
    canvas.scroll_into_view_if_needed()
    for number, (x, y) in enumerate([(0.75, 0.3), (0.5, 0.8), (0.25, 0.3)]):
        blob(page, number, x, y)
    drawer(page, seed=7)
    press(page, "Paint")
    expect(page.locator(".dg-look img")).to_be_visible(timeout=PATIENCE)  # a rough look while it is made
    expect(page.locator(".dg-look").first).to_contain_text("guessed from the latents")
    seen.set()
    expect(seed_used(page)).to_have_value("7", timeout=PATIENCE)
    strip = page.locator(".dg-strip img")
    expect(strip).to_have_count(2)
    expect(page.locator(".dg-look")).to_have_count(0)
    made = tmp_path / "made.png"
    made.write_bytes(page.request.get(strip.first.get_attribute("src")).body())
    settings = read_settings(made)
    assert settings["page"]["drawing"] and settings["plugins"][0]["layout"] is not None
    shot(page, "placed")
    page.get_by_role("button", name="Erase in it").click()
    expect(page.get_by_role("tab", name="Erase")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_label("What is there instead")).to_have_value("")
    page.get_by_role("button", name="Restyle it").click()
    expect(page.get_by_role("tab", name="Style")).to_have_attribute("aria-selected", "true")
    pictures_arrive(page, 4)
    shot(page, "restyle")
    drop_on_the_page(page, made)
    expect(page.get_by_role("tab", name="Generate")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("textbox", name="Prompt", exact=True).first).to_have_value(settings["prompt"])
    expect(page.get_by_label("Seed", exact=True).first).to_have_value("7")
    shot(page, "restored")


def drop_on_the_page(page, file):
    """Drop a PNG where nothing takes files."""
    page.evaluate(
        """bytes => {
            const list = new DataTransfer();
            list.items.add(new File([new Uint8Array(bytes)], "made.png", { type: "image/png" }));
            const drop = new DragEvent("drop", { dataTransfer: list, bubbles: true, cancelable: true });
            document.querySelector(".dg-head").dispatchEvent(drop);
        }""",
        list(file.read_bytes()),
    )


@pytest.mark.parametrize("page", ["narrow"], indirect=True)
def test_eight_seeds_are_tried_and_the_menu_greys_out_what_a_model_cannot_do(page, tmp_path, monkeypatch):
    monkeypatch.setattr(improve, "UPDATES", 2)
    drawer(page, seed=3, steps=2)
    press(page, "Try 8 seeds")
    thumbs = page.locator(".dg-seeds .grid-wrap img")
    expect(thumbs).to_have_count(8, timeout=PATIENCE)
    shot(page, "seeds")
    thumbs.nth(1).click()
    caption = page.locator(".dg-seeds .caption-label").nth(1).inner_text()
    expect(seed_used(page)).to_have_value(caption.split()[-1], timeout=PATIENCE)
    press(page, "Improve this seed")
    expect(page.locator(".dg-curve svg")).to_be_visible(timeout=PATIENCE)
    shot(page, "improved")
    open_tab(page, "Compose")
    drawers = page.locator(".dg-form > button.label-wrap, .dg-form > * > button.label-wrap").locator("visible=true")
    page.get_by_role("button", name="Down").locator("visible=true").first.focus()
    page.keyboard.press("Enter")
    expect(drawers.first).to_contain_text("NegativeAway")
    typed = page.locator(".dg-form textarea").locator("visible=true").first
    typed.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("red")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="The same as JSON").click()
    expect(page.locator(".cm-content").locator("visible=true")).to_contain_text('"negative": "red"')
    shot(page, "forms")
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "WanTransformer3DModel"]}')
    menu = page.get_by_label("Model", exact=True)
    menu.fill(str(tmp_path))
    menu.press("Enter")
    expect(page.get_by_text("this family makes films").locator("visible=true").first).to_be_visible()
    expect(page.locator(".dg-absent")).to_contain_text(["Place them: not", "AttentionSegregation: not on this model"])
    chips = page.locator(".dg-techniques .token")
    expect(chips.filter(has_text="AttentionSegregation")).to_have_css("opacity", "0.55")
    expect(chips.filter(has_text="NegativeAway")).to_have_css("opacity", "1")
    open_tab(page, "Generate")
    expect(page.get_by_label("Never draw")).to_be_disabled()
    open_tab(page, "Erase")
    expect(page.get_by_role("button", name="Erase", exact=True).locator("visible=true").last).to_be_disabled()
    shot(page, "greyed")
    assert fits(page)


def test_a_stroke_is_drawn_and_what_it_covers_is_erased(page):
    open_tab(page, "Erase")
    canvas = page.locator(".pixi-target canvas, canvas").locator("visible=true").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)
    box = canvas.bounding_box()
    assert box["width"] % 2 == 0  # of an odd width white shows beside the picture
    along(page, box, MOON)
    drawer(page, seed=7, steps=4)
    shot(page, "erase-drawn")
    press(page, "Erase")
    gallery = page.get_by_role("tabpanel").locator("visible=true").locator(".grid-wrap")
    expect(gallery.get_by_text("seed 7", exact=True)).to_be_visible(timeout=PATIENCE)
    captions = gallery.locator(".caption-label").all_inner_texts()
    assert sorted(captions) == ["seed 7", "seed 8", "seed 9"]
    assert seed_used(page).input_value() == captions[0].removeprefix("seed ")  # the best one comes first
    gallery.locator("img").nth(1).click()
    expect(seed_used(page)).to_have_value(captions[1].removeprefix("seed "))
    assert fits(page)
    shot(page, "erase")


@pytest.mark.parametrize("page", ["narrow"], indirect=True)
def test_style_and_compose_run(page):
    open_tab(page, "Style")
    drawer(page, steps=3)
    press(page, "Repaint")
    expect(seed_used(page)).to_have_value("7", timeout=PATIENCE)
    assert fits(page)
    shot(page, "style")
    open_tab(page, "Compose")
    drawer(page, steps=3)
    press(page, "Paint")
    expect(seed_used(page)).to_have_value("7", timeout=PATIENCE)
    expect(page.get_by_role("gridcell", name="NegativeAway").first).to_be_visible(timeout=PATIENCE)
    assert fits(page)
    shot(page, "compose")


@pytest.mark.parametrize("page", ["wide"], indirect=True)
def test_stop_ends_the_run_and_the_page_goes_on(page, studio, seen):
    drawer(page, steps=100)
    press(page, "Paint")
    expect(page.get_by_text("picture 1 of 1").first).to_be_visible(timeout=PATIENCE)
    shot(page, "progress")
    press(page, "Stop")
    expect(page.get_by_text("Stopped.").first).to_be_visible(timeout=PATIENCE)
    seen.set()
    page.wait_for_function("() => !document.querySelector('.progress-text, .progress-level')")
    assert comes_free(studio)
    page.get_by_role("spinbutton", name="number input for Steps").locator("visible=true").fill("2")
    page.get_by_label("Seed", exact=True).locator("visible=true").fill("9")
    press(page, "Paint")
    expect(seed_used(page)).to_have_value("9", timeout=PATIENCE)


def test_closing_the_tab_stops_its_run(chromium, address, studio, seen):
    leaving = chromium.new_page()
    leaving.goto(address)
    drawer(leaving, steps=100)
    press(leaving, "Paint")
    expect(leaving.get_by_text("picture 1 of 1").first).to_be_visible(timeout=PATIENCE)
    leaving.close()
    assert pages.comes_true(lambda: told_to_stop(studio), 60)
    seen.set()
    assert comes_free(studio)


GRADIOS_OWN = 'aria-label="Empty value"'
"""An empty gallery or slider of Gradio 6.31 is a div with a label and no role."""


def test_axe_finds_nothing_serious(page):
    page.emulate_media(color_scheme="light" if page.name == "wide" else "dark")
    page.reload()
    found = set()
    for title in server.TABS:
        open_tab(page, title)
        lids = page.locator("button.label-wrap:not(.open)").locator("visible=true")
        while lids.count():
            lids.first.click()
        page.wait_for_timeout(500)  # half-open drawers are half-transparent
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found |= {(violation["id"], node["html"]) for node in violation["nodes"]}
    assert not {(name, html) for name, html in found if GRADIOS_OWN not in html}


@pytest.mark.parametrize("page", ["narrow"], indirect=True)
def test_what_goes_wrong_is_said_in_words(page):
    page.get_by_label("Concepts that must all appear").fill("porcupine <b>x</b>")
    press(page, "Paint")
    expect(page.get_by_text("is not in the prompt").first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("porcupine <b>x</b>").first).to_be_visible()
    open_tab(page, "One step")
    shot(page, "one-step")
