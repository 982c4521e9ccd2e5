"""The world of edits: the scorer is right on drawings, and pretraining sees what the package's own code would show."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from examples import demo_edit, edit_pairs, edits, evaluate_edit, pretrain_edit, shapes, small_model
from examples.pretrain_vae import to_tensor
from lora_utils import constants
from lora_utils.model.text_encoder import Prompt, encode_prompts
from lora_utils.model.vae import decode_latents, encode_images, load_vae
from lora_utils.model.variant import EDIT_PLUS
from lora_utils.model.vision import features, resized
from lora_utils.placeholder.tokens import no_placeholders


@pytest.fixture(scope="module")
def made():
    """Edits of plain scenes that change something, a fifth of them of two images."""
    return evaluate_edit.held_out_edits(80, seed=9)


def test_a_drawn_target_is_right_and_the_image_before_it_isnt(made):
    for own in made[::3]:
        drawn = edits.score(shapes.to_image(shapes.draw(own.edit.target)), own.edit)
        assert (drawn.changed, drawn.kept) == (True, True), own.text
        assert not edits.score(own.images[0], own.edit).changed, own.text


def test_what_was_not_asked_for_is_seen_to_have_changed(made):
    """Another scene's target shows neither all that was asked nor all that was to stay."""
    for own, other in pairwise(made):
        score = edits.score(shapes.to_image(shapes.draw(other.edit.target)), own.edit)
        assert not (score.changed and score.kept) or own.edit.target == other.edit.target, own.text


def test_each_action_is_among_those_held_out_and_none_of_them_is_trained(made):
    assert {own.edit.instruction.action for own in made} == {*edits.OF_ONE_IMAGE, *edits.OF_TWO_IMAGES}
    assert all(edits.is_held_out(own.edit) for own in made)
    rng = np.random.default_rng(1)
    plain = [edit for edit in (edits.random_edit(rng) for _ in range(800)) if edits.is_plain(edit.sources[0])]
    assert 0.08 < np.mean([edits.is_held_out(edit) for edit in plain]) < 0.17


def test_the_demos_frame_and_object_are_read_from_drawings():
    for edited, shows, keeps in (
        (demo_edit.framed, demo_edit.has_frame, demo_edit.keeps_inside),
        (demo_edit.replaced, demo_edit.shows_object, demo_edit.keeps_scene),
    ):
        pairs = demo_edit.make_pairs(edited, 12, seed=3)
        assert all(shows(pair.target) and keeps(pair.target, pair.scene) for pair in pairs)
        assert not any(shows(pair.before) for pair in pairs)
        others = [other.scene for other in [*pairs[1:], pairs[0]]]
        assert sum(keeps(pair.target, scene) for pair, scene in zip(pairs, others, strict=True)) <= 3


def test_pretraining_reads_images_and_instructions_as_the_package_does(made):
    images = [own.images[0] for own in made[:4]]
    seen = torch.stack([edit_pairs.what_is_seen(image) for image in images])
    scaled = [resized(image, constants.VISION_AREA_PX) for image in images]
    cut = small_model.new_processor()(images=scaled, return_tensors="pt")
    assert torch.equal(pretrain_edit.patches(seen), cut["pixel_values"])

    tokenizer = small_model.train_tokenizer(edit=True)
    network, _ = pretrain_edit._network(tokenizer)
    model, texts = network["text"], ["make it red", "put it on a pink background"]
    with torch.no_grad():
        states, _ = pretrain_edit.encode_instructions(model, tokenizer, texts, seen, plain_positions=False)
        shown = features(model.visual, cut["pixel_values"], cut["image_grid_thw"])
        prompts = [Prompt(text, tuple(shown[2 * i : 2 * i + 2])) for i, text in enumerate(texts)]
        ours = encode_prompts(model.language_model, tokenizer, prompts, no_placeholders(), EDIT_PLUS)
    for own, state in zip(states, ours, strict=True):
        torch.testing.assert_close(own[: len(state)], state)


def test_errors_are_weighed_by_how_far_the_decoder_shows_them(made):
    """Of two errors of one size, the one along the greatest weight shows at least a hundred times as much, squared."""
    vae = load_vae(edit_pairs.TEXT_TO_IMAGE, edit_pairs.CPU)
    pixels = to_tensor([np.asarray(own.images[0], float) for own in made[:6]])
    clean = encode_images(vae, pixels)
    visible = pretrain_edit.visibility(vae, clean[:3])
    torch.testing.assert_close(visible, visible.T)
    assert float(visible.trace()) == pytest.approx(64, rel=1e-4)
    _, directions = torch.linalg.eigh(visible)
    before = decode_latents(vae, clean[3:], evaluate_edit.SIZE)
    least, most = (
        float((decode_latents(vae, clean[3:] + 0.1 * direction, evaluate_edit.SIZE) - before).square().mean())
        for direction in (directions[:, 0], directions[:, -1])
    )
    assert most > 100 * least
