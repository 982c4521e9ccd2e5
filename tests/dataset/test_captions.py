"""Captions in the forms that users have them, and what `[trigger]` becomes."""

import json
import unicodedata

import pytest
from PIL import Image

from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.dataset.caption_texts import with_trigger
from lora_utils.errors import UserError
from lora_utils.triggers import TRIGGER


@pytest.fixture
def read(tmp_path):
    """Captions by image, of a folder with these files; images are made for the names that are none."""

    def make(files, images=("one.png", "two.png"), default="", **given):
        for index, name in enumerate(images):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (64, 64), "white")
            image.paste((index * 20, 9, 9), (index, 9, 40, 30 + index))
            image.save(tmp_path / name, "png")
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        found = load(tmp_path, TrainConfig(resolution="64", default_caption=default, seed=0, **given))
        return {str(e.image_path.relative_to(tmp_path)): e.caption for e in found.examples}, found

    return make


@pytest.mark.parametrize("name", ["one.txt", "one.caption", "one.TXT", "one.Caption", "one.png.txt", "ONE.txt"])
def test_a_caption_beside_its_image(name, read):
    found, dataset = read({name: " a fox \n"}, default="none")
    assert found == {"one.png": "a fox", "two.png": "none"}
    assert not dataset.left_out


TABLES = {
    "metadata.jsonl": '{"file_name": "one.png", "text": "a fox"}\n\n{"file_name": "./two.png", "text": "a bear"}\n',
    "metadata.csv": 'file_name,text\none.png,a fox\ntwo.png,"a bear"\n',
    "captions.json": json.dumps({"one.png": "a fox", "two.png": {"caption": "a bear", "source": "me"}}),
    "Captions.JSON": json.dumps([{"file": "one.png", "prompt": "a fox"}, {"image": "TWO.png", "text": "a bear"}]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_captions(name, read):
    found, dataset = read({name: TABLES[name]})
    assert found == {"one.png": "a fox", "two.png": "a bear"}
    assert not dataset.left_out


def test_names_in_a_table_are_relative_to_it_whatever_slashes_and_accents(read):
    apart = unicodedata.normalize("NFD", "Bär é.png")
    rows = [{"file_name": "deep\\Bär é.png", "text": "ein Bär"}, {"file_name": "狐.PNG", "text": "狐"}]
    found, _ = read(
        {"b/metadata.jsonl": "\n".join(map(json.dumps, rows)), "metadata.csv": "file_name,text\nc/x.png,fox\n"},
        images=(f"b/deep/{apart}", "b/狐.png", "c/x.png"),
    )
    assert found == {f"b/deep/{apart}": "ein Bär", "b/狐.png": "狐", "c/x.png": "fox"}


def test_images_and_captions_that_differ_in_case_alone_keep_their_own(read):
    found, _ = read({"a.txt": "small", "A.txt": "large"}, images=("a.png", "A.png"))
    assert found == {"a.png": "small", "A.png": "large"}


def test_a_caption_beside_its_image_wins_over_a_table(read):
    found, _ = read({"metadata.csv": TABLES["metadata.csv"], "two.txt": "another bear"})
    assert found == {"one.png": "a fox", "two.png": "another bear"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"metadata.jsonl": '{"file_name": "three.png", "text": "x"}'},
            r"metadata\.jsonl names 'three\.png', and there",
        ),
        ({"metadata.jsonl": "{"}, r"metadata\.jsonl can't be read"),
        ({"metadata.jsonl": '{"file_name": "one.png"}'}, r"metadata\.jsonl, row 1: expected file_name and text"),
        ({"metadata.csv": "file_name,text\none.png\n"}, r"metadata\.csv, row 1: expected"),
        ({"metadata.csv": 'a,b\n"x'}, r"metadata\.csv can't be read"),
        ({"captions.json": "3"}, r"captions\.json must hold an object or a list"),
        ({"captions.json": '{"one.png": 3}'}, r"captions\.json, row 1: expected"),
        ({"captions.json": "[" * 100_000}, r"captions\.json can't be read"),
        ({"captions.json": b"\xff\xfe"}, r"captions\.json isn't UTF-8"),
        ({"one.txt": b"\xff\xfe"}, r"one\.txt isn't UTF-8 text .*; save it as UTF-8"),
        ({"one.txt": b"a\0b"}, r"one\.txt holds zero bytes"),
        ({"one.txt": b"x" * 70_000}, r"one\.txt has 70000 bytes; 65536 are the most"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(files, message, read):
    with pytest.raises(UserError, match=message):
        read(files)


def test_all_that_is_wrong_is_said_at_once(read):
    files = {"one.txt": b"\xff", "broken.png": b"no image", "metadata.csv": "file_name,text\nthree.png,x\n"}
    with pytest.raises(UserError) as caught:
        read({**files, "two.txt": "[trigger]"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "the dataset has 4 problems:"
    assert [word for word in ("three.png", "one.txt", "broken.png", "two.png") if word in str(caught.value)] == [
        "three.png",
        "one.txt",
        "broken.png",
        "two.png",
    ]


def test_a_thousand_problems_are_counted_and_the_first_are_shown(read):
    with pytest.raises(UserError) as caught:
        read({f"{index:03}.png": b"x" for index in range(30)})
    assert "30 problems" in str(caught.value)
    assert str(caught.value).endswith("and 10 more")


# --- triggers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "word", "tokens", "expected"),
    [
        ("a photo of [trigger]", "ohwx", (), "a photo of ohwx"),
        ("a photo of [trigger]", "", ("<zwx>",), "a photo of <zwx>"),
        ("[trigger], [trigger]s", "ohwx", ("<zwx>",), "ohwx, ohwxs"),
        ("a fox", "ohwx", (), "ohwx, a fox"),
        ("a fox, ohwx", "ohwx", (), "a fox, ohwx"),
        ("", "ohwx", (), "ohwx"),
        ("a fox", "", ("<zwx>",), "a fox"),
        ("a fox", "<zwx>", ("<zwx>",), "<zwx>, a fox"),
    ],
)
def test_the_trigger_is_written_out_or_put_in_front(caption, word, tokens, expected):
    assert with_trigger(caption, word, tokens) == expected


@pytest.mark.parametrize(
    ("tokens", "message"), [((), "neither trigger_word nor token"), (("<a>", "<b>"), "could be <a>, <b>")]
)
def test_a_trigger_that_could_be_nothing_or_several_is_refused(tokens, message):
    with pytest.raises(UserError, match=message):
        with_trigger(f"a {TRIGGER}", "", tokens)


def test_how_many_captions_were_given_the_trigger_word_is_said(read):
    found, dataset = read({"one.txt": "a fox", "two.txt": "ohwx, a bear"}, trigger_word="ohwx")
    assert found == {"one.png": "ohwx, a fox", "two.png": "ohwx, a bear"}
    assert "1 captions were given the trigger word 'ohwx'" in "\n".join(dataset.notes)
