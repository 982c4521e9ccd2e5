"""dataset.json, captions that vary, mirrored images, images without captions, and regularisation images."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from lora_utils.config import TrainConfig
from lora_utils.dataset.caption_texts import shown_caption
from lora_utils.dataset.scan import load
from lora_utils.errors import UserError
from lora_utils.model.vae import encode_images, load_vae
from lora_utils.training import loop
from lora_utils.training.batch_plans import bucket_batches, plan_batches, shown_captions
from lora_utils.training.batches import BatchStream
from lora_utils.training.checkpoint import save_checkpoint
from tests.dataset.test_conventions import CONFIG, names, report
from tests.helpers import SHORT_RUN, losses, make_state, resume_state, same_result

TOKEN = replace(CONFIG, train_placeholder_token=True, default_caption="")


def by_name(dataset):
    return {example.image_path.name: example for example in dataset.examples}


# --- dataset.json ---------------------------------------------------------------------------------------------------


def test_a_folders_settings_hold_for_its_images_and_the_nearest_counts(folder):
    settings = {"repeats": 2, "caption_prefix": "a <zwx> ", "folders": {"b": {"repeats": 6}}}
    found = load(
        folder(
            "a.png", "b/b.png", "b/c/c.png", "3_d/d.png",
            **{"dataset.json": json.dumps(settings), "b/c/dataset.json": '{"caption_prefix": "deep "}'},
            **{f"{name}.txt": "cat" for name in ("a", "b/b", "b/c/c", "3_d/d")},
        ),
        TOKEN,
    )  # fmt: skip
    found = by_name(found)
    assert {name: (e.repeats, e.caption) for name, e in found.items()} == {
        "a.png": (1, "a <zwx> cat"),
        "b.png": (3, "a <zwx> cat"),
        "c.png": (3, "deep cat"),
        "d.png": (1, "a <zwx> cat"),
    }


def test_a_folder_has_resolutions_of_its_own(folder):
    found = by_name(load(folder("a.png", "b/b.png", **{"b/dataset.json": '{"resolution": 96}'}), CONFIG))
    assert {name: example.size.width_px for name, example in found.items()} == {"a.png": 64, "b.png": 96}


def test_a_folder_goes_without_masks(folder):
    where = folder("a.png", "b/b.png", **{"b/dataset.json": '{"mask": false}'})
    for name in ("a", "b/b"):
        Image.new("L", (64, 64), 255).save(where / f"{name}.mask.png")
    found = by_name(load(where, replace(CONFIG, mask_from="file")))
    assert {name: example.masked for name, example in found.items()} == {"a.png": True, "b.png": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "dataset.json must hold an object of settings, got list"),
        ("{", "dataset.json can't be read"),
        ('{"repeat": 2}', "has no setting 'repeat'; it takes repeats, resolution, caption_prefix"),
        ('{"repeats": 0}', "repeats must be a whole number from 1 to 1000, got 0"),
        ('{"repeats": true}', "repeats must be a whole number"),
        ('{"flip": "yes"}', "flip must be true or false, got 'yes'"),
        ('{"resolution": "77"}', "resolution takes multiples of 16"),
        ('{"caption_prefix": 3}', "caption_prefix must be a text"),
        ('{"folders": []}', "must be an object of settings by folder"),
        ('{"folders": {"x": {}}}', "there is no folder 'x' beside it"),
        ('{"folders": {"b": 3}}', "folder 'b' must be an object of settings"),
        ('{"folders": {"../set/b": {}}}', "there is no folder '../set/b' beside it"),
        ('{"folders": {"/": {}}}', "there is no folder '/' beside it"),
    ],
)
def test_settings_that_cannot_be_are_named(text, message, folder):
    with pytest.raises(UserError, match=message):
        load(folder("a.png", "b/b.png", **{"dataset.json": text}), CONFIG)


def test_the_sidecar_of_an_image_called_dataset_is_its_caption(folder):
    found = load(folder("dataset.png", **{"dataset.json": '{"caption": "a cat"}'}), CONFIG)
    assert found.captions == ["a cat"]


# --- captions -------------------------------------------------------------------------------------------------------


def test_each_line_is_a_caption_and_all_come_up_alike(folder):
    config = replace(TOKEN, caption_variants=True, trigger_word="<zwx>", caption_dropout=0.0)
    found = load(folder("a.png", **{"a.txt": "a cat\n\n a <zwx> dog \nsnow"}), config)
    plans = plan_batches(config, found.examples)
    counts = Counter(caption for plan in islice(plans, 300) for caption in plan.captions)
    assert set(counts) == {"<zwx>, a cat", "a <zwx> dog", "<zwx>, snow"}
    assert min(counts.values()) > 70
    assert shown_captions(config, found.examples, 300) == ["<zwx>, a cat", "a <zwx> dog", "<zwx>, snow"]
    (found.folder / "dataset.json").write_text('{"caption_prefix": "big "}')
    prefixed = load(found.folder, config)
    assert shown_captions(config, prefixed.examples, 300) == ["<zwx>, big a cat", "big a <zwx> dog", "<zwx>, big snow"]
    (found.folder / "dataset.json").unlink()
    said = report(found.folder, config)
    assert "<zwx>, a cat | a <zwx> dog | <zwx>, snow" in said
    assert "1 images have several captions, a line each, of which one is taken at random" in said
    assert "read as one text" not in said
    plain = load(found.folder, replace(config, caption_variants=False))
    assert len(plain.captions) == 1
    assert "\n" in plain.captions[0]


def test_tags_are_shuffled_behind_those_that_are_kept():
    config, generator = TrainConfig(caption_shuffle=2, seed=0), torch.Generator().manual_seed(0)
    shown = {shown_caption("<zwx>, man, hat, snow,  tree", config, generator) for _ in range(60)}
    assert len(shown) == 6
    assert all(sorted(text.split(", ")) == sorted(["<zwx>", "man", "hat", "snow", "tree"]) for text in shown)
    assert all(text.startswith("<zwx>, man, ") for text in shown)
    assert shown_caption("one, two", replace(config, caption_shuffle=None), generator) == "one, two"


def test_a_run_of_varying_captions_mirrored_and_regularisation_images_is_resumed_bit_for_bit(
    dataset, random_model, tmp_path
):
    config = replace(SHORT_RUN, caption_shuffle=0, class_word="square", caption_variants=True, prior_loss_weight=0.5)
    examples = [
        replace(example, caption=f"{example.caption}, big, {index}, old\na <zwx>", flip=True)
        for index, example in enumerate(dataset.examples[:6])
    ]
    examples += [replace(each, caption="a square, plain", regularisation=True) for each in dataset.examples[6:]]
    varied = replace(dataset, examples=examples)
    assert len(shown_captions(config, examples, config.steps)) > len(examples) + 2
    uninterrupted, first = (make_state(config, varied, random_model) for _ in range(2))
    expected = losses(uninterrupted)
    before = losses(first, 3)
    second = resume_state(config, varied, random_model, save_checkpoint(first, tmp_path, keep=1))
    assert before + losses(second) == expected
    assert same_result(uninterrupted, second)


def test_images_without_a_caption_are_trained_skipped_or_refused(folder):
    where = folder("a.png", "b.png", **{"a.txt": "a cat"})
    config = replace(CONFIG, default_caption="")
    assert names(load(where, config)) == {"a.png", "b.png"}
    skipping = replace(config, uncaptioned="skip")
    assert names(load(where, skipping)) == {"a.png"}
    assert "skipped without a caption: b.png" in report(where, skipping)
    with pytest.raises(UserError, match=r"1 images have no caption: b\.png; write them, or set uncaptioned"):
        load(where, replace(config, uncaptioned="refuse"))
    for said in ({"default_caption": "x"}, {"autocaption": True}):
        assert names(load(where, replace(config, uncaptioned="refuse", **said))) == {"a.png", "b.png"}
    (where / "a.txt").unlink()
    with pytest.raises(UserError, match="holds no images"):
        load(where, skipping)


# --- mirrored images ------------------------------------------------------------------------------------------------


def test_mirrored_images_are_shown_half_of_the_time_with_their_masks(dataset, random_model):
    examples = [replace(example, flip=True) for example in dataset.examples]
    run = make_state(replace(SHORT_RUN, batch_size=1), replace(dataset, examples=examples), random_model)
    plain = make_state(replace(SHORT_RUN, batch_size=1), dataset, random_model)
    example = examples[0]
    cached = run.data.examples[0]
    vae = load_vae(random_model, run.components.placement)
    with torch.inference_mode():
        want = encode_images(vae, example.pixels().flip(-1).unsqueeze(0))[0]
    torch.testing.assert_close(cached.turned(True).latents, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(cached.turned(False).latents, plain.data.examples[0].latents)
    sides = [m for plan in islice(plan_batches(run.config, run.data.examples), 200) for m in plan.mirrored]
    assert 70 < sum(sides) < 130
    ours = BatchStream(run.config, run.data.examples, run.components.schedule)
    theirs = BatchStream(plain.config, plain.data.examples, plain.components.schedule)
    same = [torch.equal(next(ours).target, next(theirs).target) for _ in range(40)]
    assert 8 < sum(same) < 32, "the others are the same images, from the same noise"


def test_captions_with_a_side_are_refused_unless_that_is_insisted_on(folder):
    where = folder("a.png", "b.png", **{"a.txt": "a cat at the left", "b.txt": "what is left of it, alright"})
    with pytest.raises(UserError, match=r"2 captions speak of left or right: a\.png, b\.png; set flip to off, or to"):
        load(where, replace(CONFIG, flip="on"))
    assert all(example.flip for example in load(where, replace(CONFIG, flip="insist")).examples)
    (where / "a.txt").write_text("a chain link, alright, copyright")
    (where / "b.txt").write_text("she leftovers links")
    assert all(example.flip for example in load(where, replace(CONFIG, flip="on")).examples)
    (where / "dataset.json").write_text('{"flip": false}')
    assert not any(example.flip for example in load(where, replace(CONFIG, flip="on")).examples)


# --- regularisation images ------------------------------------------------------------------------------------------


def regularised(folder, config=TOKEN, **texts):
    captions = {"a.txt": "a <zwx> man", "b.txt": "<zwx>", **{f"reg/{name}.txt": "a man" for name in "cde"}, **texts}
    return load(folder("a.png", "b.png", "reg/c.png", "reg/d.png", "reg/e.png", **captions), config)


def test_an_epoch_shows_as_many_regularisation_images_as_others_in_turns(folder):
    found = regularised(folder)
    shown = [e.image_path.name for batch in islice(bucket_batches(found.examples, 1, 0), 12) for e in batch]
    epochs = [shown[start : start + 4] for start in (0, 4, 8)]
    assert all({"a.png", "b.png"} <= set(epoch) for epoch in epochs)
    assert Counter(shown) == {"a.png": 3, "b.png": 3, "c.png": 2, "d.png": 2, "e.png": 2}


def test_their_loss_has_its_weight(folder, random_model):
    found = regularised(folder)
    config = replace(SHORT_RUN, batch_size=4, prior_loss_weight=0.25, caption_dropout=0.0)
    run = make_state(config, found, random_model)
    batch = next(run.stream)
    assert sorted(batch.image_weights.tolist()) == [0.25, 0.25, 1.0, 1.0]
    report = next(loop.train(make_state(config, found, random_model)))
    assert report.image_losses.shape[-1] == 4


def test_a_regularisation_image_names_nothing_that_is_taught(folder):
    with pytest.raises(UserError, match=r"names what is taught: 'a <zwx> man'; name the class"):
        regularised(folder, **{"reg/c.txt": "a <zwx> man"})
    with pytest.raises(UserError, match="names what is taught: 'ohwx'"):
        regularised(folder, replace(TOKEN, trigger_word="ohwx"), **{"reg/c.txt": "ohwx"})
    without = regularised(folder, replace(TOKEN, trigger_word="ohwx"))
    assert {e.caption for e in without.examples if e.regularisation} == {"a man"}, "and is given no trigger"


def test_they_are_never_held_out_and_are_not_counted(folder):
    found = regularised(folder)
    assert "captions lack <zwx>" not in report(found.folder, TOKEN)
    assert found.num_images == 2
    learned, held_out = found.split(0.5)
    assert (learned.num_images, held_out.num_images) == (1, 1)
    assert sum(example.regularisation for example in learned.examples) == 3
    assert not any(example.regularisation for example in held_out.examples)


def test_any_folder_can_be_one_by_its_settings(folder):
    found = load(
        folder("a.png", "others/b.png", **{"others/dataset.json": '{"regularisation": true}', "others/b.txt": "a man"}),
        CONFIG,
    )
    assert {name: example.regularisation for name, example in by_name(found).items()} == {"a.png": False, "b.png": True}
