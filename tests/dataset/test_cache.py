"""What is encoded once: found again by content and settings, damaged or crowded out without harm, flat in memory."""

import json
import os
import shutil
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lora_utils.config import TrainConfig
from lora_utils.dataset import cache, load, text_cache
from lora_utils.dataset.cache import _encoded, cache_examples, encode_batch_size
from lora_utils.io import tensor_store
from lora_utils.io.tensor_store import TensorStore, content_key, folder_fingerprint, open_tensor_store
from lora_utils.model.device import default_placement
from lora_utils.training import loop
from lora_utils.training.state import TrainState
from tests.helpers import make_state

CONFIG = TrainConfig(
    steps=4, rank=2, learning_rate=1e-3, batch_size=2, resolution="64", default_caption="a dot", seed=0
)
PLACE = default_placement()


@pytest.fixture
def folder(tmp_path):
    """Images of three shapes, five in all, with two captions."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index, size in enumerate([(64, 64), (64, 64), (64, 64), (96, 48), (48, 96)]):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    (images / "0.txt").write_text("a red circle")
    return images


@pytest.fixture
def folder_of_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch):
    """How many images and captions were encoded since the last look, blanks not counted."""
    counts = {"images": 0, "captions": 0, "vae": 0, "text_encoder": 0}
    batches, encode_text = _encoded, text_cache.encode_text

    def counted_batches(vae, new):
        counts["images"] += len(new)
        return batches(vae, new)

    def counted_text(encoder, tokenizer, captions, *given):
        counts["captions"] += len(captions)
        return encode_text(encoder, tokenizer, captions, *given)

    monkeypatch.setattr(cache, "_encoded", counted_batches)
    monkeypatch.setattr(text_cache, "encode_text", counted_text)
    for part in ("vae", "text_encoder"):
        home = cache if part == "vae" else sys.modules["lora_utils.training.encoding"]
        load = getattr(home, f"load_{part}")
        monkeypatch.setattr(
            home,
            f"load_{part}",
            lambda *given, part=part, load=load: counts.update({part: counts[part] + 1}) or load(*given),
        )

    def look():
        seen = dict(counts)
        counts.update(dict.fromkeys(counts, 0))
        return seen

    return look


NOTHING = {"images": 0, "captions": 0, "vae": 0, "text_encoder": 0}


def new_run(folder, model, config=CONFIG) -> TrainState:
    return make_state(config, load(folder, config), model)


def curve(run) -> list[float]:
    return [report.loss for report in loop.train(run)]


def test_a_second_run_loads_neither_vae_nor_text_encoder_and_is_the_same(
    folder, random_model, folder_of_cache, encoded
):
    first = new_run(folder, random_model)
    assert encoded() == {"images": 5, "captions": 3, "vae": 1, "text_encoder": 1}
    second = new_run(folder, random_model)
    assert encoded() == NOTHING
    assert all(
        torch.equal(a.latents, b.latents) for a, b in zip(first.data.examples, second.data.examples, strict=True)
    )
    assert all(torch.equal(first.data.texts[caption], second.data.texts[caption]) for caption in first.data.texts)
    assert curve(first) == curve(second)


def test_captions_of_a_token_that_does_not_learn_follow_from_its_embedding(
    folder, random_model, folder_of_cache, encoded
):
    (folder / "0.txt").write_text("a <zwx>")
    frozen = replace(CONFIG, train_placeholder_token=True, placeholder_learning_rate=0.0)
    first = new_run(folder, random_model, frozen)
    encoded()
    second = new_run(folder, random_model, frozen)
    assert encoded() == {**NOTHING, "text_encoder": 1}, "for its words"
    assert curve(first) == curve(second)
    new_run(folder, random_model, replace(frozen, seed=frozen.seed + 1))
    assert encoded() == {**NOTHING, "text_encoder": 1, "captions": 1}, "another seed is another embedding"


def test_without_a_cache_it_is_the_same_run(folder, random_model, folder_of_cache, monkeypatch):
    kept = curve(new_run(folder, random_model))
    monkeypatch.setenv("CACHE_DIR", "")
    assert curve(new_run(folder, random_model)) == kept


def test_only_what_is_new_is_encoded(folder, random_model, folder_of_cache, encoded):
    new_run(folder, random_model)
    encoded()
    Image.new("RGB", (64, 64), "blue").save(folder / "3.png")  # another image under an old name
    (folder / "1.txt").write_text("a green ring")
    (folder / "4.png").rename(folder / "z.png")  # an old image under another name
    new_run(folder, random_model)
    assert encoded() == {"images": 1, "captions": 1, "vae": 1, "text_encoder": 1}


@pytest.mark.parametrize(
    ("change", "images"),
    [({"resolution": "96"}, 5), ({"rank": 4, "seed": 3, "caption_dropout": 0.5}, 0), ({"mask_from": "file"}, 1)],
)
def test_what_an_entry_follows_from_and_what_not(change, images, folder, random_model, folder_of_cache, encoded):
    Image.new("L", (64, 64), 200).save(folder / "0.mask.png")
    new_run(folder, random_model)
    encoded()
    new_run(folder, random_model, replace(CONFIG, **change))
    assert encoded()["images"] == images


def test_another_model_has_entries_of_its_own(folder, random_model, tiny_model, folder_of_cache, encoded):
    new_run(folder, random_model)
    encoded()
    new_run(folder, tiny_model)
    assert encoded()["images"] == 5


def test_a_fingerprint_sees_a_change_of_weights(random_model, tmp_path):
    shutil.copytree(random_model / "vae", tmp_path / "vae")
    before = folder_fingerprint(tmp_path / "vae")
    assert before == folder_fingerprint(random_model / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 200_000] = bytes(200_000)
    path.write_bytes(raw)
    assert folder_fingerprint(tmp_path / "vae") != before
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "latents_mean": [0.0] * 16}))
    assert folder_fingerprint(tmp_path / "vae") != before


def test_a_damaged_entry_is_made_again(folder, random_model, folder_of_cache, encoded):
    first = new_run(folder, random_model)
    expected = [example.latents.clone() for example in first.data.examples]  # else it is the file, which changes below
    encoded()
    images = [path for path in folder_of_cache.glob("*/*") if b"latents" in path.read_bytes()]
    images[0].write_bytes(images[0].read_bytes()[:-10])
    images[1].write_bytes(b"")
    again = new_run(folder, random_model)
    assert encoded() == {"images": 2, "captions": 0, "vae": 1, "text_encoder": 0}
    assert all(torch.equal(a, b.latents) for a, b in zip(expected, again.data.examples, strict=True))


def test_a_full_disk_costs_memory_and_nothing_else(folder, random_model, folder_of_cache, encoded, monkeypatch, caplog):
    monkeypatch.setattr(tensor_store, "LEAST_FREE_BYTES", 1 << 60)
    run = new_run(folder, random_model)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, "said once, not for each entry"
    assert "can't be written" in caplog.text
    assert len(curve(run)) == CONFIG.steps
    assert [path for path in folder_of_cache.rglob("*") if path.is_file()] == []


def test_a_folder_of_another_user_or_that_cannot_be_made_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv("CACHE_DIR")
    monkeypatch.setattr(tensor_store.tempfile, "gettempdir", lambda: str(tmp_path))
    assert open_tensor_store().folder == tmp_path / f"qwen-image-cache-{os.getuid()}"
    assert open_tensor_store().folder.stat().st_mode & 0o077 == 0, "nobody else reads the images"
    own = os.getuid()
    (tmp_path / f"qwen-image-cache-{own}").rename(tmp_path / f"qwen-image-cache-{own + 1}")
    monkeypatch.setattr(tensor_store.os, "getuid", lambda: own + 1)
    assert open_tensor_store().folder is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "file"))
    assert open_tensor_store().folder is None


def test_the_longest_unused_go_first_and_none_that_may_be_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "MAX_BYTES", 1000)
    kept = TensorStore(tmp_path)
    keys = [content_key(index=index) for index in range(6)]
    for age_days, key in zip([0, 0.5, 2, 3, 4, 5], keys, strict=True):
        kept.put(key, {"x": torch.zeros(64)})
        used_at = time.time() - age_days * 86400
        os.utime(kept._path(key), (used_at, used_at))
    kept.used.clear()
    kept.used.add(keys[5])
    kept.trim()
    assert [kept._path(key).exists() for key in keys] == [True, True, False, False, False, True]


def test_latents_do_not_depend_on_what_else_is_encoded(folder, random_model, tmp_path):
    """An image alone, in company, and at another place of the batch: the same bits."""
    examples = load(folder, replace(CONFIG, resolution="128")).examples
    assert encode_batch_size(examples[0].size) > 1
    together = cache_examples(examples, random_model, PLACE, TensorStore(None))
    backwards = cache_examples(examples[::-1], random_model, PLACE, TensorStore(None))[::-1]
    for index, example in enumerate(examples):
        (alone,) = cache_examples([example], random_model, PLACE, TensorStore(None))
        assert torch.equal(alone.latents, together[index].latents)
        assert torch.equal(alone.latents, backwards[index].latents)


def test_images_on_disk_are_not_held_in_memory(folder, random_model, folder_of_cache):
    run = new_run(folder, random_model)
    assert run.data.examples[0].latents is not run.data.examples[0].latents
    assert run.data.texts["a dot"] is not run.data.texts["a dot"]
    assert not list(folder_of_cache.rglob("*.partial"))
