"""Datasets in other trainers' conventions: each is honoured, or named in the report with what becomes of it."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lora_utils.config import TrainConfig
from lora_utils.dataset.__main__ import main
from lora_utils.dataset.report import describe_dataset
from lora_utils.dataset.scan import inspect, load
from lora_utils.errors import UserError
from lora_utils.io.archive import extract_archive
from lora_utils.io.images import open_image, open_mask
from lora_utils.training.batch_plans import bucket_batches

CONFIG = TrainConfig(resolution="64", steps=40, seed=0, default_caption="x")


def report(folder, config=CONFIG):
    return "\n".join(describe_dataset(inspect(folder, config), config))


def names(dataset):
    return {str(path.relative_to(dataset.folder)) for path in dataset.captions_by_image}


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_number_repeats_its_images(folder):
    found = load(folder("3_cat/a.png", "1_dog/b.png", "c.png"), CONFIG)
    shown = [
        e.image_path.name
        for batch, _ in zip(bucket_batches(found.examples, 1, 0), range(5), strict=False)
        for e in batch
    ]
    assert sorted(shown) == ["a.png", "a.png", "a.png", "b.png", "c.png"]
    assert "repeats of folders: 3_cat 3 times an epoch; their names aren't captions" in report(found.folder)


def test_what_all_folders_repeat_changes_nothing(folder):
    found = load(folder("10_cat/a.png", "20_dog/b.png"), CONFIG)
    assert {e.image_path.name: e.repeats for e in found.examples} == {"a.png": 1, "b.png": 2}


@pytest.mark.parametrize("where", ["reg", "reg/1_woman", "regularization", "reg_images", "class_images", "Reg"])
def test_regularisation_images_are_used_if_their_caption_is_known_and_said_if_they_are_not(where, folder):
    found = folder("img/1_ohwx/a.png", f"{where}/b.png")
    named = where == "reg/1_woman"
    loaded = load(found, CONFIG)
    assert loaded.num_images == 1
    assert {e.image_path.name: e.caption for e in loaded.examples if e.regularisation} == (
        {"b.png": "woman"} if named else {}
    )
    said = (
        "1 regularisation images in reg/1_woman: an epoch shows as many"
        if named
        else f"left out: 1 regularisation images in {where}, for they have no caption"
    )
    assert said in report(found)
    assert "for prior_loss_weight is 0" in report(found, replace(CONFIG, prior_loss_weight=0))


def test_a_dataset_that_is_all_regularisation_is_learned_with_a_warning(folder):
    assert "warning: all images stand in a folder for regularisation images" in report(folder("reg/a.png"))


# --- masks ----------------------------------------------------------------------------------------------------------

MASKS = ["a.mask.png", "a.png.mask.png", "a_mask.png", "a-mask.png", "a-masklabel.png", "masks/a.png", "mask/a.png"]
MASKS += ["Masks/a.PNG", "masks/a_mask.png", "mask_a.png", "mask-a.png"]


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_is_known_by_its_name_and_never_taught(mask, folder):
    found = folder("a.png", "b.png", mask)
    assert names(load(found, CONFIG)) == {"a.png", "b.png"}
    assert "1 masks aren't used; set mask_from to file to use them" in report(found)
    masked = load(found, replace(CONFIG, mask_from="file"))
    assert {e.image_path.name: e.masked for e in masked.examples} == {"a.png": True, "b.png": False}


@pytest.mark.parametrize("image", ["images/a.png", "img/a.png", "x/a.png", "10_cat/a.png"])
def test_masks_in_a_folder_beside_the_images_are_found(image, folder):
    mask = "x/masks/a.png" if image.startswith("x") else "masks/a.png"
    found = load(folder(image, mask), replace(CONFIG, mask_from="file"))
    assert [e.masked for e in found.examples] == [True]


def test_what_may_be_a_mask_but_is_of_no_image_is_learned_with_a_warning(folder):
    found = folder("venice_mask.png", "a.png")
    assert names(load(found, CONFIG)) == {"venice_mask.png", "a.png"}
    assert "warning: learned as images, though their names are masks': venice_mask.png" in report(found)
    assert "1 masks aren't used" in report(folder("masks/lonely.png"))


# --- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ({"caption": "a cat", "tags": ["x"]}, "a cat"),
        ({"text": "a cat"}, "a cat"),
        ({"prompt": "a cat"}, "a cat"),
        ({"tags": ["cat", "night"]}, "cat, night"),
        ({"tags": "cat, night"}, "cat, night"),
        ("a cat", "a cat"),
    ],
)
def test_a_json_beside_an_image_is_its_caption(content, caption, folder):
    found = load(folder("a.png", **{"a.json": json.dumps(content)}), CONFIG)
    assert found.captions == [caption]


@pytest.mark.parametrize("content", ["{", "[" * 50_000])
def test_a_json_that_cannot_be_read_is_refused(content, folder):
    with pytest.raises(UserError, match=r"a\.json can't be read"):
        load(folder("a.png", **{"a.json": content}), CONFIG)


@pytest.mark.parametrize("content", ["[]", '{"score": 1}', '{"caption": 7}', '{"prompt": {"3": {}}}'])
def test_a_json_of_other_things_is_named_and_refuses_nothing(content, folder):
    found = folder("a.png", **{"a.json": content})
    assert load(found, CONFIG).captions == ["x"]
    assert "no caption, text, prompt or tags in a.json: other tools' data, not used" in report(found)


def test_half_a_character_in_a_table_or_json_is_named(folder):
    for name, content in (
        ("a.json", '{"caption": "\\ud83d"}'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud83d"}'),
    ):
        found = folder("a.png", **{name: content})
        with pytest.raises(UserError, match="holds half a character"):
            load(found, CONFIG)
        (found / name).unlink()


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_a_table_of_lines_may_be_called_captions_too(name, folder):
    assert load(folder("a.png", **{name: '{"file_name": "a.png", "text": "a cat"}\n'}), CONFIG).captions == ["a cat"]


def test_a_csv_without_a_header_is_read_by_its_first_image(folder):
    table = 'a.png,a cat\nb.png,"a dog, at night"\n'
    assert load(folder("a.png", "b.png", **{"metadata.csv": table}), CONFIG).captions == ["a cat", "a dog, at night"]


@pytest.mark.parametrize("name", ["data.jsonl", "train.csv", "prompts.tsv", "labels.json", "x.parquet"])
def test_a_table_by_another_name_is_named(name, folder):
    said = report(folder("a.png", **{name: "x"}))
    assert f"not read, though it may be a table: {name}; a table of captions is called metadata.jsonl" in said


def test_captions_of_several_lines_are_said_to_be_one_text(folder):
    found = folder("a.png", **{"a.txt": "a cat\nat night"})
    assert load(found, CONFIG).captions == ["a cat\nat night"]
    assert "captions of several lines, read as one text each: a.png" in report(found)


@pytest.mark.parametrize("ending", ["jfif", "JFIF", "jpe"])
def test_jpegs_of_every_ending_are_images(ending, folder):
    assert names(load(folder(f"a.{ending}"), CONFIG)) == {f"a.{ending}"}


class LegacyName(zipfile.ZipInfo):
    """A name as old archivers write it: its bytes, and no mark of their encoding."""

    def _encodeFilenameFlags(self):
        return self.filename.encode("cp437"), self.flag_bits


@pytest.mark.parametrize(("encoding", "name"), [("gbk", "猫.png"), ("shift_jis", "ねこ.png"), ("cp1251", "кот.png")])
def test_names_in_a_countrys_encoding_are_found_by_the_tables(encoding, name, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    legacy = name.encode(encoding).decode("cp437")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as packed:
        packed.writestr(LegacyName(legacy), (tmp_path / "a.png").read_bytes())
        packed.writestr("metadata.jsonl", json.dumps({"file_name": name, "text": "a cat"}))
    extract_archive(tmp_path / "d.zip", tmp_path / "out")
    assert load(tmp_path / "out", CONFIG).captions == ["a cat"]


# --- what images are ------------------------------------------------------------------------------------------------


def test_plain_colours_and_other_lines_are_not_the_same_image(folder, tmp_path):
    found = folder("a.png", "b.png", "c.png")
    for index in range(2):
        drawing = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(drawing).line([20, 20 + 440 * index, 490, 490 - 440 * index], fill="black", width=2)
        drawing.save(found / f"line{index}.png")
    assert "look the same" not in report(found)
    Image.open(found / "line0.png").resize((340, 340)).save(found / "copy.jpg", quality=60)
    assert "look the same, and count as often: copy.jpg, line0.png" in report(found)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_tiffs_of_32_bits_are_refused_for_nothing_says_which_is_white(dtype, tmp_path):
    levels = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    Image.fromarray(levels.astype(dtype)).save(tmp_path / "a.tif")
    for opened in (open_image, open_mask):
        with pytest.raises(UserError, match=r"a\.tif has numbers of 32 bits"):
            opened(tmp_path / "a.tif")


def test_a_png_of_16_bits_is_scaled_and_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    seen = np.asarray(open_image(tmp_path / "a.png"))[..., 0]
    assert np.abs(seen.astype(float) - levels / 257).max() <= 1


def test_what_is_cropped_is_said_by_image(tmp_path):
    for name, size in {"panorama": (2048, 268), "square": (512, 512)}.items():
        Image.new("RGB", size, "teal").save(tmp_path / f"{name}.png")
    said = report(tmp_path, replace(CONFIG, resolution="512"))
    (line,) = [line for line in said.splitlines() if "cropped at the sides" in line]
    assert "panorama.png" in line
    assert "square.png" not in line


@pytest.mark.parametrize("by", ["file", "alpha"])
def test_a_mask_of_which_the_crop_leaves_nothing_is_refused_by_name(by, tmp_path):
    wide = Image.new("RGBA", (640, 64), "teal")
    mask = Image.new("L", wide.size, 0)
    mask.putpixel((0, 0), 255)  # less than a latent has room for
    wide.putalpha(mask) if by == "alpha" else mask.save(tmp_path / "wide.mask.png")
    wide.save(tmp_path / "wide.png")
    with pytest.raises(UserError, match=r"the mask of wide\.png leaves nothing to learn from at \d+x\d+"):
        load(tmp_path, replace(CONFIG, mask_from=by))


# --- the report -----------------------------------------------------------------------------------------------------


def test_a_report_that_refuses_shows_all_else_it_found(folder, capsys, tiny_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(tiny_model))
    found = folder("a.png", "b.png", "reg/c.png", **{"bad.png": b"no image", "b.txt": "<zwx>"})
    Image.new("RGB", (32, 32), "red").save(found / "small.png")
    assert main([str(found), "--resolution", "64"]) == 1
    said = capsys.readouterr()
    assert said.err.strip().startswith("bad.png can't be read") or "image bad.png can't be read" in said.err
    for part in (
        "3 images",
        "too small",
        "no caption: a.png, small.png",
        "left out: 1 regularisation",
        "<zwx> is read",
    ):
        assert part in said.out
    assert str(found.parent) not in said.err + said.out.replace(str(found), "")


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"II*\0" + b"\0" * 40])
def test_no_message_names_the_folder_that_a_dataset_was_extracted_to(content, folder):
    found = folder("a.png", **{"sub/bad.png": content, "a.txt": b"\xff", "metadata.jsonl": "{"})
    with pytest.raises(UserError) as refused:
        load(found, CONFIG)
    assert str(found) not in str(refused.value)
    assert "bad.png" in str(refused.value)


def test_a_word_in_brackets_that_is_not_trained_is_said(folder):
    said = report(folder("a.png", **{"a.txt": "a <zwx>"}), replace(CONFIG, trigger_word="<ohwx>"))
    assert "<ohwx>, <zwx> is read as letters, for it isn't trained as a token" in said


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"class_word": "man"}, "'man'; 1 captions name nothing taught and are held as they are"),
        ({"preserve_prompts": "a dog|a cat"}, "preserve_prompts (2)"),
        ({"class_word": "man", "preserve_prompts": "a dog"}, "'man' and preserve_prompts (1); 1 captions name"),
    ],
)
def test_what_must_stay_is_said_with_its_share(given, what, folder):
    found = folder("a.png", "b.png", **{"a.txt": "<zwx> at sea", "b.txt": "the sea"})
    said = report(found, replace(CONFIG, train_placeholder_token=True, **given))
    assert f"10% of the batches hold {what}" in said
