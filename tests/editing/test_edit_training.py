"""Training on pairs: everything that holds for text-to-image holds here, and the images to edit are really used."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from lora_utils.config import RunOptions, TrainConfig
from lora_utils.dataset import load
from lora_utils.dataset.feature_cache import CachedControls
from lora_utils.io.archive import extract_archive
from lora_utils.model import flow, modulation
from lora_utils.model.controls import encode_controls, no_controls, text_key
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import Prompt, encode_text
from lora_utils.model.transformer import predict_velocity
from lora_utils.model.variant import EDIT, EDIT_PLUS
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.training import loop
from lora_utils.training.batches import BatchStream
from lora_utils.training.checkpoint import list_checkpoints, save_checkpoint
from lora_utils.training.loss import batch_text, flow_matching_loss
from lora_utils.training.recompute import change_plan
from tests.editing.material import CPU, extracted_pairs, write_pairs
from tests.helpers import lora_of, losses, make_state, resume_state, same_result, train_archive

CONFIG = TrainConfig(
    steps=6,
    rank=4,
    learning_rate=1e-3,
    batch_size=2,
    resolution="64",
    control_resolution="auto",
    seed=3,
    quantization="none",
)
TOKEN = replace(CONFIG, train_placeholder_token=True)
FROZEN = replace(TOKEN, placeholder_learning_rate=0.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return extracted_pairs(tmp_path_factory.mktemp("pairs"), CONFIG)


@pytest.fixture(scope="module")
def token_pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("token_pairs")
    return extracted_pairs(folder, TOKEN, caption="make it like <zwx>", controls=2)


def state_of(config, dataset, folder, variant=EDIT_PLUS, **given):
    return make_state(config, dataset, folder, placement=CPU, variant=variant, **given)


@pytest.mark.parametrize("kind", ["Edit", "2509", "2511"])
def test_a_batchs_loss_is_that_of_the_flow_with_the_images_beside_the_noise(kind, edit_models, parts_of, pairs):
    """Computed from the files, as prediction encodes them."""
    parts = parts_of[kind]
    state = state_of(replace(CONFIG, caption_dropout=0.0), pairs, edit_models[kind], parts.variant)
    batch = next(state.stream)
    ours = flow_matching_loss(state, batch)
    by_name = {example.image_path.name: example for example in pairs.examples}
    for index, name in enumerate(batch.names):
        example = by_name[name]
        images = [control.shown(None) for control in example.controls]
        controls = encode_controls(parts, images, 64 * 64)
        torch.testing.assert_close(controls.latents.tokens, batch.controls[index].latents.tokens, atol=1e-4, rtol=1e-4)
        prompt = Prompt(batch.captions[index], controls.seen)
        with torch.inference_mode():
            text = encode_text(parts.text_encoder, parts.tokenizer, [prompt], no_placeholders(), parts.variant)
            given = batch.noisy[index : index + 1], batch.sigma[index : index + 1], text, batch.size
            velocity = predict_velocity(parts.transformer, *given, [controls.latents])
            want = (velocity - batch.target[index]).square().mean()
        torch.testing.assert_close(ours[index].detach(), want, atol=1e-5, rtol=1e-4)


def test_the_shift_follows_from_the_targets_size_alone(edit_models, pairs):
    state = state_of(replace(CONFIG, control_resolution="128"), pairs, edit_models["2511"])
    own = BatchStream(state.config, state.data.examples, flow.Schedule())
    without = BatchStream(state.config, [replace(e, controls=None) for e in state.data.examples], flow.Schedule())
    assert torch.equal(next(own).sigma, next(without).sigma)


def test_gradients_of_unequal_images_are_those_of_one_by_one(edit_models, token_pairs):
    """In one batch: an example with two images to edit, and one whose images were dropped."""
    state = state_of(replace(TOKEN, control_dropout=0.5, caption_dropout=0.0), token_pairs, edit_models["2511"])
    torch.nn.init.normal_(state.lora[1], std=0.1)
    batch = next(b for b in state.stream if b.controls[0].seen and len(b.names) == 2)
    batch = replace(batch, controls=(batch.controls[0], no_controls()))
    learned = [*state.lora, *state.placeholders.embeddings]

    def gradients(parts):
        for each in learned:
            each.grad = None
        for part in parts:
            (flow_matching_loss(state, part).sum() / 2).backward()
        return [None if each.grad is None else each.grad.clone() for each in learned]

    singles = [
        replace(
            batch,
            noisy=batch.noisy[i : i + 1],
            target=batch.target[i : i + 1],
            sigma=batch.sigma[i : i + 1],
            captions=batch.captions[i : i + 1],
            names=batch.names[i : i + 1],
            controls=batch.controls[i : i + 1],
        )
        for i in range(2)
    ]
    for together, alone in zip(gradients([batch]), gradients(singles), strict=True):
        assert (together is None) == (alone is None)
        if together is not None and alone is not None:
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_batch_is_one_forward_whatever_its_images_sizes(edit_models, tmp_path):
    """On a sharded base every process has to take part in as many forwards."""
    config = replace(CONFIG, control_dropout=0.4, batch_size=3)
    dataset = extracted_pairs(tmp_path, config, count=8)
    examples = [
        replace(e, controls=(replace(e.controls[0], size=Size(96, 64)),)) if index % 2 else e
        for index, e in enumerate(dataset.examples)
    ]
    state = state_of(config, replace(dataset, examples=examples), edit_models["2511"])
    batches = [next(state.stream) for _ in range(30)]
    assert all(len({own.latents.sizes for own in batch.controls}) == 1 for batch in batches)
    shown = {batch.controls[0].latents.sizes for batch in batches}
    assert shown == {(), (Size(64, 64),), (Size(96, 64),)}
    assert max(len(batch.names) for batch in batches) == 3


def test_the_loss_outside_a_targets_mask_counts_less(edit_models, tmp_path):
    config = replace(CONFIG, mask_from="file", mask_floor=0.0)
    extract_archive(write_pairs(tmp_path / "pairs.zip"), tmp_path / "images")
    for index in range(6):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (0, 0, 32, 64))
        mask.save(tmp_path / "images" / f"{index}.mask.png")
    state = state_of(config, load(tmp_path / "images", config, variant=EDIT_PLUS), edit_models["2511"])
    batch = next(state.stream)
    assert batch.weights is not None
    assert batch.weights.shape == batch.target.shape, "the target's tokens alone have weights"
    outside = batch.weights == 0
    changed = replace(batch, target=torch.where(outside, batch.target + 7, batch.target))
    torch.testing.assert_close(flow_matching_loss(state, changed), flow_matching_loss(state, batch))


def test_dropped_captions_keep_their_images(edit_models, pairs):
    state = state_of(replace(CONFIG, caption_dropout=1.0), pairs, edit_models["2511"])
    batch = next(state.stream)
    assert set(batch.captions) == {" "}
    assert all(own.seen for own in batch.controls)
    texts = batch_text(state, batch.captions, batch.controls)
    bare = batch_text(state_of(replace(CONFIG, control_dropout=1.0), pairs, edit_models["2511"]), [" "] * 2)
    assert texts.states.shape[1] > bare.states.shape[1], "what was seen of the images is part of the text"


@pytest.mark.parametrize("config", [CONFIG, TOKEN, FROZEN], ids=["fixed texts", "a token", "one that does not learn"])
def test_a_resumed_run_learns_the_same_bit_for_bit(config, edit_models, pairs, token_pairs, tmp_path):
    dataset = token_pairs if config.tokens else pairs
    folder = edit_models["2511"]
    complete = state_of(config, dataset, folder)
    losses(complete)
    stopped = state_of(config, dataset, folder)
    losses(stopped, 3)
    save_checkpoint(stopped, tmp_path, 1)
    resumed = resume_state(config, dataset, folder, list_checkpoints(tmp_path)[-1], placement=CPU, variant=EDIT_PLUS)
    losses(resumed)
    assert same_result(complete, resumed)


def test_only_the_tokens_embedding_moves_and_the_vision_tower_is_not_run_again(edit_models, token_pairs, monkeypatch):
    state = state_of(TOKEN, token_pairs, edit_models["2511"])
    before = {name: own.clone() for name, own in state.components.need_text_encoder().named_parameters()}
    monkeypatch.setattr("lora_utils.model.vision.features", lambda *_: pytest.fail("the vision tower ran"))
    losses(state)
    assert state.components.vision is None
    assert not torch.equal(state.placeholders.embeddings[0].detach(), state.initial_embeddings[0])
    for name, own in state.components.need_text_encoder().named_parameters():
        assert torch.equal(own, before[name]), name


@pytest.mark.parametrize("checkpointed", [0, 1, 2])
def test_activation_checkpointing_and_the_table_change_nothing(checkpointed, edit_models, pairs, monkeypatch):
    def curve(table, count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modulation, "pays", lambda *_: table)
            state = state_of(CONFIG, pairs, edit_models["2511"])
            assert modulation.has_table(state.components.transformer) == table
            patch.setattr(loop, "plan_recompute", lambda run: change_plan(run, checkpointed_blocks=count))
            return losses(state)

    torch.testing.assert_close(curve(True, checkpointed), curve(False, 0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("quantization", ["fp8", "int8", "nf4"])
def test_a_quantised_base_learns_from_pairs(quantization, edit_models, pairs):
    state = state_of(replace(CONFIG, quantization=quantization, steps=3), pairs, edit_models["2511"])
    assert all(loss > 0 for loss in losses(state))


@pytest.mark.parametrize(
    ("given", "held"),
    [({"class_word": "square"}, "make it like square"), ({"preserve_prompts": "make it small"}, "make it small")],
)
def test_prior_preservation_holds_prompts_with_the_same_images(given, held, edit_models, tmp_path):
    config = replace(TOKEN, preservation_weight=0.5, caption_dropout=0.0, **given)
    dataset = extracted_pairs(tmp_path, config, caption="make it like <zwx>")
    state = state_of(config, dataset, edit_models["2511"])
    prior = next(batch for batch in state.stream if batch.is_prior)
    assert set(prior.captions) == {held}
    assert all(own.seen for own in prior.controls)
    base = flow_matching_loss(state, prior, needs_base=True)
    torch.testing.assert_close(base, torch.zeros_like(base), atol=1e-9, rtol=0)  # a new LoRA is the base


def test_validation_measures_pairs_held_out_with_their_images(edit_models, pairs):
    from lora_utils.training.validation import validate, validation_batches  # noqa: PLC0415

    state = state_of(replace(CONFIG, validation_share=0.3), pairs, edit_models["2511"])
    assert state.data.held_out
    assert all(batch.controls for batch in validation_batches(state.data.held_out, 2, 0.1))
    first = validate(state)
    assert first == validate(state)


def test_mirrored_pairs_are_mirrored_on_both_sides(edit_models, tmp_path):
    config = replace(CONFIG, flip="on")
    dataset = extracted_pairs(tmp_path, config, caption="make it red")
    state = state_of(config, dataset, edit_models["2511"])
    example = state.data.examples[0]
    turned = example.turned(True)
    assert isinstance(turned.controls, CachedControls)
    assert example.controls is not None
    control = dataset.examples[0].controls[0]
    pixels = replace(control, mirrored=True).pixels()
    assert torch.equal(pixels.flip(-1), control.pixels())
    assert not torch.equal(turned.controls.load().latents.tokens, example.controls.load().latents.tokens)
    assert text_key("x", turned.controls.load()) != text_key("x", example.controls.load())


def test_the_shorter_pipeline_takes_one_image(edit_models, pairs):
    state = state_of(replace(CONFIG, steps=2), pairs, edit_models["Edit"], EDIT)
    assert len(losses(state)) == 2


def test_a_run_from_an_archive_writes_weights_and_previews_beside_their_pairs(edit_models, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(edit_models["2511"]))
    archive = write_pairs(tmp_path / "pairs.zip", folders=True)
    config = replace(CONFIG, steps=3, validation_share=0.3)
    options = RunOptions(run_dir=str(tmp_path / "run"), sample_prompts="[caption] --steps 2\nmake it red --steps 2")
    target = train_archive(config, archive, tmp_path / "weights.zip", options)
    _, meta = lora_of(target)
    assert meta["pipeline"] == "QwenImageEditPlusPipeline"
    assert meta["config"]["control_resolution"] == "auto"
    assert (tmp_path / "run" / "samples" / "step-000003.png").is_file()
