"""Prompts of previews: a line each, with settings of their own."""

import time

import pytest

from lora_utils.config import RunOptions, SampleRequest, TrainConfig, preview_request
from lora_utils.errors import UserError
from lora_utils.prompts import split_prompts, split_settings
from lora_utils.training.previews import preview_rows

USUAL = SampleRequest("", seed=3, steps=20, width=512, height=512)


def test_lines_and_bars_separate_prompts_but_not_inside_of_quotes():
    assert split_prompts("a\n b | c |\n\n") == ["a", "b", "c"]
    assert split_prompts('a --negative "x|y" | b') == ['a --negative "x|y"', "b"]
    assert split_prompts('a 6" man | b | 7" c | d"') == ['a 6" man', "b", '7" c', 'd"']
    assert split_prompts('a 6" man | b') == ['a 6" man', "b"], "an inch is no quote"


def test_a_hundred_thousand_bars_cost_no_time():
    began = time.monotonic()
    assert split_prompts("|" * 50_000 + "a" + '"|' * 25_000) != []
    assert time.monotonic() - began < 0.5


def test_a_prompt_without_settings_is_itself_dashes_and_all():
    for text in ("a photo", "a well-known man -- in the snow", "a sign that says --", "3 --4"):
        assert split_settings(text) == (text.strip(), {})


def test_settings_become_those_of_the_request():
    line = 'a photo of <zwx> --size 768x512 --seed 5 --guidance 3 --steps 30 --scale 0.8 --negative "blurry, dark"'
    got = preview_request(line, USUAL)
    assert (got.prompt, got.width, got.height, got.seed) == ("a photo of <zwx>", 768, 512, 5)
    assert (got.guidance, got.steps, got.lora_scale, got.negative_prompt) == (3.0, 30, 0.8, "blurry, dark")
    assert preview_request("a --steps 4", USUAL) == SampleRequest("a", seed=3, steps=4, width=512, height=512)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --ar 16:9", r"'--ar' in 'a --ar 16:9' is no setting with a value; after the prompt come --size"),
        ("a --seed", "'--seed' in 'a --seed' is no setting with a value"),
        ("a --seed --steps 4", "no setting with a value"),
        ("a --seed 5 6", "'6' in"),
        ("a --size 768", "--size must be WIDTHxHEIGHT like 768x512, got '768'"),
        ("a --size 8x8", "sample_prompts: width must be from 64 to 2048, got 8"),
        ("a --steps many", "steps must be a number, got 'many'"),
        ("a --scale nan", "lora_scale must be a finite number"),
        ('a --negative "x', "a quotation mark is missing"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_line_before_anything_is_loaded(line, message):
    with pytest.raises(UserError, match=message):
        RunOptions(run_dir="run", sample_prompts=f"a good one\n{line}")


def test_previews_take_the_settings_and_the_run_fills_in_the_rest():
    options = RunOptions(run_dir="run", sample_prompts="<zwx> --steps 7 --seed 9|a dog", sample_steps=11)
    config = TrainConfig(seed=4, train_placeholder_token=True, resolution="256,512")
    (first, plain), (second,) = preview_rows(config, options)
    assert (first.steps, first.seed, first.width) == (plain.steps, plain.seed, plain.width) == (7, 9, 512)
    assert (second.steps, second.seed, second.prompt) == (11, 5, "a dog")


# --- LoRAs ----------------------------------------------------------------------------------------------------------


def test_extra_loras_are_listed_with_strengths_of_their_own_or_the_usual_one():
    request = SampleRequest(
        "a", seed=0, extra_lora="me/it --scale -0.5| you/it/file name.safetensors\n", extra_lora_scale=2
    )
    assert request.extra_loras == [("me/it", -0.5), ("you/it/file name.safetensors", 2.0)]
    assert SampleRequest("a", seed=0).extra_loras == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("me/it --scale much", "extra_lora 'me/it': --scale must be a number, got 'much'"),
        ("me/it --scale 9", "extra_lora 'me/it': extra_lora_scale must be from -1 to 3, got 9"),
        ("me/it --scale nan", "must be a finite number"),
        ("a/b|" * 9, "extra_lora names 9 LoRAs; 8 are the most"),
    ],
)
def test_a_list_of_loras_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        SampleRequest("a", seed=0, extra_lora=text)
