"""What a training would find, said before any model is loaded: one report, or all that is wrong at once."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.dataset.__main__ import main
from lora_utils.dataset.duplicates import NEAR_DUPLICATE_BITS, near_duplicates
from lora_utils.dataset.report import IMAGES_SHOWN, describe_dataset, worst_crops
from lora_utils.errors import UserError
from lora_utils.model.text_encoder import load_tokenizer
from tests.dataset.test_scan import GRADIENT, save

CONFIG = TrainConfig(resolution="64", steps=40, seed=0)
TOKEN = replace(CONFIG, train_placeholder_token=True)


@pytest.fixture
def tokenizer(random_model):
    return load_tokenizer(random_model)


@pytest.fixture
def folder(tmp_path):
    """Different images with these captions, 0.png and on; None is an image without one."""

    def write(*captions: str | None):
        rng = np.random.default_rng(0)
        for index, caption in enumerate(captions):
            save(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), tmp_path / f"{index}.png")
            if caption is not None:
                (tmp_path / f"{index}.txt").write_text(caption)
        return tmp_path

    return write


def report(folder, config, tokenizer) -> str:
    return "\n".join(describe_dataset(load(folder, config, tokenizer), config))


def test_the_report_counts_buckets_and_names_what_was_left_out(tmp_path, tokenizer):
    save(GRADIENT.resize((130, 130)), tmp_path / "one.png")
    (tmp_path / "x.mp4").write_bytes(b"")
    said = report(tmp_path, replace(CONFIG, resolution="64,128"), tokenizer)
    for part in ("1 images", "40 times", "bucket 64x64: 1", "bucket 128x128: 1", "no caption: one.png", "x.mp4"):
        assert part in said


def test_the_table_has_a_row_for_each_image_with_its_captions_tokens(folder, tokenizer):
    said = report(folder("a photo of <zwx>", "a red circle"), replace(TOKEN, resolution="64,96"), tokenizer)
    first, second = (next(line for line in said.splitlines() if f"{index}.png" in line).split() for index in (0, 1))
    assert first == ["0.png", "64x64", "64x64", "5", "a", "photo", "of", "<zwx>"], "the token is one, its space another"
    assert second == ["1.png", "64x64", "64x64", "3", "a", "red", "circle"]
    assert "captions: 2 different ones of 3 to 5 tokens" in said
    assert "1 of 2 captions lack <zwx>: 1.png" in said


def test_a_long_table_is_cut(folder, tokenizer):
    said = report(folder(*["a red circle"] * 30), CONFIG, tokenizer)
    assert said.count(".png") == IMAGES_SHOWN
    assert "and 10 more" in said


def test_captions_longer_than_the_model_was_trained_on_are_named(folder, tokenizer):
    said = report(folder("red " * 600, "red"), CONFIG, tokenizer)
    assert "captions longer than the 512 tokens the model was trained on: 0.png" in said


def test_all_that_is_wrong_is_said_at_once(folder, tokenizer):
    images = folder("red " * 1100, "a red circle", "[trigger]")
    (images / "3.png").write_bytes(b"no image")
    (images / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    with pytest.raises(UserError) as caught:
        load(images, replace(TOKEN, placeholder_token="<anna>,<ben>"), tokenizer)
    said = str(caught.value)
    assert "6 problems" in said
    for part in (
        "metadata.jsonl names 'gone.png'",
        "3.png can't be read",
        "2.png: the text",
        "the caption of 0.png has",
        "none of the 2 captions holds the placeholder token '<anna>'",
        "placeholder token '<ben>'",
    ):
        assert part in said


def test_images_to_be_described_are_counted_and_their_captions_not_judged(folder, tokenizer):
    config = replace(TOKEN, autocaption=True, autocaption_prefix="<zwx>, ")
    said = report(folder(None, "a red circle"), config, tokenizer)
    assert "1 images have no caption; the text encoder will describe them" in said
    assert "(to be written)" in said


def test_the_report_alone_of_a_folder_or_an_archive(tmp_path, write_zip, capsys, tiny_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(tiny_model))
    save(GRADIENT, tmp_path / "set" / "one.png")
    (tmp_path / "set" / "one.txt").write_text("[trigger]")
    given = ["--resolution", "64", "--trigger_word", "ohwx", "--no-autocaption"]
    assert main([str(tmp_path / "set"), *given]) == 0
    of_folder = capsys.readouterr().out
    assert "1 images, each seen about 1000 times" in of_folder
    assert "tokens" in of_folder
    archive = write_zip({"one.png": GRADIENT, "one.txt": "[trigger]"})
    assert main([str(archive), *given]) == 0
    assert capsys.readouterr().out == of_folder


def test_without_a_base_model_only_the_counts_are_missing(folder, capsys, monkeypatch):
    monkeypatch.delenv("BASE_MODEL", raising=False)
    assert main([str(folder("a red circle")), "--resolution", "64"]) == 0
    said = capsys.readouterr()
    assert "a red circle" in said.out
    assert "tokens aren't counted" in said.err


def test_a_dataset_that_a_training_would_refuse_says_why(tmp_path, write_zip, capsys):
    assert main([str(write_zip({"one.png": GRADIENT, "one.txt": "[trigger]"}))]) == 1
    assert "set trigger_word" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.zip")]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert main([str(tmp_path), "--resolution", "77"]) == 1
    assert "multiples of 16" in capsys.readouterr().err


def test_hashes_that_differ_in_a_few_bits_are_alike():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (2000, 256), np.uint8)
    bits[700] = bits[5]
    bits[700, :NEAR_DUPLICATE_BITS] ^= 1
    bits[1900] = bits[5]
    bits[8] = bits[6]
    bits[8, : NEAR_DUPLICATE_BITS + 1] ^= 1
    alike = [bytes(3072)] * 2000
    assert near_duplicates([row.tobytes() for row in np.packbits(bits, axis=1)], alike) == [[5, 700, 1900]]
    assert near_duplicates([], []) == []


def test_the_images_that_lose_most_are_shown_with_what_they_lose_dark(tmp_path):
    for name, size in (("square", (64, 64)), ("odd", (97, 64)), ("wide", (150, 64))):
        Image.new("RGB", size, "white").save(tmp_path / f"{name}.png")
    found = load(tmp_path, TrainConfig(resolution="64", seed=0))
    crops = worst_crops(found)
    assert "square.png" not in " ".join(text for text, _ in crops)
    shares = [float(text.partition(": ")[2].partition("%")[0]) for text, _ in crops]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] >= 0.5
    text, image = crops[0]
    grey = np.asarray(image.convert("L"))
    assert grey[grey.shape[0] // 2, grey.shape[1] // 2] == 255
    assert grey.min() < 128, text


def test_the_command_has_no_remark_of_other_libraries(folder, tiny_model):
    command = [sys.executable, "-m", "lora_utils.dataset", str(folder("a red circle")), "--resolution", "64"]
    done = subprocess.run(
        command, env={**os.environ, "BASE_MODEL": str(tiny_model)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("dataset: "), done.stdout[:200]
    assert not done.stderr
