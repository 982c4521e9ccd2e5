"""The shipped small editing model: a folder as the hub's, small, and it has learned to edit its world."""

import numpy as np
import pytest

from examples import demo_edit, edits, evaluate_edit, shapes, stock_edit
from lora_utils import constants
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement
from lora_utils.model.variant import EDIT_PLUS


@pytest.fixture(scope="module")
def folder():
    return evaluate_edit.MODEL


@pytest.fixture(scope="module")
def components(folder):
    return load_components(folder, default_placement())


def test_the_folder_opens_with_the_true_classes_and_is_small(folder):
    pipeline = stock_edit.load_pipeline(folder)
    kinds = {name: type(part).__name__ for name, part in pipeline.components.items() if name != "processor"}
    assert kinds == {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": kinds["tokenizer"],
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    assert type(pipeline).__name__ == EDIT_PLUS.pipeline
    assert pipeline.transformer.config["zero_cond_t"], "as 2511 has it"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 20e6
    prefix = pipeline.tokenizer(constants.EDIT_TEMPLATE_PREFIX).input_ids
    assert len(prefix) == constants.EDIT_PREFIX_TOKENS == pipeline.prompt_template_encode_start_idx


def test_held_out_edits_are_right_through_the_stock_pipeline(folder):
    asked = evaluate_edit.held_out_edits(30)
    scores = evaluate_edit.score(evaluate_edit.edit_stock(folder, asked), asked)
    assert scores.changed >= 0.9, str(scores)
    assert scores.kept >= 0.9, str(scores)


def test_the_same_instruction_with_another_image_gives_another_right_result(components):
    """Of one seed: what differs is the image alone."""
    rng, instruction = np.random.default_rng(4), edits.Instruction("background", "cyan")
    scenes = [scene for scene in (edits.random_scene(rng) for _ in range(60)) if edits.is_plain(scene)]
    scenes = [scene for scene in scenes if scene.background != "cyan"][:12]
    asked = [
        evaluate_edit.AskedEdit(
            edits.Edit(instruction, (scene,), edits.apply(instruction, scene)),
            "put it on a cyan background",
            (shapes.to_image(shapes.draw(scene)),),
        )
        for scene in scenes
    ]
    images = evaluate_edit.edit_ours(components, asked)
    right = evaluate_edit.score(images, asked)
    assert right.both >= 0.8, str(right)
    swapped = evaluate_edit.score(images[1:] + images[:1], asked)
    assert swapped.kept <= 0.3, "another image's result isn't right for this one"


def test_it_knows_neither_the_demos_frame_nor_its_object(components):
    pairs = demo_edit.make_pairs(demo_edit.framed, 6, seed=5)
    asked = [
        evaluate_edit.AskedEdit(edits.Edit(edits.Instruction("x"), (p.scene,), p.scene), demo_edit.FRAME, (p.before,))
        for p in pairs
    ]
    images = evaluate_edit.edit_ours(components, asked)
    assert not any(map(demo_edit.has_frame, images))
    assert not any(map(demo_edit.shows_object, images))
