"""Masks: whose they are, what is refused, and that the loss counts where they are white."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import teaching
from examples.shapes import Prompt
from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.dataset.cache import CachedExample
from lora_utils.errors import UserError
from lora_utils.io.archive import extract_archive
from lora_utils.io.images import open_mask
from lora_utils.model import flow
from lora_utils.model.latents import Size, pack_latents
from lora_utils.model.transformer import predict_velocity
from lora_utils.training import loop
from lora_utils.training.batches import BatchStream, loss_weights
from lora_utils.training.loss import batch_text, flow_matching_loss
from lora_utils.training.state import TrainState
from tests.helpers import make_state

CONFIG = TrainConfig(resolution="64", mask_from="file", seed=0)
ALPHA = replace(CONFIG, mask_from="alpha")


def image(size=(64, 64), colour="red") -> Image.Image:
    return Image.new("RGB", size, colour)


def left_half(size=(64, 64)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.fixture
def folder(tmp_path):
    def write(**images: Image.Image):
        for name, content in images.items():
            content.save(tmp_path / name.replace("__", "."))
        return tmp_path

    return write


@pytest.mark.parametrize("name", ["a__mask__png", "a__MASK__png", "a__png__mask__png", "A__mask__webp"])
def test_a_mask_is_found_by_its_name_and_is_no_image(name, folder):
    found = load(folder(a__png=image(), **{name: left_half()}), CONFIG)
    assert found.num_images == 1
    assert not found.left_out
    assert found.examples[0].masked
    shares = found.examples[0].shares()
    assert shares is not None
    assert shares.shape == (16, 4)
    assert shares.view(4, 4, 4)[:, :2].eq(1).all()
    assert shares.view(4, 4, 4)[:, 2:].eq(0).all()


def test_shares_stand_where_their_latents_do():
    """A mask and an image of the same pattern: each share lies on the latent that sees that part of the image."""
    pattern = torch.rand(1, 1, 8, 8)  # of latents
    shares = pack_latents(pattern)[0]  # [N, 4], as load_mask packs
    example = CachedExample({"latents": torch.zeros(16, 64), "shares": shares}, "", Size(64, 64), "a")
    weights = loss_weights([example], 0.0)
    assert torch.equal(weights, pack_latents(pattern.repeat(1, 16, 1, 1)))


def test_a_mask_is_cut_as_its_image_is(folder):
    wide = Image.new("RGB", (200, 64), "black")
    wide.paste("white", (60, 10, 130, 40))
    found = load(folder(a__png=wide, a__mask__png=wide.resize((400, 128)).convert("L")), CONFIG)
    (example,) = found.examples
    grey = example.pixels().mean(dim=0) / 2 + 0.5  # [H, W]
    by_latent = torch.nn.functional.avg_pool2d(grey[None, None], 8)
    assert (pack_latents(by_latent)[0] - example.shares()).abs().max() < 0.06


def test_alpha_as_a_mask(folder):
    cut_out = image().convert("RGBA")
    cut_out.putalpha(left_half())
    found = load(folder(a__png=cut_out, b__png=image(colour="blue")), ALPHA)
    assert [example.masked for example in found.examples] == [True, False]
    assert found.examples[0].shares().mean() == 0.5
    assert found.examples[1].shares() is None
    assert "1 images have a mask, 1 without one are learned everywhere" in found.notes


def test_a_transparent_mask_counts_where_it_is_painted(folder):
    painted = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 32, 64))
    assert np.array_equal(np.asarray(open_mask(folder(a__png=painted) / "a.png")), np.asarray(left_half()))


def test_an_alpha_follows_the_exif_orientation(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    cut_out = image((64, 32)).convert("RGBA")
    cut_out.putalpha(left_half((64, 32)))
    cut_out.save(tmp_path / "a.webp", exif=exif, lossless=True)
    shares = load(tmp_path, ALPHA).examples[0].shares()
    rows, _ = Size(48, 96).grid
    assert shares.view(rows, -1)[0].eq(1).all(), "what was left is on top"


@pytest.mark.parametrize(
    ("images", "config", "message"),
    [
        ({"a__mask__png": left_half((64, 32))}, CONFIG, r"a\.mask\.png has 64x32 pixels, its image 64x64"),
        ({"a__mask__png": Image.new("L", (64, 64), 0)}, CONFIG, r"a\.mask\.png is black all over"),
        ({"b__mask__png": left_half()}, CONFIG, r"b\.mask\.png is the mask of no image"),
        ({}, CONFIG, r"mask_from is file, and none of the 1 images has a NAME\.mask\.png"),
        ({}, ALPHA, r"mask_from is alpha, and none of the 1 images is transparent"),
    ],
)
def test_what_is_wrong_with_masks_is_said(images, config, message, folder):
    with pytest.raises(UserError, match=message):
        load(folder(a__png=image(), **images), config)


def test_masks_that_are_not_asked_for_are_no_images_and_are_mentioned(folder):
    found = load(folder(a__png=image(), a__mask__png=left_half()), replace(CONFIG, mask_from="none"))
    assert found.num_images == 1
    assert not found.examples[0].masked
    assert "1 masks aren't used; set mask_from to file to use them" in found.notes


@pytest.fixture
def run(folder, random_model):
    """One image with a mask and one without."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(2)]
    images = folder(a__png=noise[0], b__png=noise[1], a__mask__png=left_half())
    config = replace(CONFIG, steps=80, rank=8, learning_rate=3e-3, batch_size=2, caption_dropout=0.0)
    return make_state(config, load(images, config), random_model)


