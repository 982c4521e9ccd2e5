"""Prediction with a base model that edits: which images it takes, what size it makes, and what a LoRA adds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_utils.config import SampleInputs, TrainConfig, from_inputs
from lora_utils.errors import UserError
from lora_utils.sampling.predictor import ModelPredictor
from tests.editing.material import write_pairs
from tests.helpers import SHORT_RUN, train_archive

CONFIG = TrainConfig(
    steps=3, rank=4, learning_rate=1e-2, resolution="64", control_resolution="auto", seed=3, quantization="none",
    caption_dropout=0.0,
)  # fmt: skip
SMALL = {"prompt": "make it red", "steps": 2, "width": 64, "height": 64, "seed": 1, "output_format": "png"}


def predictor_of(folder: Path, monkeypatch) -> ModelPredictor:
    monkeypatch.setenv("BASE_MODEL", str(folder))
    return ModelPredictor()


@pytest.fixture(scope="module")
def weights(edit_models, tmp_path_factory):
    """A LoRA with a token, trained on pairs at the target's area."""
    folder = tmp_path_factory.mktemp("weights")
    archive = write_pairs(folder / "pairs.zip", caption="make it like <zwx>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(edit_models["2511"]))
        return train_archive(replace(CONFIG, train_placeholder_token=True), archive, folder / "weights.zip")


@pytest.fixture(scope="module")
def editor(edit_models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(edit_models["2511"]))
        model = ModelPredictor()
        yield model
        model.close()


@pytest.fixture
def photos(to_edit, tmp_path):
    """Files of 96x64, 48x80 and 50x50 pixels."""
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, to_edit, strict=True):
        image.save(path)
    return paths


def sampled(model: ModelPredictor, **given) -> list[Image.Image]:
    done = model.predict(from_inputs(SampleInputs, {**SMALL, "control_resolution": "64", **given}))
    return [Image.open(path).convert("RGB") for path in done.paths]


def test_each_image_counts_and_so_does_their_order(editor, photos):
    first, second, third = photos
    made = [
        sampled(editor, image=first),
        sampled(editor, image=second),
        sampled(editor, image=first, image_2=second),
        sampled(editor, image=second, image_2=first),
        sampled(editor, image=first, image_2=second, image_3=third),
    ]
    assert len({images[0].tobytes() for images in made}) == len(made)
    assert sampled(editor, image=first)[0].tobytes() == made[0][0].tobytes(), "and nothing of a call is left"


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"width": 80, "height": 64}, (80, 64)),
        ({"megapixels": 0.05}, (288, 192)),  # of the aspect ratio 3:2, multiples of 32
        ({"megapixels": 0.05, "image_2": 1}, (160, 288)),  # the last image's
        ({"megapixels": 0.05, "aspect_ratio": "16:9"}, (288, 192)),
    ],
)
def test_the_size_is_the_one_asked_for_else_the_last_images(given, size, editor, photos):
    given = {name: photos[value] if name == "image_2" else value for name, value in given.items()}
    asked = {"width": None, "height": None, **given}
    assert sampled(editor, image=photos[0], **asked)[0].size == size


def test_several_outputs_are_what_their_seeds_give_alone(editor, photos):
    together = sampled(editor, image=photos[0], num_outputs=3)
    alone = [sampled(editor, image=photos[0], seed=1 + index)[0] for index in range(3)]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("2511", {}, "the base model edits images, and there is none; give image"),
        ("2511", {"image": 0, "image_3": 1}, "image_3 is given without image_2"),
        ("Edit", {"image": 0, "image_2": 1}, "image_2 is one image too many: the base model edits 1 at once"),
        ("2511", {"image": "no.png"}, "there is no file"),
    ],
)
def test_images_that_cannot_be_edited_are_refused(kind, given, message, edit_models, photos, monkeypatch):
    model = predictor_of(edit_models[kind], monkeypatch)
    files = {name: photos[value] if isinstance(value, int) else Path(value) for name, value in given.items()}
    with pytest.raises(UserError, match=message):
        sampled(model, **files)
    assert sampled(model, image=photos[0]), "and the next call works"
    model.close()


