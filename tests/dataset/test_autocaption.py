"""Images that the text encoder describes. The small model's vision tower knows nothing: these test the mechanics."""

import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from lora_utils.config import TrainConfig
from lora_utils.dataset import autocaption, load
from lora_utils.errors import UserError
from lora_utils.model.device import Placement, default_placement
from lora_utils.model.text_encoder import load_text_encoder, load_tokenizer
from lora_utils.training import loop
from tests.helpers import make_state

CONFIG = TrainConfig(
    resolution="64",
    autocaption=True,
    autocaption_prefix="a photo of <zwx>, ",
    autocaption_suffix=" [drawn]",
    seed=0,
    train_placeholder_token=True,
    steps=2,
    rank=2,
)


@pytest.fixture
def found(tmp_path):
    """Two images of unequal shape without a caption, and one with."""
    for name, size, colour in (("a", (64, 64), "red"), ("b", (96, 48), "blue"), ("c", (64, 64), "green")):
        image = Image.new("RGB", size, colour)
        image.paste("white", (5, 5, 30, 20))
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "c.txt").write_text("a <zwx> with a caption of its own")
    return load(tmp_path, CONFIG)


@pytest.fixture
def captioned(found, random_model):
    tokenizer = load_tokenizer(random_model)
    return autocaption.write_captions(found, CONFIG, random_model, tokenizer, default_placement())


def test_images_without_a_caption_get_one_with_prefix_and_suffix(captioned):
    one, other, own = captioned.captions
    assert own == "a <zwx> with a caption of its own"
    for caption in (one, other):
        assert caption.startswith("a photo of <zwx>, ")
        assert caption.endswith(" [drawn]")
        assert caption.isprintable()
        assert len(caption) > 30
    assert one != other, "what is said depends on the image"
    assert not captioned.uncaptioned


def test_the_same_image_is_described_the_same_way_as_transformers_own_model_does(random_model, found):
    """Our loading of the weights, part by part, against from_pretrained."""
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(random_model / "text_encoder").eval()
    tokenizer, image = load_tokenizer(random_model), Image.new("RGB", (64, 48), "red")
    with autocaption._vision_language_model(random_model, default_placement()) as ours:
        assert autocaption.describe_image(ours, tokenizer, image) == autocaption.describe_image(stock, tokenizer, image)
        state, expected = ours.state_dict(), stock.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_it_is_freed_before_anything_else_is_loaded(random_model, found, monkeypatch):
    seen = []
    describe, load = autocaption.describe_image, load_text_encoder
    monkeypatch.setattr(
        autocaption, "describe_image", lambda model, *given: seen.append(weakref.ref(model)) or describe(model, *given)
    )

    def loading(*given):
        assert seen
        assert all(reference() is None for reference in seen)
        return load(*given)

    monkeypatch.setattr("lora_utils.training.encoding.load_text_encoder", loading)
    run = make_state(CONFIG, found, random_model)
    assert {example.caption for example in run.data.examples} == set(run.data.captions)
    assert sum("[drawn]" in caption for caption in run.data.captions) == 2
    assert len(list(loop.train(run))) == 2
    assert run.seconds["describe"] > 0


def test_without_room_on_the_gpu_it_runs_on_the_cpu(random_model, monkeypatch, caplog):
    caplog.set_level("INFO", "lora_utils")
    monkeypatch.setattr(autocaption, "free_bytes", lambda _device: 0.0)
    with autocaption._vision_language_model(random_model, Placement(torch.device("meta"), torch.float32)) as model:
        assert model.device.type == "cpu"
    assert "on the CPU" in caplog.text


def test_a_token_that_no_written_caption_could_hold_is_refused_at_once():
    with pytest.raises(UserError, match=r"set autocaption_prefix to something like 'a photo of <zwx>, '"):
        replace(CONFIG, autocaption_prefix="", autocaption_suffix="")
    assert replace(CONFIG, autocaption_prefix="[trigger], ").autocaption


def test_trigger_and_trigger_word_stand_in_written_captions(found, random_model):
    config = replace(
        CONFIG, train_placeholder_token=False, trigger_word="ohwx", autocaption_prefix="", autocaption_suffix=""
    )
    tokenizer = load_tokenizer(random_model)
    written = autocaption.write_captions(found, config, random_model, tokenizer, default_placement())
    assert written.captions[0].startswith("ohwx, ")


def test_a_machine_without_room_for_the_converted_model_is_refused(random_model, monkeypatch):
    """The files are fp32; in bf16 their weights would be held, and not mapped."""
    monkeypatch.setattr(autocaption, "free_ram_bytes", lambda: 1.0)
    bf16 = Placement(torch.device("cpu"), torch.bfloat16)
    model = autocaption._vision_language_model(random_model, bf16)
    with pytest.raises(UserError, match=r"autocaption needs .* GB are free; write the captions yourself"), model:
        pass
    with autocaption._vision_language_model(random_model, default_placement()):
        pass
