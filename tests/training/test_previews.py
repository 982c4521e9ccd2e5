"""Previews: what prediction would return, sampled while a run is on, without a trace in what it learns."""

import json
from dataclasses import replace

import pytest
from PIL import Image, ImageChops

from examples.demo import call
from lora_utils.config import RunOptions, SampleRequest, TrainConfig
from lora_utils.errors import UserError
from lora_utils.lora.hooks import AppliedLoras
from lora_utils.tracking import contact_sheet
from lora_utils.training.previews import generate_previews, loras_by_text, preview_rows
from predict import Predictor
from tests.helpers import PREVIEW_PROMPTS, SHORT_RUN, lora_of, without_thumbnail


def names(folder):
    return [path.name for path in contact_sheet.list_sheets(folder)]


def test_previews_after_the_last_step_are_what_predict_generates(train_run, random_model, monkeypatch):
    """The same file, rounded as it is, through the same hooks and the same sampler; only the modulations come from a
    table in training, which rounds differently."""
    weights, folder = train_run(sample_prompts=PREVIEW_PROMPTS, sample_steps=4)
    with Image.open(folder / "samples" / "step-000008.png") as sheet:
        drawn = sheet.convert("RGB")
    predictor = Predictor()
    predictor.setup()
    asked = [
        ("a photo of <zwx> on a cyan background", 0, 0),
        ("a photo of on a cyan background", 1, 0),
        ("a red circle", 0, 1),
    ]
    side = 4 * 64  # enlarged without smoothing
    for prompt, column, row in asked:
        seed = SHORT_RUN.seed + row
        (path,) = call(
            predictor.predict,
            prompt=prompt,
            replicate_weights=weights,
            steps=4,
            width=64,
            height=64,
            seed=seed,
            output_format="png",
        )
        with Image.open(str(path)) as image:
            expected = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        left, top = 8 + column * (side + 8), 20 + row * (side + 20 + 8) + 20
        found = drawn.crop((left, top, left + side, top + side))
        apart = ImageChops.difference(found, expected)
        assert max(most for _, most in apart.getextrema()) <= 1, prompt
        assert sum(apart.convert("L").histogram()[1:]) <= 0.001 * side**2, prompt


@pytest.mark.parametrize(("token", "targets"), [(True, "attention"), (False, "attention_mlp")])
def test_a_run_that_is_watched_learns_what_it_learns_unseen(token, targets, train_run):
    config = replace(SHORT_RUN, train_placeholder_token=token, lora_targets=targets, ema_decay=0.5)
    prompts = PREVIEW_PROMPTS if token else "a red circle"
    seen, _ = train_run("seen", config, sample_prompts=prompts, sample_every=2, sample_steps=1, save_every=2)
    unseen, _ = train_run("unseen", config)
    assert without_thumbnail(lora_of(seen)[0]) == without_thumbnail(lora_of(unseen)[0])
    assert b"modelspec.thumbnail" in lora_of(seen)[0]