def test_a_text_to_image_model_refuses_images_to_edit_and_starts_from_image_as_before(
    random_model, photos, monkeypatch
):
    model = predictor_of(random_model, monkeypatch)
    with pytest.raises(UserError, match="image_2 is an image to edit, and the base model makes images from text"):
        sampled(model, image=photos[0], image_2=photos[1])
    assert sampled(model, image=photos[0], strength=0.5)[0].size == (64, 64)
    model.close()


def test_a_mask_keeps_what_is_black_bit_for_bit(editor, photos, tmp_path):
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (0, 0, 48, 64))
    mask.save(tmp_path / "mask.png")
    given = {"image": photos[0], "mask": tmp_path / "mask.png", "width": 96, "height": 64}
    (made,) = sampled(editor, **given)
    original = Image.open(photos[0])
    assert np.array_equal(np.asarray(made)[:, 56:], np.asarray(original)[:, 56:])
    assert not np.array_equal(np.asarray(made)[:, :40], np.asarray(original)[:, :40])


def test_a_prompt_with_the_marks_of_images_is_refused(editor, photos):
    with pytest.raises(UserError, match="which marks images for the model"):
        sampled(editor, image=photos[0], prompt="make <|image_pad|> red")


def test_a_lora_and_its_token_edit_and_leave_no_trace(editor, photos, weights):
    before = sampled(editor, image=photos[0])[0].tobytes()
    prompt = "make it like <zwx>"
    plain = sampled(editor, image=photos[0], prompt=prompt)[0].tobytes()
    taught = sampled(editor, image=photos[0], prompt=prompt, replicate_weights=str(weights))[0].tobytes()
    assert taught != plain
    assert sampled(editor, image=photos[0])[0].tobytes() == before
    none = sampled(editor, image=photos[0], replicate_weights=str(weights), lora_scale=0)[0].tobytes()
    assert none == before


def test_images_have_the_area_that_the_lora_was_trained_with(editor, photos, weights, monkeypatch):
    seen = []
    encode = editor.sample.__func__.__globals__["load_controls"]

    def watched(*given):
        size, controls = encode(*given)
        seen.append([str(own) for own in controls.latents.sizes])
        return size, controls

    monkeypatch.setattr("lora_utils.sampling.predictor.load_controls", watched)
    sampled(editor, image=photos[2], control_resolution="", replicate_weights=str(weights))
    sampled(editor, image=photos[2], control_resolution="128", replicate_weights=str(weights))
    assert seen == [["64x64"], ["128x128"]], "auto: that of what is made; else what is asked for"


def test_go_fast_reuses_steps_and_several_loras_are_applied(editor, photos, weights, caplog):
    given = {"image": photos[0], "replicate_weights": str(weights), "steps": 8}
    alone, with_more = (sampled(editor, **given, **more)[0] for more in ({}, {"extra_lora": f"{weights} --scale 0.5"}))
    assert alone.tobytes() != with_more.tobytes()
    assert "go_fast" not in caplog.text
    assert sampled(editor, **given, go_fast=True)[0].size == (64, 64)
    assert "go_fast: steps that change little reuse earlier work" in caplog.text


def test_a_lora_of_the_other_kind_of_model_is_applied_with_a_warning(
    editor, photos, random_model, archive, weights, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        patch.setenv("BASE_MODEL", str(random_model))
        other = train_archive(replace(SHORT_RUN, train_placeholder_token=False), archive, tmp_path / "other.zip")
    sampled(editor, image=photos[0], replicate_weights=str(other))
    assert "was trained on a model that makes images from text, and the base model edits images" in caplog.text
    model = predictor_of(random_model, monkeypatch)
    sampled(model, replicate_weights=str(weights))
    assert "was trained on a model that edits images, and the base model makes images from text" in caplog.text
    model.close()


def test_metrics_and_embedded_settings_are_those_of_any_prediction(editor, photos):
    done = editor.predict(from_inputs(SampleInputs, {**SMALL, "image": photos[0], "control_resolution": "64"}))
    assert done.metrics["image_output_count"] == 1
    assert done.metrics["encode_s"] > 0
    with torch.no_grad(), Image.open(done.paths[0]) as image:
        assert "make it red" in str(image.info)
