"""Pairs in every layout that users have: which image is edited into which, and what is refused at once, by name."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.dataset.__main__ import main
from lora_utils.dataset.report import describe_dataset
from lora_utils.errors import UserError
from lora_utils.model.latents import Size
from lora_utils.model.variant import EDIT, EDIT_PLUS, TEXT_TO_IMAGE

CONFIG = TrainConfig(resolution="64", seed=0, control_resolution="auto")


def write(folder, *names, size=(64, 64)):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (40 * index % 255, 90, 10)).save(path)


def controls(folder, variant=EDIT_PLUS, config=CONFIG):
    """-> names of the images to edit, by the image that is learned"""
    found = load(folder, config, variant=variant)
    return {
        str(example.image_path.relative_to(folder)): [str(c.image_path.relative_to(folder)) for c in example.controls]
        for example in found.examples
    }


ONE = {"a.png": ["a.control.png"], "b.jpg": ["b.control.webp"]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("a.png", "a.control.png", "b.jpg", "b.control.webp"), ONE),
        (("a.png", "a.control_1.png", "a.control_2.png"), {"a.png": ["a.control_1.png", "a.control_2.png"]}),
        (("a.png", "control/a.jpg"), {"a.png": ["control/a.jpg"]}),
        (("target/a.png", "control/a.jpg"), {"target/a.png": ["control/a.jpg"]}),
        (("x/a.png", "x/control_1/a.jpg", "x/control_2/a.png"),
         {"x/a.png": ["x/control_1/a.jpg", "x/control_2/a.png"]}),
        (("a.png", "control_2/a.png", "control/a.png", "control_1/a.png"),
         {"a.png": ["control/a.png", "control_1/a.png", "control_2/a.png"]}),
        (("A.PNG", "Control/a.png"), {"A.PNG": ["Control/a.png"]}),
    ],
)  # fmt: skip
def test_pairs_are_found_by_name(files, expected, tmp_path):
    write(tmp_path, *files)
    assert controls(tmp_path) == expected


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("metadata.jsonl", [{"file_name": "t.png", "text": "x", "control": "s/1.png"}]),
        ("metadata.jsonl", [{"image": "t.png", "caption": "x", "control_path": "s/1.png"}]),
        ("metadata.jsonl", [{"file_name": "t.png", "prompt": "x", "control_path_0": "s/1.png"}]),
        ("metadata.jsonl", [{"file_name": "t.png", "prompt": "x", "edit_image": ["s/1.png"]}]),
        ("metadata.csv", [{"image": "t.png", "prompt": "x", "edit_image": "s/1.png"}]),
    ],
)
def test_pairs_are_found_in_the_tables_of_other_trainers(table, rows, tmp_path):
    write(tmp_path, "t.png", "s/1.png")
    if table.endswith("csv"):
        text = ",".join(rows[0]) + "\n" + ",".join(rows[0].values())
    else:
        text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / table).write_text(text)
    assert controls(tmp_path) == {"t.png": ["s/1.png"]}


def test_a_table_orders_several_images_and_one_may_serve_many(tmp_path):
    write(tmp_path, "t.png", "u.png", "s/1.png", "s/2.png")
    rows = [
        {"file_name": "t.png", "text": "x", "control_1": "s/2.png", "control_0": "s/1.png"},
        {"file_name": "u.png", "text": "x", "edit_image": ["s/2.png", "s/1.png"]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert controls(tmp_path) == {"t.png": ["s/1.png", "s/2.png"], "u.png": ["s/2.png", "s/1.png"]}


def test_an_edited_image_may_be_edited_again(tmp_path):
    write(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        {"file_name": "b.png", "text": "x", "control": "a.png"},
        {"file_name": "c.png", "text": "x", "control": "b.png"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert controls(tmp_path) == {"b.png": ["a.png"], "c.png": ["b.png"]}


def test_images_to_edit_keep_their_aspect_ratio_in_the_area_that_sampling_uses(tmp_path):
    write(tmp_path, "a.png")
    write(tmp_path, "a.control.png", size=(90, 30))
    for resolution, size in (("1024", Size(1760, 576)), ("auto", Size(96, 32)), ("512", Size(896, 288))):
        config = TrainConfig(resolution="64", seed=0, control_resolution=resolution)
        (example,) = load(tmp_path, config, variant=EDIT_PLUS).examples
        assert example.size == Size(64, 64), "the bucket follows the target"
        assert [control.size for control in example.controls] == [size]


REFUSED = [
    (("a.png", "b.png", "b.control.png"), EDIT_PLUS, "a.png: no image to edit; add NAME.control.png"),
    (("a.png", "a.control.png", "c.control.png"), EDIT_PLUS, "c.control.png: an image to edit without the image"),
    (("a.png", "b.png"), EDIT_PLUS, "the base model edits images, and the dataset holds none to edit"),
    (("a.png", "a.control.png"), TEXT_TO_IMAGE, "a.control.png are images to edit, and the base model makes images"),
    (
        ("a.png", "a.control.png", "control/a.png"),
        EDIT_PLUS,
        "a.control.png and control/a.png are the same image to edit of a.png; number them, or keep one",
    ),
    (("a.png", "a.control_1.png", "a.control_2.png"), EDIT, "have 2 to edit each, and the base model takes 1"),
    (
        ("a.png", "a.control.png", "b.png", "b.control.png", "c.png", "c.control_1.png", "c.control_2.png"),
        EDIT_PLUS,
        "most images have 1 to edit, but c.png 2; give all the same number",
    ),
]


@pytest.mark.parametrize(("files", "variant", "message"), REFUSED)
def test_what_does_not_pair_up_is_named_before_anything_is_loaded(files, variant, message, tmp_path):
    write(tmp_path, *files)
    with pytest.raises(UserError) as refused:
        load(tmp_path, CONFIG, variant=variant)
    assert message in str(refused.value)


def test_an_image_that_is_too_long_and_a_caption_to_be_written_are_refused(tmp_path):
    write(tmp_path, "a.png")
    write(tmp_path, "a.control.png", size=(640, 8))
    with pytest.raises(UserError, match=r"a\.control\.png has 640x8 pixels, and an image to edit may be 50 times"):
        load(tmp_path, CONFIG, variant=EDIT_PLUS)
    write(tmp_path, "a.control.png")
    with pytest.raises(UserError, match="autocaption describes images, and pairs need instructions"):
        load(tmp_path, replace(CONFIG, autocaption=True), variant=EDIT_PLUS)


def test_the_report_says_what_is_edited(tmp_path):
    write(tmp_path, "a.png", "a.control.png", "b.png", "b.control.png")
    found = load(tmp_path, CONFIG, variant=EDIT_PLUS)
    assert "  to edit: 1 for each, 64x64 (2)" in describe_dataset(found, CONFIG)


def test_the_datasets_command_knows_pairs_of_an_editing_base(edit_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BASE_MODEL", str(edit_models["2511"]))
    write(tmp_path / "images", "a.png", "a.control.png", "b.png")
    assert main([str(tmp_path / "images"), "--resolution", "64"]) == 1
    assert "b.png: no image to edit" in capsys.readouterr().err


def test_all_that_is_wrong_with_pairs_is_named_at_once(tmp_path):
    write(tmp_path, "a.png", "b.png", "b.control.png", "c.control.png", "d.png", "d.control.png")
    (tmp_path / "d.control.png").write_bytes(b"no image")
    with pytest.raises(UserError) as refused:
        load(tmp_path, CONFIG, variant=EDIT_PLUS)
    assert all(name in str(refused.value) for name in ("a.png", "c.control.png", "d.control.png"))


def test_a_table_that_names_a_missing_image_to_edit_is_refused(tmp_path):
    write(tmp_path, "t.png", "s/1.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "t.png", "text": "x", "control": "s/2.png"}))
    with pytest.raises(UserError, match=r"names 's/2\.png' to edit, and there is no such image"):
        load(tmp_path, CONFIG, variant=EDIT_PLUS)