def test_a_token_that_does_not_learn_is_previewed_and_validated_without_a_text_encoder(train_run):
    config = replace(SHORT_RUN, placeholder_learning_rate=0.0, validation_share=0.2, class_word="square")
    given = {"sample_prompts": PREVIEW_PROMPTS, "sample_steps": 1, "sample_every": 4}
    weights, folder = train_run("frozen", config, **given)
    assert names(folder) == ["step-000000.png", "step-000004.png", "step-000008.png"]
    described = lora_of(weights)[1]["placeholder"]
    assert described["moved"] is False
    assert described["first_norm"] == described["last_norm"] > 0
    assert any("validation" in json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_sheets_come_before_the_first_step_on_the_way_and_after_the_last(train_run):
    _, folder = train_run(sample_prompts="a red circle", sample_every=3, sample_steps=1)
    assert names(folder) == ["step-000000.png", "step-000003.png", "step-000006.png", "step-000008.png"]
    _, folder = train_run(sample_prompts="a red circle", sample_steps=1)
    assert names(folder) == ["step-000000.png", "step-000008.png"], "a new run in that folder leaves no other's"


def test_a_resumed_run_samples_the_previews_that_are_left(train_run, tmp_path):
    given = {"sample_prompts": "a photo of <zwx>", "sample_every": 3, "sample_steps": 1}
    _, whole = train_run("whole", **given)
    asked = iter([False, False, False, True])
    train_run("parts", stopped=lambda: next(asked), save_every=3, **given)
    (tmp_path / "parts.zip").unlink()
    train_run("parts", save_every=3, resume="auto", **given)
    assert names(tmp_path / "parts") == names(whole)
    for name in names(whole):
        with Image.open(whole / "samples" / name) as one, Image.open(tmp_path / "parts" / "samples" / name) as other:
            assert ImageChops.difference(one, other).getbbox() is None, name


@pytest.mark.parametrize(
    ("prompt", "config", "expected"),
    [
        ("a photo of <zwx> in a garden", SHORT_RUN, ["a photo of <zwx> in a garden", "a photo of in a garden"]),
        ("<zwx>, a photo", SHORT_RUN, ["<zwx>, a photo", "a photo"]),
        ("<zwx>", SHORT_RUN, ["<zwx>", " "]),
        ("a photo of <zwx>", replace(SHORT_RUN, class_word="house"), ["a photo of <zwx>", "a photo of house"]),
        ("[trigger] at dusk", SHORT_RUN, ["<zwx> at dusk", "at dusk"]),
        ("a red circle", SHORT_RUN, ["a red circle"]),
        ("ohwx at dusk", TrainConfig(trigger_word="ohwx", seed=0), ["ohwx at dusk"]),
        ("[trigger] at dusk", TrainConfig(trigger_word="ohwx", seed=0), ["ohwx at dusk"]),
    ],
)
def test_a_prompt_with_a_token_is_previewed_without_it_too(prompt, config, expected):
    (row,) = preview_rows(config, RunOptions(run_dir="x", sample_prompts=prompt))
    assert [request.prompt for request in row] == expected
    assert {request.seed for request in row} == {config.seed}, "from the same noise"


@pytest.mark.parametrize(
    ("given", "prompt", "negative", "acts"),
    [
        ({}, "a photo of <zwx>", " ", [True, True]),
        ({"class_word": "house"}, "a photo of <zwx>", " ", [True, False]),
        ({"class_word": "house"}, "a photo of <zwx>", "an ugly <zwx>", [True, True]),
        ({"class_word": "house"}, "a photo of house", " ", [True, True]),  # what other tools would show
    ],
)
def test_the_lora_acts_in_previews_as_in_prediction_but_for_the_class_alone(given, prompt, negative, acts):
    request = SampleRequest(prompt, negative_prompt=negative)
    by_text = loras_by_text(AppliedLoras(frozenset({0})), request, replace(SHORT_RUN, **given))
    assert [bool(by_text.prompt), bool(by_text.negative)] == acts


def test_several_prompts_have_seeds_of_their_own():
    rows = preview_rows(replace(SHORT_RUN, resolution="64,128"), RunOptions("x", sample_prompts=" a | b\n\nc"))
    assert [(request.prompt, request.seed, request.width) for (request,) in rows] == [
        ("a", 3, 128),
        ("b", 4, 128),
        ("c", 5, 128),
    ]


def test_preview_prompts_may_hold_brackets_and_a_near_spelling_is_hinted_at(train_run, caplog):
    train_run(sample_prompts="a sign <abc>\na photo of <ZWX>", sample_steps=1)
    assert "hint: sample_prompts hold '<ZWX>', and the run trains <zwx>" in caplog.text
    assert "'<abc>'" not in caplog.text
    with pytest.raises(UserError, match="need a run_dir"):
        RunOptions(sample_prompts="a red circle")


def test_a_sample_that_fails_ends_a_run_at_its_start_and_not_later(train_run, monkeypatch, caplog):
    calls, draw = [], generate_previews

    def failing(at):
        def drawn(*given):
            calls.append(1)
            if len(calls) == at:
                raise UserError("an image of 64x64 doesn't fit")
            return draw(*given)

        return drawn

    monkeypatch.setattr("lora_utils.training.monitor.generate_previews", failing(1))
    with pytest.raises(UserError, match="doesn't fit"):
        train_run("first", sample_prompts="a red circle", sample_steps=1)
    calls.clear()
    monkeypatch.setattr("lora_utils.training.monitor.generate_previews", failing(2))
    weights, folder = train_run("later", sample_prompts="a red circle", sample_every=4, sample_steps=1)
    assert weights.is_file()
    assert "the previews after step 4 failed: an image of 64x64 doesn't fit" in caplog.text
    assert names(folder) == ["step-000000.png", "step-000008.png"]
