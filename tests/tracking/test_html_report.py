"""report.html: one file that needs no other, opened in a real Chromium."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from lora_utils.config import RunOptions, SampleRequest
from lora_utils.tracking import contact_sheet
from lora_utils.tracking.html_report import REPORT_FILE, RunSummary, smoothed, write_report
from lora_utils.tracking.metrics import METRICS_FILE
from lora_utils.training.previews import preview_rows
from tests.helpers import PREVIEW_PROMPTS, SHORT_RUN

SUMMARY = RunSummary("Qwen-Image", {"rank": 4, "steps": 9}, {"rank": 4}, ["dataset: 2 images"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium: `apt-get install chromium`."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Any]:
    """Open a run's report. -> the page; what it complains of or asks the network for fails the test."""
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or complaints.append(request.url)
    )

    def load(folder: Path) -> Page:
        page.goto((folder / REPORT_FILE).as_uri())
        page.wait_for_load_state("load")
        return page

    yield load
    page.close()
    assert complaints == []


def curves_of(page: Page) -> dict[str, list[str]]:
    """The charts that Bokeh has drawn, with the names of their curves."""
    page.wait_for_function("window.Bokeh && Bokeh.documents.length && document.querySelectorAll('.bk-Figure').length")
    return page.evaluate(
        """() => Object.fromEntries(Bokeh.documents[0].roots().map(root => [
            root.title.text, root.right.flatMap(legend => legend.items.map(item => item.label.value))]))"""
    )


def write_metrics(folder: Path, steps: int) -> None:
    lines = [
        {"step": step, "loss": 2 / step, "class_loss": None, "learning_rate": 1e-4, "grad_norm": 1.0, "bands": {}}
        for step in range(1, steps + 1)
    ]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_runs_report_opens_with_its_curves_previews_settings_and_dataset(train_run, random_model, opened, tmp_path):
    config = replace(SHORT_RUN, validation_share=0.2, default_caption="<script>alert(1)</script> <zwx>")
    _, folder = train_run(config=config, sample_prompts=PREVIEW_PROMPTS, sample_steps=2, sample_every=4)
    page = opened(folder)
    curves = curves_of(page)
    assert curves["Loss, smoothed"] == ["each step", "training"]
    assert curves["Loss on images held out, at fixed noise"] == ["held out"]
    assert set(curves) >= {"Loss by level of noise, smoothed", "Learning rate", "Images by bucket"}
    text = page.inner_text("body")
    for expected in ("bucket 64x64: 10", "GB of", "rank\t4", "at their defaults", "<zwx>"):
        assert expected in text, expected
    assert text.index("rank\t4") < text.index("at their defaults"), "what was chosen comes first"
    whole = page.content()
    for path in (str(tmp_path), str(random_model), str(Path.home())):
        assert path not in whole, "no path of the machine"
    links = "() => [...document.querySelectorAll('[src],[href]')].map(each => each.src || each.href)"
    assert all(link.startswith("data:") for link in page.evaluate(links))


def test_the_slider_moves_over_the_steps(opened, tmp_path):
    for step in (0, 4, 9):
        contact_sheet.save_sheet(tmp_path, step, Image.new("RGB", (64, 64), (step * 20, 0, 0)))
    write_metrics(tmp_path, 9)
    (tmp_path / "weights-step-000004.zip").write_bytes(b"")
    write_report(tmp_path, SUMMARY)
    page = opened(tmp_path)

    def shown() -> tuple[str, int]:
        return page.inner_text("#shown"), page.locator(".sheet:visible").count()

    assert shown() == ("after step 9", 1)
    first = page.locator(".sheet:visible").get_attribute("src")
    page.focus("#slider")
    page.keyboard.press("ArrowLeft")
    assert shown() == ("after step 4, weights-step-000004.zip", 1), "and with the file that it can be had from"
    page.keyboard.press("Home")
    assert shown() == ("after step 0", 1)
    assert page.locator(".sheet:visible").get_attribute("src") != first
    page.reload()
    assert page.input_value("#slider") == "0", "a reload leaves it where it was put"


def test_a_run_that_is_on_is_shown_growing_and_one_that_has_ended_stands_still(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_utils.tracking.html_report.RELOAD_S", 4)
    write_metrics(tmp_path, 3)
    write_report(tmp_path, replace(SUMMARY, progress="running: after step 3 of 9"))
    page = opened(tmp_path)
    assert "after step 3 of 9" in page.inner_text("body")
    last = "Bokeh.documents.length && Math.max(...Bokeh.documents[0].roots()[0].renderers[0].data_source.data.x)"
    curves_of(page)
    assert page.evaluate(last) == 3
    write_metrics(tmp_path, 9)
    write_report(tmp_path, SUMMARY)
    page.wait_for_function(f"window.Bokeh && {last} == 9", timeout=20_000)
    assert "running" not in page.inner_text("body")
    assert "location.reload" not in page.content()


def test_a_legend_stands_beside_the_curves_and_the_learning_rates_axis_begins_at_zero(opened, tmp_path):
    write_metrics(tmp_path, 9)
    write_report(tmp_path, SUMMARY)
    page = opened(tmp_path)
    curves_of(page)
    places = page.evaluate("() => Bokeh.documents[0].roots().map(root => root.right.length)")
    assert set(places) == {1}
    start = "() => Bokeh.documents[0].roots().find(root => root.title.text == 'Learning rate').y_range.start"
    assert page.evaluate(start) == 0


def test_a_run_without_a_step_or_a_preview_has_a_report_too(opened, tmp_path):
    write_report(tmp_path, SUMMARY)
    assert "dataset: 2 images" in opened(tmp_path).inner_text("body")


def test_a_smoothed_curve_keeps_its_mean_and_its_ends_shape():
    curve = [(float(step), float(step % 2)) for step in range(100)]
    found = smoothed(curve)
    assert len(found) == 25
    assert {value for _, value in found} == {0.5}
    assert smoothed([]) == []


def test_requests_are_predicts_own():
    ((request,),) = preview_rows(SHORT_RUN, RunOptions(run_dir="x", sample_prompts="a"))
    assert request == SampleRequest("a", steps=20, width=64, height=64, seed=3)


def test_the_metrics_are_json(train_run):
    _, folder = train_run()
    for line in (folder / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
