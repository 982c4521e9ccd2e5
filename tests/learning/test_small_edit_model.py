"""The shipped small editing model: a normal diffusers folder, small, and it edits what it is shown."""

import json
from dataclasses import replace

import pytest
from transformers import Qwen2_5_VLForConditionalGeneration

from examples import demo_edit, edits, evaluate_edit, scorer, shapes, stock_edit
from examples.edits import Instruction
from examples.evaluate_edit import Asked, AskedEdit
from lora_utils import constants
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement

MODEL = evaluate_edit.MODEL


@pytest.fixture(scope="module")
def components():
    return load_components(MODEL, default_placement())


def test_the_folder_opens_with_the_true_classes_and_is_small():
    pipeline = stock_edit.load_pipeline(MODEL)
    assert type(pipeline).__name__ == "QwenImageEditPlusPipeline"
    assert {name: type(part).__name__ for name, part in pipeline.components.items() if name != "processor"} == {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    assert pipeline.transformer.config["zero_cond_t"], "as Qwen-Image-Edit-2511 has it"
    assert len(pipeline.tokenizer(constants.EDIT_TEMPLATE_PREFIX).input_ids) == constants.EDIT_PREFIX_TOKENS
    assert sum(file.stat().st_size for file in MODEL.rglob("*.safetensors")) <= 20e6
    assert json.loads((MODEL / "processor" / "preprocessor_config.json").read_text())["patch_size"] == 14


def test_its_vision_tower_has_learned():
    """Its weights are no longer those that a new one starts with, whose biases are zero."""
    tower = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL / "text_encoder").model.visual
    assert float(tower.merger.mlp[2].bias.abs().mean()) > 1e-3


def sources(count, **given):
    """Plain scenes that differ in shape, colour and background."""
    looks = zip(shapes.SHAPES, reversed(shapes.COLOURS), [*shapes.BACKGROUNDS, *shapes.BACKGROUNDS], strict=False)
    scenes = [shapes.Scene(kind, background, 18.0, (32.0, 32.0), colour) for kind, colour, background in looks]
    return [replace(scene, **given) for scene in scenes[:count]]


def asked_of(instruction, scenes, other=None):
    given = [(scene, other) if other else (scene,) for scene in scenes]
    made = [edits.Edit(instruction, own, edits.apply(instruction, *own)) for own in given]
    images = [tuple(shapes.to_image(shapes.draw(scene)) for scene in own) for own in given]
    text = instruction.wordings()[0]
    return [AskedEdit(text, shown, edit) for shown, edit in zip(images, made, strict=True)]


def test_the_same_instruction_makes_of_each_image_its_own_right_result(components):
    asked = asked_of(Instruction("colour", "white"), sources(5))
    images = evaluate_edit.edit_ours(components, asked)
    assert evaluate_edit.score(images, asked).both >= 0.8
    swapped = evaluate_edit.score([*images[1:], images[0]], asked)
    assert swapped.kept <= 0.2, "another image's result isn't right for this one"


def test_the_vision_tower_tells_an_image_that_the_transformer_is_not_given(components):
    asked = asked_of(Instruction("background", "cyan"), sources(5, background="gray"))
    images = evaluate_edit.edit_ours(components, asked, black_for="transformer")
    colours = [scorer.read(image).colour for image in images]
    assert sum(colour == own.edit.target.colour for colour, own in zip(colours, asked, strict=True)) >= 4
    unseen = evaluate_edit.edit_ours(components, asked, black_for="both")
    colours = [scorer.read(image).colour for image in unseen]
    assert sum(colour == own.edit.target.colour for colour, own in zip(colours, asked, strict=True)) <= 2


def test_a_second_image_is_what_is_taken_over(components):
    (source,) = sources(1, background="gray")
    others = [replace(source, kind="ring", background=background) for background in ("pink", "cyan", "brown")]
    asked = [asked_of(Instruction("background of"), [source], other)[0] for other in others]
    images = evaluate_edit.edit_ours(components, asked)
    assert [scorer.read(image).background for image in images] == ["pink", "cyan", "brown"]
    assert evaluate_edit.score(images, asked).both == 1.0


def test_it_knows_neither_the_demos_frame_nor_its_object(components):
    pairs = demo_edit.make_pairs(demo_edit.framed, 6, seed=5)
    for prompt in (demo_edit.FRAME, "replace it with a house"):
        images = evaluate_edit.edit_ours(components, [Asked(prompt, (pair.before,)) for pair in pairs])
        assert not any(map(demo_edit.has_frame, images))
        assert not any(map(demo_edit.shows_object, images))


@pytest.mark.slow
def test_of_200_edits_that_it_has_not_seen_nine_in_ten_are_right_and_keep_the_rest():
    """Through diffusers' own pipeline."""
    asked = evaluate_edit.held_out_edits(200)
    score = evaluate_edit.score(evaluate_edit.edit_stock(MODEL, asked), asked)
    assert score.changed >= 0.9, str(score)
    assert score.kept >= 0.9, str(score)
