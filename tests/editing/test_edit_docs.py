"""The lines of docs/editing.md run as they are written, on a small model that edits."""

import re
import shutil

from PIL import Image

from examples.demo import call
from lora_utils import constants
from predict import Predictor
from tests.editing.material import write_pairs
from tests.helpers import ROOT
from tests.integration.test_docs import EDITING, FAST_TRAINING, console_lines, given_inputs
from train import train


def test_the_lines_on_editing_train_on_pairs_and_edit_an_image(edit_models, tmp_path, monkeypatch):
    named, train_line, predict_line, demo_line = [line for page, line in console_lines() if page == EDITING]
    assert demo_line == "make demo-edit"
    assert re.search(r"^demo-edit:", (ROOT / "Makefile").read_text(), re.M)
    assert named == f"export BASE_MODEL={constants.EDIT_MODEL}"
    monkeypatch.setenv("BASE_MODEL", str(edit_models["2511"]))
    write_pairs(tmp_path / "pairs.zip")
    Image.new("RGB", (96, 64), "green").save(tmp_path / "photo.jpg")

    in_little = {**FAST_TRAINING, "control_resolution": "auto"}
    output = call(train, **{**given_inputs(train_line, tmp_path), **in_little})
    shutil.move(str(output.weights), tmp_path / "weights.zip")

    predictor = Predictor()
    predictor.setup()
    (path,) = call(predictor.predict, **{**given_inputs(predict_line, tmp_path), "megapixels": 0.05, "steps": 2})
    with Image.open(str(path)) as image:
        assert image.width > image.height, "it has the aspect ratio of the image that is edited"
