"""The drawn world says what it shows, and the scorer reads it without error."""

from dataclasses import replace

import numpy as np
import pytest

from examples import scorer, shapes
from examples.evaluate import Asked, held_out_prompts, object_prompts, score


def drawings(count, seed, taught=False):
    rng = np.random.default_rng(seed)
    for index in range(count):
        prompt = shapes.random_prompt(rng, tok_share=0.2, thing_share=0.0, part_share=0.0)
        if taught:
            prompt = replace(prompt, noun=shapes.TAUGHT[index % len(shapes.TAUGHT)], colour=None)
        scene = shapes.scene_of(prompt, rng)
        yield prompt, scene, shapes.draw(scene)


@pytest.mark.parametrize("taught", [False, True])
def test_the_scorer_reads_every_drawing(taught):
    for prompt, scene, image in drawings(40, seed=1, taught=taught):
        reading = scorer.read(image)
        assert (reading.kind, reading.colour, reading.background) == (scene.kind, scene.colour, scene.background)
        assert reading.fit > 0.9
        assert abs(reading.radius_px - scene.radius_px) < 1.5
        assert prompt.size in (None, reading.size)
        assert prompt.place in (None, reading.place)


@pytest.mark.parametrize(("kind", "other"), shapes.LOOK_ALIKES.items())
def test_objects_that_look_alike_are_told_apart_on_request(kind, other):
    readable = (*shapes.SHAPES, *shapes.OBJECTS, other)
    for ground in shapes.BACKGROUNDS:
        drawn = {own: shapes.draw(shapes.Scene(own, ground, 17.0, (31.0, 33.0))) for own in (kind, other)}
        assert {own: scorer.read(image, readable).kind for own, image in drawn.items()} == {kind: kind, other: other}
        assert scorer.read(drawn[kind]).kind == kind


def test_the_scorer_reads_through_noise_and_finds_nothing_in_nothing():
    rng = np.random.default_rng(0)
    for _, scene, image in drawings(10, seed=2):
        reading = scorer.read(np.clip(image + rng.normal(0, 12, image.shape), 0, 255))
        assert (reading.kind, reading.background) == (scene.kind, scene.background)
    empty = np.empty((64, 64, 3))
    empty[:] = shapes.BACKGROUNDS["pink"]
    assert (scorer.read(empty).kind, scorer.read(empty).background) == (None, "pink")
    assert scorer.read(rng.uniform(0, 255, (64, 64, 3))).kind is None


def test_a_wrong_image_scores_zero():
    asked = Asked(shapes.Prompt("circle", "red", "pink"), "a red circle on a pink background")
    right = shapes.Scene("circle", "pink", 18, (32, 32), "red")
    wrong = [replace(right, kind="square"), replace(right, colour="blue"), replace(right, background="black")]
    assert score([shapes.to_image(shapes.draw(right))], [asked]).all_three == 1
    for scene in wrong:
        assert score([shapes.to_image(shapes.draw(scene))], [asked]).all_three == 0


def test_taught_objects_occur_in_no_caption_and_no_image_of_the_world():
    rng = np.random.default_rng(3)
    prompts = [shapes.random_prompt(rng) for _ in range(500)]
    assert not {prompt.noun for prompt in prompts} & set(shapes.TAUGHT)
    assert not any(word in text for prompt in prompts for text in prompt.wordings() for word in shapes.TAUGHT)


def test_held_out_prompts_are_full_descriptions_kept_from_training():
    asked = held_out_prompts(200)
    assert len({question.text for question in asked}) == 200
    assert all(shapes.is_held_out(question.prompt) and question.prompt.colour for question in asked)
    assert {question.prompt.noun for question in asked} == set(shapes.SHAPES)
    assert not any(shapes.is_held_out(question.prompt) for question in object_prompts(shapes.Prompt(shapes.TOK), 50))