def test_the_loss_is_weighted_by_the_mask(run):
    drawn = next(BatchStream(run.config, run.data.examples, run.components.schedule))
    loss = flow_matching_loss(run, drawn).mean()
    text = batch_text(run, drawn.captions)
    error = (
        predict_velocity(run.components.transformer, drawn.noisy, drawn.sigma, text, drawn.size) - drawn.target
    ) ** 2
    masked = drawn.names.index("a.png")
    columns = error[masked].view(4, 4, 64)
    by_hand = (columns[:, :2].sum() + 0.1 * columns[:, 2:].sum() + error[1 - masked].sum()) / error.numel()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_model):
    """How much of the error each half of an image loses in training, with and without a mask on its left half.

    The right half holds another object, of which the caption doesn't speak.
    """
    taught = teaching.images_of(Prompt("<zwx>", place="left"), seed=0, company=True)
    learned = {}
    for mask_from in ("none", "file"):
        folder = tmp_path_factory.mktemp(mask_from)
        teaching.write(folder / "set.zip", taught)
        extract_archive(folder / "set.zip", folder / "set")
        config = replace(CONFIG, **TRAINING, steps=100, mask_from=mask_from)
        run = make_state(config, load(folder / "set", config), tiny_model, any_timestep=True)
        before = errors_by_half(run)
        list(loop.train(run))
        learned[mask_from] = (1 - errors_by_half(run) / before).tolist()
    return learned


TRAINING = {
    "train_placeholder_token": True,
    "lora_targets": "attention",
    "rank": 8,
    "lora_alpha": 8.0,
    "learning_rate": 1e-3,
    "batch_size": 4,
    "mask_floor": 0.0,
}


def errors_by_half(run: TrainState) -> torch.Tensor:
    """[2]: the mean error in the left and right halves, over the same noise and sigmas each time."""
    generator, total = torch.Generator().manual_seed(1), torch.zeros(2)
    for example in run.data.examples:
        text = batch_text(run, [example.caption])
        for sigma in torch.linspace(0.5, 0.95, 6):
            noise = torch.randn(1, 16, 64, generator=generator)
            noisy = flow.add_noise(example.latents[None], noise, sigma[None])
            velocity = predict_velocity(run.components.transformer, noisy, sigma[None], text, example.size)
            error = (velocity - flow.velocity_target(example.latents[None], noise)).square().view(4, 2, 2, 64)
            total += error.detach().mean(dim=(0, 2, 3))
    return total


@pytest.mark.slow
def test_what_lies_outside_the_mask_is_learned_less(learned):
    inside, outside = learned["file"]
    assert inside > 0.2, learned
    assert outside < 0.5 * learned["none"][1], learned
    assert inside == pytest.approx(learned["none"][0], abs=0.1), "and what lies inside it is learned all the same"
