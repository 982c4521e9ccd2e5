"""The learning is real: what `make demo` trains draws the taught object, and other prompts stay as they were."""

import zipfile

import pytest
from PIL import Image

from examples import demo, evaluate


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


def test_an_archive_that_forgot_its_row_would_be_found_out(scores):
    learned, forgotten = scores[f"{demo.TOKEN} with the LoRA"], scores[f"{demo.TOKEN} with the LoRA but a fresh row"]
    assert forgotten.kind < learned.kind, f"{forgotten} against {learned}"
