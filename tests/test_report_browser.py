"""The report's page in a real browser, without a network: no complaints, sorting, values, dark, print."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from report_runs import STAGES, make_stream_run

from jaxcl.report import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed (extra: dev)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("runs"), []
    for method, keep in (("finetune", 0.4), ("replay", 0.9), ("ewc", 0.6)):
        out.append(make_stream_run(folder / method, {method: {}}, keep=keep, general=("mmlu", "bbh")))
    return [*out, make_stream_run(folder / "part", {"si": {}}, done=1, general=("mmlu", "bbh"))]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def opened(runs, browser, tmp_path_factory):
    """(the page, what the browser complained of, addresses that it asked for)."""
    file = report(runs, tmp_path_factory.mktemp("out"))
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
    page, complaints, asked = context.new_page(), [], []
    page.on("console", lambda m: complaints.append(m.text))
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(file.as_uri())
    yield page, complaints, asked, file.as_uri()
    context.close()


def test_the_page_is_whole_without_a_network_and_the_browser_has_no_complaints(opened):
    page, complaints, asked, address = opened
    page.wait_for_timeout(100)
    assert complaints == [] and asked == [address]
    foreign = """() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';
                         document.body.append(s); return window.ran ?? null; }"""
    assert page.evaluate(foreign) is None  # the policy holds: a script that is not ours does not run
    page.wait_for_timeout(50)
    assert len(complaints) == 1 and "Content Security Policy" in complaints[0]


def test_shown_values_are_those_of_the_matrix(opened, runs):
    page, *_ = opened
    for run in runs:
        found = json.loads((run / "matrix.json").read_text())
        table = page.locator("table.heat", has=page.locator(f"caption:text-matches('^Task matrix of {run.name}')"))
        rows = table.locator("tbody tr")
        wanted = [found["row0"], *found["rows"]]
        assert rows.count() == len(wanted)
        for k, row in enumerate(wanted):
            cells = rows.nth(k).locator("td")
            assert cells.all_inner_texts() == [f"{v:.3f}" for v in row[: len(STAGES)]]
            title = cells.nth(1).get_attribute("title")
            assert title.startswith(("before training" if k == 0 else f"after {STAGES[k - 1]}") + ", beta: ")
            value, low, high = map(float, re.findall(r"[\d.]+", title.split(": ")[1].replace("95%", "")))
            assert value == pytest.approx(row[1], abs=1e-6) and low <= value <= high


def test_sorting(opened, runs):
    page, *_ = opened
    table = page.locator("#summary table")
    head = table.locator("thead th", has_text=re.compile("^aa$"))
    finals = {r.name: json.loads((r / "matrix.json").read_text())["rows"][-1][:3] for r in runs[:3]}
    mean = {name: sum(v) / 3 for name, v in finals.items()}
    mean["part"] = json.loads((runs[3] / "matrix.json").read_text())["rows"][0][0]  # of the one task seen

    def order():
        return [re.split(r"\s", t)[0] for t in table.locator("tbody th").all_inner_texts()]

    assert order() == ["finetune", "replay", "ewc", "part"]
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending" and order() == sorted(mean, key=mean.get)
    head.locator("button").press("Enter")  # by the keyboard as well
    assert head.get_attribute("aria-sort") == "descending" and order() == sorted(mean, key=mean.get, reverse=True)
    falls = table.locator("thead th", has_text=re.compile("^fgt_max$"))
    falls.locator("button").click()
    assert head.get_attribute("aria-sort") == "none" and order()[-1] == "part"  # undefined there: comes last, both ways
    falls.locator("button").click()
    assert order()[-1] == "part"
    table.locator("thead th", has_text="methods").locator("button").click()
    assert order() == ["ewc", "finetune", "replay", "part"]


def paint(page, selector, what):
    return page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")


def brightness(page, selector, what):
    """0..255 of a colour as the browser paints it, whatever notation it has."""
    colour = paint(page, selector, what)
    return page.evaluate(
        """c => { const x = document.createElement('canvas').getContext('2d'); x.fillStyle = c; x.fillRect(0, 0, 1, 1);
                  const [r, g, b] = x.getImageData(0, 0, 1, 1).data; return 0.299 * r + 0.587 * g + 0.114 * b; }""",
        colour,
    )


def test_dark_and_print(opened):
    page, *_ = opened
    seen = {}
    for name, how in {
        "light": {"media": "screen", "color_scheme": "light"},
        "dark": {"media": "screen", "color_scheme": "dark"},
        "print": {"media": "print", "color_scheme": "dark"},
    }.items():
        page.emulate_media(**how)
        seen[name] = {
            "paper": brightness(page, "body", "backgroundColor"),
            "ink": brightness(page, "body", "color"),
            "line": paint(page, "#tasks path.line", "stroke"),
            "good": brightness(page, "table.heat td.own", "backgroundColor"),
            "on good": brightness(page, "table.heat td.own", "color"),
        }
    light, dark, paper = seen["light"], seen["dark"], seen["print"]
    assert light["paper"] > 240 > 60 > light["ink"] and dark["ink"] > 200 > 60 > dark["paper"]
    assert paper["paper"] > 240 and paper["ink"] < 20 and paper["line"] == light["line"] != dark["line"]
    assert light["good"] < 120 < light["on good"] and dark["good"] > 120 > dark["on good"]
    assert not page.locator("nav").is_visible()  # nothing to click on paper
    page.emulate_media(media="screen", color_scheme="light")
    assert page.pdf(format="A4").startswith(b"%PDF-")


def test_curves_tell_their_values(opened, runs):
    page, *_ = opened
    rows = json.loads((runs[1] / "matrix.json").read_text())
    panel = page.locator("#tasks figure", has=page.locator("figcaption:text-is('beta (accuracy)')"))
    titles = panel.locator("circle title").evaluate_all("all => all.map(t => t.textContent)")
    mine = [float(t.split(": ")[1].split()[0]) for t in titles if t.startswith("replay, ")]
    assert mine == pytest.approx([r[1] for r in [rows["row0"], *rows["rows"]]], abs=1e-6)
    assert panel.locator("svg").get_attribute("role") == "img"


def test_nothing_runs_off_a_small_screen(opened):
    page, *_ = opened
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1200, "height": 900})
