"""The loss on images held out: fixed noise at fixed levels, so that runs can be compared by it."""

from dataclasses import replace

import pytest
import torch

from lora_utils.dataset.scan import check_captions
from lora_utils.errors import UserError
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import encode_text
from lora_utils.model.transformer import predict_velocity
from lora_utils.training import loop
from lora_utils.training.batch_plans import generator_for
from lora_utils.training.batches import VALIDATION_SIGMAS, BatchStream
from lora_utils.training.state import TrainState
from lora_utils.training.validation import validate
from tests.helpers import SHORT_RUN, make_state


@pytest.fixture
def new_run(dataset, random_model):
    def make(**given) -> TrainState:
        config = replace(SHORT_RUN, validation_share=0.3, **given)
        return make_state(config, dataset, random_model)

    return make


def test_images_held_out_are_never_learned_from(new_run):
    run = new_run()
    held_out = {example.image_name for example in run.data.held_out}
    assert len(held_out) == 3
    assert len(run.data.examples) == 7
    stream = BatchStream(run.config, run.data.examples, run.components.schedule)
    seen = {name for _ in range(50) for name in next(stream).names}
    assert len(seen) == 7
    assert not seen & held_out


def test_the_same_images_are_held_out_whatever_the_seed(new_run):
    one, other = (sorted(example.image_name for example in new_run(seed=seed).data.held_out) for seed in (1, 2))
    assert one == other


def test_the_loss_is_that_of_fixed_noise_at_fixed_levels(new_run):
    """Equal for equal weights, whatever the seed, the batch size and what was measured before."""
    run = new_run()
    found = validate(run)
    assert validate(run) == found
    again = validate(new_run(seed=9, batch_size=5))
    assert again.loss == pytest.approx(found.loss, rel=1e-5)
    assert len(found.by_sigma) == len(VALIDATION_SIGMAS)
    assert found.loss == pytest.approx(sum(found.by_sigma) / len(found.by_sigma))


def test_it_is_the_training_loss_of_those_images(new_run):
    """By hand, for one image at one level."""
    run = new_run()
    example = run.data.held_out[0]
    noise = torch.randn(example.latents.shape, generator=generator_for(0, "validation 0"))
    sigma = VALIDATION_SIGMAS[2]
    noisy = ((1 - sigma) * example.latents + sigma * noise)[None]
    text = encode_text(run.components.text_encoder, run.components.tokenizer, [example.caption], run.placeholders)
    with torch.no_grad():
        velocity = predict_velocity(run.components.transformer, noisy, torch.tensor([sigma]), text, example.size)
    expected = float((velocity - (noise - example.latents)).square().mean())
    run.data = replace(run.data, held_out=[example])
    assert validate(run).by_sigma[2] == pytest.approx(expected, rel=1e-4)


def test_a_class_that_is_held_and_dropped_captions_do_not_enter(new_run):
    plain, with_class = new_run(), new_run(class_word="square", preservation_weight=0.5, caption_dropout=1.0)
    assert validate(with_class).loss == pytest.approx(validate(plain).loss, rel=1e-5)


def test_it_measures_the_average_where_one_is_kept(new_run):
    run = new_run(ema_decay=0.9, learning_rate=0.05)
    list(loop.train(run))
    averaged = validate(run)
    run.optimizers.average = None
    assert validate(run).loss != pytest.approx(averaged.loss, rel=1e-4)


def test_one_image_alone_cannot_be_held_out(dataset):
    alone = replace(dataset, examples=dataset.examples[:1])
    with pytest.raises(UserError, match="there is only one; set it to 0, or add some"):
        alone.split(0.1)
    learned, held_out = replace(dataset, examples=dataset.examples[:2]).split(0.5)
    assert (learned.num_images, held_out.num_images) == (1, 1)
    assert dataset.split(0.0)[0].examples == dataset.examples


def test_images_held_out_are_measured_in_their_smallest_size(dataset):
    sizes = [Size(96, 96), Size(64, 64), Size(128, 128)]
    several = replace(dataset, examples=[replace(e, size=size) for e in dataset.examples for size in sizes])
    learned, held_out = several.split(0.2)
    assert [example.size for example in held_out.examples] == [Size(64, 64)] * 2
    assert len(learned.examples) == 3 * 8


def test_a_token_that_only_stands_on_images_held_out_is_refused(dataset, components):
    _, held_out = dataset.split(0.1)
    (path,) = held_out.captions_by_image
    captions = {p: c if p == path else c.replace("<zwx>", "a thing") for p, c in dataset.captions_by_image.items()}
    with pytest.raises(UserError, match="none of the 9 captions holds the placeholder token '<zwx>'"):
        check_captions(dataset.with_captions(captions), replace(SHORT_RUN, validation_share=0.1), components.tokenizer)
