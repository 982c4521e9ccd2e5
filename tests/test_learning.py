"""The learning is real: what `make demo` trains draws the taught object, and other prompts stay as they were."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from examples import demo, evaluate
from lora_utils import models
from lora_utils.weights import load_weights


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory, tiny_model):
    """The demo, run as a user runs it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("BASE_MODEL", str(tiny_model))
        demo.main()
    return folder / "out"


@pytest.fixture(scope="module")
def scores(demo_run, tiny_model):
    return evaluate.evaluate_weights(tiny_model, demo_run / "weights.zip", demo.OBJECT, demo.TOKEN, prompts=40)


def test_the_demo_leaves_an_archive_and_a_labelled_sheet(demo_run):
    with zipfile.ZipFile(demo_run / "weights.zip") as packed:
        assert packed.namelist() == ["lora/lora_weights.safetensors", "meta.json"]
    with Image.open(demo_run / "demo.png") as sheet:
        assert sheet.width > 600
        assert len(sheet.getcolors(1 << 24) or []) > 500


def test_the_token_draws_the_taught_object_on_backgrounds_it_was_never_shown_on(scores):
    taught = scores[f"{demo.TOKEN} with the LoRA"]
    assert taught.kind >= 0.75, str(taught)
    assert taught.background >= 0.75, str(taught)


def test_unrelated_prompts_still_score_as_the_base_does(scores):
    with_lora, base = scores["other prompts with the LoRA"], scores["other prompts, base model"]
    assert base.all_three >= 0.9, str(base)
    assert with_lora.all_three >= base.all_three - 0.15, str(with_lora)


def test_the_learned_row_is_part_of_what_is_drawn(demo_run, tiny_model):
    """A fresh row in its place gives other pictures: an archive that forgot the row would be found out.

    How much the row adds to the score is README's to say: little, in this small world.
    """
    components = models.load_components(tiny_model, models.default_place())
    learned = load_weights(demo_run / "weights.zip", components)
    forgotten = replace(learned, lora=replace(learned.lora, rows=evaluate.fresh_rows(learned)))
    prompt = [f"a photo of {demo.TOKEN} on a {demo.NEW[0]} background"]
    (one,), (other,) = (evaluate.sample_with(components, prompt, weights) for weights in (learned, forgotten))
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 30
