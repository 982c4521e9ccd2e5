"""report.html: one file that needs no other."""

import json
import re
from dataclasses import replace

import pytest

from lora_utils.config import RunOptions, SampleRequest
from lora_utils.tracking.html_report import REPORT_FILE, chart
from lora_utils.tracking.metrics import METRICS_FILE
from lora_utils.training.previews import preview_rows
from tests.helpers import PREVIEW_PROMPTS, SHORT_RUN


def test_the_report_is_one_file_that_needs_no_other(train_run, random_model):
    config = replace(SHORT_RUN, validation_share=0.2, default_caption="<script>alert(1)</script> <zwx>")
    _, folder = train_run(config=config, sample_prompts=PREVIEW_PROMPTS, sample_steps=2)
    page = (folder / REPORT_FILE).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    assert page.count('src="data:image/webp;base64,') == 2
    assert "<script" not in page
    assert "&lt;zwx&gt;" in page
    for told in (
        "Loss, smoothed",
        "held out",
        "level of noise",
        "<td>rank</td><td>4</td>",
        "bucket 64x64: 10",
        "GB of",
    ):
        assert told in page, told


def test_a_chart_shows_a_curve_from_its_first_step_to_its_last():
    drawn = chart("Loss", {"training": [(1, 4.0), (5, 3.0), (9, 2.0)]})
    (points,) = re.findall(r'points="([^"]+)"', drawn)
    xs, ys = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
    assert xs == (64.0, 407.0, 750.0)
    assert ys == (12.0, 112.0, 212.0), "the largest above"
    assert chart("Loss", {"training": []}) == ""
    assert "nan" not in chart("Flat", {"training": [(1, 2.0)]})


def test_requests_are_predicts_own():
    ((request,),) = preview_rows(SHORT_RUN, RunOptions(run_dir="x", sample_prompts="a"))
    assert request == SampleRequest("a", steps=20, width=64, height=64, seed=3)


def test_the_metrics_are_json(train_run):
    _, folder = train_run()
    for line in (folder / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
