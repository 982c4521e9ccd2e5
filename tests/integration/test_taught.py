"""What train writes and its captions say, predict takes: for random valid inputs, on tiny runs."""

import random
import shutil

import numpy as np
import pytest
from PIL import Image

from examples.demo import call
from lora_utils.config import TrainInputs, from_inputs
from lora_utils.dataset.caption_texts import with_trigger
from lora_utils.training.run import train_in_process
from predict import Predictor
from tests.helpers import lora_of

SIDE = 4 * 64  # of a preview on a sheet: enlarged without smoothing
WORDS = (
    "a",
    "red",
    "wall",
    "TOKYO",
    "<b>",
    "</html>",
    "женщина",
    "猫",
    "é",
    "ohwx",
    "ohwxs",
    "<zwx>",
    "[trigger]",
    '"x"',
)
TRIGGERS = ("", "ohwx", "TOK", "<ohwx>", "小猫", "an old house", "[x]")
TOKENS = ("<zwx>", "<anna>,<ben>")


def random_inputs(rng, folder):
    """Inputs of a short run, with a dataset of random captions. -> inputs, and the captions as they were written"""
    token = rng.random() < 0.6
    given = {
        "steps": rng.choice([2, 3]),
        "rank": rng.choice([1, 4]),
        "resolution": "64",
        "batch_size": rng.choice([1, 2]),
        "seed": rng.randrange(10**6),
        "learning_rate": 1e-3,
        "caption_dropout": rng.choice([0.0, 0.2]),
        "trigger_word": rng.choice(TRIGGERS),
        "train_placeholder_token": token,
        "placeholder_token": rng.choice(TOKENS),
        "quantization": rng.choice(["none", "nf4", "int8"]),
        "lora_targets": rng.choice(["attention", "attention_mlp"]),
        "ema_decay": rng.choice([0.0, 0.5]),
        "placeholder_init_std": rng.choice([0.0, 1e-5]),
        "lora_alpha": rng.choice([1.0, 4.0]),  # of a few steps: a strong LoRA's rounding to bf16 can be seen
    }
    tokens = given["placeholder_token"].split(",") if token else []
    if given["trigger_word"] or token:
        given["class_word"] = rng.choice(["", "person"])
    known = given["trigger_word"] or len(tokens) == 1
    captions = []
    for index in range(4):
        words = [rng.choice(WORDS) for _ in range(rng.randrange(1, 6))]
        text = " ".join(words + tokens)
        captions.append(text if known else text.replace("[trigger]", ""))
        Image.effect_noise((64, 64), 10 + index).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(captions[-1])
    return given, captions


def image_of(sheet, column, row):
    left, top = 8 + column * (SIDE + 8), 20 + row * (SIDE + 28) + 20
    return sheet.crop((left, top, left + SIDE, top + SIDE)).resize((64, 64), Image.Resampling.NEAREST)


def check(seed, tmp_path, random_model, monkeypatch):
    """Train; then every caption is a prompt with the weights, and the last previews are predict's images."""
    rng, folder = random.Random(seed), tmp_path / "images"
    folder.mkdir()
    given, captions = random_inputs(rng, folder)
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    # The text encoder's prompts of a preview can't hold the separators of sample_prompts.
    prompt = rng.choice([text for text in captions if "|" not in text])
    inputs = from_inputs(
        TrainInputs,
        {**given, "dataset": folder, "run_dir": str(tmp_path / "run"), "sample_prompts": prompt, "sample_steps": 2},
    )
    weights = train_in_process(inputs, tmp_path / "w.zip")
    meta = lora_of(weights)[1]
    monkeypatch.setenv("QUANTIZATION", meta["config"]["quantization"])
    predictor = Predictor()
    predictor.setup()

    def predicted(text, **more):
        asked = {"replicate_weights": weights, "steps": 2, "width": 64, "height": 64, "output_format": "png", **more}
        (path,) = call(predictor.predict, prompt=text, **asked)
        with Image.open(str(path)) as image:
            return image.convert("RGB")

    for text in captions:
        predicted(text, seed=1, guidance=1.0)
        predicted(with_trigger(text, inputs.config.trigger_word, inputs.config.tokens), seed=1, guidance=1.0)
    with Image.open(tmp_path / "run" / "samples" / f"step-{inputs.config.steps:06d}.png") as sheet:
        preview = image_of(sheet.convert("RGB"), 0, 0)
    expected = predicted(prompt, seed=inputs.config.seed)
    apart = np.abs(np.asarray(preview, np.int16) - np.asarray(expected, np.int16))
    assert apart.max() <= 1, (seed, given, prompt, apart.max())
    predictor.model.close()
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("seed", range(2))
def test_every_caption_of_a_training_is_a_prompt_and_its_preview_is_what_predict_generates(
    seed, tmp_path, random_model, monkeypatch
):
    check(seed, tmp_path, random_model, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 40))
def test_and_so_for_many_more(seed, tmp_path, random_model, monkeypatch):
    check(seed, tmp_path, random_model, monkeypatch)
