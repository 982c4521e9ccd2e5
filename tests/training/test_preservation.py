"""Class preservation: a share of the steps holds what the base model makes of the class word."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.dataset.caption_texts import prior_caption
from lora_utils.errors import UserError
from lora_utils.lora.adapter import without_lora
from lora_utils.model.transformer import predict_velocity
from lora_utils.training import loop
from lora_utils.training.batch_plans import plan_batches
from lora_utils.training.batches import BatchStream
from lora_utils.training.loss import batch_text, forward_backward
from lora_utils.training.preserved import NOTHING, preserved_prompts
from lora_utils.training.results import describe_share
from tests.helpers import make_state

CONFIG = TrainConfig(
    steps=6,
    rank=4,
    learning_rate=1e-3,
    batch_size=3,
    resolution="64",
    seed=0,
    train_placeholder_token=True,
    class_word="square",
    preservation_weight=0.5,
    quantization="none",
)


@pytest.fixture
def run(dataset, random_model):
    return make_state(CONFIG, dataset, random_model)


@pytest.mark.parametrize(
    ("caption", "held"),
    [
        ("a photo of <zwx>", "a photo of square"),
        ("a photo of <zwx> square on gray", "a photo of square on gray"),
        ("<zwx>  square", "square"),
        ("<zwx> squared", "square squared"),
        ("a red circle", "a red circle"),
    ],
)
def test_the_class_word_takes_the_tokens_place(caption, held):
    assert prior_caption(caption, CONFIG) == held


def test_or_the_trigger_words():
    config = TrainConfig(trigger_word="ohwx", class_word=r"man \1", seed=0)
    assert prior_caption("ohwx at sea", config) == r"man \1 at sea"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_placeholder_token": False}, "there is neither; set"),
        ({"class_word": "a <zwx>"}, "holds the token or trigger word itself"),
        ({"preservation_weight": 1.0}, "preservation_weight must be from 0 to 0.9"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **given)


def test_the_target_is_what_the_base_model_predicts_bit_for_bit(dataset, random_model, components):
    run = make_state(CONFIG, dataset, random_model, any_timestep=True)
    list(loop.train(run))
    noisy, sigma = torch.randn(2, 16, 64), torch.tensor([0.3, 0.8])
    held = list(run.data.preserved.of_class.values())[:2]
    text = batch_text(run, held)
    given = (noisy, sigma, text, run.data.examples[0].size)
    with torch.no_grad():
        with without_lora(run.components.transformer):
            without = predict_velocity(run.components.transformer, *given)
        assert torch.equal(without, predict_velocity(components.transformer, *given))
        assert not torch.equal(without, predict_velocity(run.components.transformer, *given)), "the LoRA is back"


def test_the_lora_is_back_after_a_failure(run):
    list(loop.train(run))
    given = (torch.randn(1, 16, 64), torch.tensor([0.5]), batch_text(run, [constants.EMPTY_PROMPT]))
    before = predict_velocity(run.components.transformer, *given, run.data.examples[0].size)
    with pytest.raises(KeyboardInterrupt), without_lora(run.components.transformer):
        raise KeyboardInterrupt
    assert torch.equal(before, predict_velocity(run.components.transformer, *given, run.data.examples[0].size))


def test_a_lora_that_has_changed_nothing_has_nothing_to_be_held_to(run):
    """B is zero at first, so the LoRA's prediction is the base's: the loss is zero, and so is its gradient."""
    stream = BatchStream(CONFIG, run.data.examples, run.components.schedule, run.data.preserved)
    batch = next(batch for batch in stream if batch.is_prior)
    assert not any("<zwx>" in caption for caption in batch.captions)
    losses = forward_backward(run, [batch], [True])
    assert losses.nansum().item() < 1e-12
    assert all(weight.grad is None or weight.grad.abs().max() < 1e-6 for weight in run.lora)
    assert run.placeholders.embeddings[0].grad is None


def test_that_share_of_the_batches_holds_the_class_and_the_others_are_as_without(run):
    streams = [
        BatchStream(CONFIG, run.data.examples, run.components.schedule, held) for held in (run.data.preserved, NOTHING)
    ]
    pairs = [(next(streams[0]), next(streams[1])) for _ in range(200)]
    assert sum(held.is_prior for held, _ in pairs) == 100
    for held, plain in pairs:
        assert torch.equal(held.noisy, plain.noisy)
        assert held.is_prior or held.captions == plain.captions
        assert not plain.is_prior


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("named", [0, 1, 5, 10])
def test_the_share_is_what_the_input_says_for_every_mix_of_captions(named, batch_size, share, dataset):
    """A caption that names nothing taught is held as it is, alone or beside others in a batch."""
    examples = [
        replace(example, caption=f"a {'<zwx>' if index < named else 'red'} wall {index}")
        for index, example in enumerate(dataset.examples)
    ]
    config = replace(CONFIG, batch_size=batch_size, preservation_weight=share, caption_dropout=0.0)
    held = preserved_prompts([example.caption for example in examples], config)
    plans = list(itertools.islice(plan_batches(config, examples, held), 60))
    assert sum(plan.is_prior for plan in plans) == math.floor(60 * share + 1e-9)
    assert not plans[0].is_prior
    for plan in plans:
        for example, caption in zip(plan.examples, plan.captions, strict=True):
            assert caption == (prior_caption(example.caption, config) if plan.is_prior else example.caption)
            assert not (plan.is_prior and "<zwx>" in caption)


def test_captions_without_the_token_are_held_as_they_are(dataset, random_model):
    plain = [replace(example, caption="a red circle") for example in dataset.examples]
    config = replace(CONFIG, train_placeholder_token=False, trigger_word="ohwx")
    run = make_state(config, replace(dataset, examples=plain), random_model)
    assert run.data.preserved.of_class == {"a red circle": "a red circle"}
    assert sum(any(report.is_prior) for report in loop.train(run)) == 3
    assert describe_share(run) == "3 of 6 batches held 'square', the others taught"


# --- a caller's own prompts -----------------------------------------------------------------------------------------

OWN = replace(CONFIG, class_word="", preserve_prompts="a red circle | a blue ring\na green cross")


def held_captions(config, dataset, count=400):
    captions = [example.caption for example in dataset.examples]
    plans = itertools.islice(plan_batches(config, dataset.examples, preserved_prompts(captions, config)), count)
    return [caption for plan in plans if plan.is_prior for caption in plan.captions]


def test_prompts_that_must_stay_are_shown_in_turns_of_chance(dataset):
    found = Counter(held_captions(OWN, dataset))
    assert set(found) == {"a red circle", "a blue ring", "a green cross"}
    assert min(found.values()) > 0.25 * found.total()
    assert held_captions(OWN, dataset) == held_captions(OWN, dataset), "as the seed has it"


def test_a_class_beside_them_has_half_of_the_images(dataset):
    found = held_captions(replace(OWN, class_word="square"), dataset)
    own = sum(caption in OWN.preserve_prompts for caption in found)
    assert 0.4 < own / len(found) < 0.6
    assert all("<zwx>" not in caption for caption in found)


def test_they_train_towards_the_base_model_and_are_encoded_once(dataset, random_model):
    run = make_state(OWN, dataset, random_model)
    assert {"a red circle", "a blue ring", "a green cross"} <= set(run.data.texts)
    reports = list(loop.train(run))
    held = [report for report in reports if any(report.is_prior)]
    assert len(held) == 3
    assert float(held[0].prior_losses) < 0.1 * float(reports[0].loss), "a LoRA that has changed little has lost little"
    assert describe_share(run) == "3 of 6 batches held 3 prompts, the others taught"
    both = replace(run.data.preserved, of_class={"a": "b"})
    assert both.described("square") == "'square' and 3 prompts"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a red circle | <zwx> at sea", "preserve_prompts: '<zwx> at sea' names what is taught"),
        ("|".join(map(str, range(201))), "preserve_prompts takes at most 200 prompts, got 201"),
    ],
)
def test_prompts_that_cannot_stay_are_refused(prompts, message):
    with pytest.raises(UserError, match=message):
        replace(OWN, preserve_prompts=prompts)


def test_losses_that_hold_the_class_are_reported_apart(run):
    reports = list(loop.train(run))
    assert sum(len(report.prior_losses) for report in reports) == sum(report.is_prior[0] for report in reports) > 0
    assert all(len(report.instance_losses) + len(report.prior_losses) == 1 for report in reports)
    assert (
        torch.cat([report.prior_losses for report in reports]).max()
        < torch.cat([r.instance_losses for r in reports]).min()
    )
