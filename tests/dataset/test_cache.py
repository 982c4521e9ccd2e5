"""What is encoded once: found again by content and settings, damaged or crowded out without harm, flat in memory."""

import json
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lora_utils import caching, models, preparation, store, training
from lora_utils.config import TrainConfig
from lora_utils.dataset import read_dataset

CONFIG = TrainConfig(
    steps=4, rank=2, learning_rate=1e-3, batch_size=2, resolution="64", default_caption="a dot", seed=0
)
PLACE = models.default_place()


@pytest.fixture
def folder(tmp_path):
    """Pictures of three shapes, five in all, with two captions."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for index, size in enumerate([(64, 64), (64, 64), (64, 64), (96, 48), (48, 96)]):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index}.png")
    (pictures / "0.txt").write_text("a red circle")
    return pictures


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch):
    """How many pictures and captions were encoded since the last look, blanks not counted."""
    counts = {"pictures": 0, "captions": 0, "vae": 0, "text_encoder": 0}
    batches, encode_text = caching._encoded, caching.encode_text

    def counted_batches(vae, new):
        counts["pictures"] += len(new)
        return batches(vae, new)

    def counted_text(encoder, tokenizer, captions, placeholders):
        counts["captions"] += len(captions)
        return encode_text(encoder, tokenizer, captions, placeholders)

    monkeypatch.setattr(caching, "_encoded", counted_batches)
    monkeypatch.setattr(caching, "encode_text", counted_text)
    for part in ("vae", "text_encoder"):
        load = getattr(models, f"load_{part}")
        monkeypatch.setattr(
            models,
            f"load_{part}",
            lambda *given, part=part, load=load: counts.update({part: counts[part] + 1}) or load(*given),
        )

    def look():
        seen = dict(counts)
        counts.update(dict.fromkeys(counts, 0))
        return seen

    return look


NOTHING = {"pictures": 0, "captions": 0, "vae": 0, "text_encoder": 0}


def prepare(folder, model, config=CONFIG) -> preparation.Run:
    return preparation.prepare(config, read_dataset(folder, config), model, PLACE)


def curve(run) -> list[float]:
    return [report.loss for report in training.train(run)]


def test_a_second_run_loads_neither_vae_nor_text_encoder_and_is_the_same(folder, random_model, cache, encoded):
    first = prepare(folder, random_model)
    assert encoded() == {"pictures": 5, "captions": 3, "vae": 1, "text_encoder": 1}
    second = prepare(folder, random_model)
    assert encoded() == NOTHING
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first.examples, second.examples, strict=True))
    assert all(torch.equal(first.texts[caption], second.texts[caption]) for caption in first.texts)
    assert curve(first) == curve(second)


def test_without_a_cache_it_is_the_same_run(folder, random_model, cache, monkeypatch):
    kept = curve(prepare(folder, random_model))
    monkeypatch.setenv("CACHE_DIR", "")
    assert curve(prepare(folder, random_model)) == kept


def test_only_what_is_new_is_encoded(folder, random_model, cache, encoded):
    prepare(folder, random_model)
    encoded()
    Image.new("RGB", (64, 64), "blue").save(folder / "3.png")  # another picture under an old name
    (folder / "1.txt").write_text("a green ring")
    (folder / "4.png").rename(folder / "z.png")  # an old picture under another name
    prepare(folder, random_model)
    assert encoded() == {"pictures": 1, "captions": 1, "vae": 1, "text_encoder": 1}


@pytest.mark.parametrize(
    ("change", "pictures"),
    [({"resolution": "96"}, 5), ({"rank": 4, "seed": 3, "caption_dropout": 0.5}, 0), ({"mask_from": "file"}, 1)],
)
def test_what_an_entry_follows_from_and_what_not(change, pictures, folder, random_model, cache, encoded):
    Image.new("L", (64, 64), 200).save(folder / "0.mask.png")
    prepare(folder, random_model)
    encoded()
    prepare(folder, random_model, replace(CONFIG, **change))
    assert encoded()["pictures"] == pictures


def test_another_model_has_entries_of_its_own(folder, random_model, tiny_model, cache, encoded):
    prepare(folder, random_model)
    encoded()
    prepare(folder, tiny_model)
    assert encoded()["pictures"] == 5


def test_a_fingerprint_sees_a_change_of_weights(random_model, tmp_path):
    shutil.copytree(random_model / "vae", tmp_path / "vae")
    before = store.fingerprint(tmp_path / "vae")
    assert before == store.fingerprint(random_model / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 200_000] = bytes(200_000)
    path.write_bytes(raw)
    assert store.fingerprint(tmp_path / "vae") != before
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "latents_mean": [0.0] * 16}))
    assert store.fingerprint(tmp_path / "vae") != before


def test_a_damaged_entry_is_made_anew(folder, random_model, cache, encoded):
    first = prepare(folder, random_model)
    expected = [example.latents.clone() for example in first.examples]  # else it is the file, which changes below
    encoded()
    pictures = [path for path in cache.glob("*/*") if b"latents" in path.read_bytes()]
    pictures[0].write_bytes(pictures[0].read_bytes()[:-10])
    pictures[1].write_bytes(b"")
    again = prepare(folder, random_model)
    assert encoded() == {"pictures": 2, "captions": 0, "vae": 1, "text_encoder": 0}
    assert all(torch.equal(a, b.latents) for a, b in zip(expected, again.examples, strict=True))


def test_a_full_disk_costs_memory_and_nothing_else(folder, random_model, cache, encoded, monkeypatch, caplog):
    monkeypatch.setattr(store.log, "propagate", True)
    monkeypatch.setattr(store, "LEAST_FREE_BYTES", 1 << 60)
    run = prepare(folder, random_model)
    assert len(caplog.records) == 1, "said once, not for each entry"
    assert "can't be written" in caplog.text
    assert len(curve(run)) == CONFIG.steps
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_folder_of_another_user_or_that_cannot_be_made_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv("CACHE_DIR")
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path))
    assert store.open_store().folder == tmp_path / f"qwen-image-cache-{os.getuid()}"
    assert store.open_store().folder.stat().st_mode & 0o077 == 0, "nobody else reads the pictures"
    own = os.getuid()
    (tmp_path / f"qwen-image-cache-{own}").rename(tmp_path / f"qwen-image-cache-{own + 1}")
    monkeypatch.setattr(store.os, "getuid", lambda: own + 1)
    assert store.open_store().folder is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "file"))
    assert store.open_store().folder is None


def test_the_longest_unused_go_first_and_none_that_may_be_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_BYTES", 1000)
    kept = store.Store(tmp_path)
    keys = [store.key_of(index=index) for index in range(6)]
    for age_days, key in zip([0, 0.5, 2, 3, 4, 5], keys, strict=True):
        kept.keep(key, {"x": torch.zeros(64)})
        used_at = time.time() - age_days * 86400
        os.utime(kept._path(key), (used_at, used_at))
    kept.used.clear()
    kept.used.add(keys[5])
    kept.trim()
    assert [kept._path(key).exists() for key in keys] == [True, True, False, False, False, True]


def test_latents_do_not_depend_on_what_else_is_encoded(folder, random_model, tmp_path):
    """A picture alone, in company, and at another place of the batch: the same bits."""
    examples = read_dataset(folder, replace(CONFIG, resolution="256")).examples
    assert caching.batch_size(examples[0].size) > 1
    together = caching.cache_examples(examples, random_model, PLACE, store.Store(None))
    backwards = caching.cache_examples(examples[::-1], random_model, PLACE, store.Store(None))[::-1]
    for index, example in enumerate(examples):
        (alone,) = caching.cache_examples([example], random_model, PLACE, store.Store(None))
        assert torch.equal(alone.latents, together[index].latents)
        assert torch.equal(alone.latents, backwards[index].latents)


def test_pictures_on_disk_are_not_held_in_memory(folder, random_model, cache):
    run = prepare(folder, random_model)
    assert run.examples[0].latents is not run.examples[0].latents
    assert run.texts["a dot"] is not run.texts["a dot"]
    assert not list(cache.rglob("*.partial"))
