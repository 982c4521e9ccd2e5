"""Our editing is diffusers' own: prompts with images, latents and a complete run, for each of the three models."""

import pytest
import torch

from examples import stock_edit
from lora_utils.config import SampleRequest
from lora_utils.model.components import load_components
from lora_utils.model.controls import Controls, encode_controls
from lora_utils.model.device import Placement
from lora_utils.model.latents import ControlLatents, Size
from lora_utils.model.text_encoder import Prompt, encode_text
from lora_utils.model.transformer import Storage, load_transformer, predict_velocity
from lora_utils.model.variant import EDIT_PLUS
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.sampling import sampler
from lora_utils.sampling.sampler import Conditioning, SamplingJob
from tests.editing.material import CPU, KINDS, stock_run

AREA_PX = 64 * 64
PROMPT = "put it on a pink background"
MOST = 1e-4


def images_of(kind, to_edit):
    return to_edit[:1] if kind == "Edit" else to_edit


def encoded(parts, prompt, controls):
    with torch.inference_mode():
        given = [Prompt(prompt, controls.seen)]
        return encode_text(parts.text_encoder, parts.tokenizer, given, no_placeholders(), parts.variant)


def noise(count):
    """Latents [B, N, C]."""
    return torch.randn(count, 16, 64, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def parts(kind, parts_of):
    return parts_of[kind]


@pytest.fixture(scope="module")
def stock(kind, edit_models):
    return stock_edit.load_pipeline(edit_models[kind])


@pytest.fixture(scope="module")
def controls(kind, parts, to_edit) -> Controls:
    return encode_controls(parts, images_of(kind, to_edit), AREA_PX)


def stock_prompt(stock, parts, images, prompt):
    """The pipeline's states of a prompt and its mask, with the images scaled as the pipeline scales them."""
    area, seen = parts.variant.vision_area_px or AREA_PX, []
    for image in images:
        width, height, *_ = stock_edit.area_of(area, image)
        seen.append(stock.image_processor.resize(image, height, width))
    given = seen if parts.variant is EDIT_PLUS else seen[0]
    return stock.encode_prompt(prompt, given, device=torch.device("cpu"))


@pytest.mark.parametrize("prompt", [PROMPT, " ", "", "ein Bär {0} 🐻 <b>"])
def test_a_prompt_with_images_is_encoded_as_by_the_pipeline(kind, parts, stock, controls, to_edit, prompt):
    images = images_of(kind, to_edit)
    theirs, mask = stock_prompt(stock, parts, images, prompt)
    ours = encoded(parts, prompt, controls)
    assert ours.mask is None
    assert mask is None
    torch.testing.assert_close(ours.states, theirs, atol=1e-5, rtol=0)


def test_the_images_positions_count(kind, parts, edit_models, controls, to_edit):
    """As released, diffusers and transformers 5 give image tokens a text's positions: another conditioning."""
    released = stock_edit.load_pipeline(edit_models[kind], image_positions=False)
    ours = encoded(parts, PROMPT, controls).states
    theirs, _ = stock_prompt(released, parts, images_of(kind, to_edit), PROMPT)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [Size(64, 64), Size(96, 64)])
def test_a_complete_run_gives_the_pipelines_latents(kind, parts, stock, controls, to_edit, guidance, size):
    request = SampleRequest(PROMPT, steps=4, guidance=guidance, width=size.width_px, height=size.height_px, seed=7)
    text = encoded(parts, PROMPT, controls)
    negative = encoded(parts, " ", controls) if guidance > 1 else None
    job = SamplingJob(request, size, no_placeholders(), controls=controls)
    with torch.inference_mode():
        ours = sampler.denoise(
            parts, job, sampler.initial_noise(size, 7), Conditioning(text, negative), lambda _step: None
        )
    theirs = stock_run(stock, images_of(kind, to_edit), PROMPT, size, guidance, AREA_PX)
    torch.testing.assert_close(ours, theirs, atol=MOST, rtol=MOST)


def test_another_image_gives_another_velocity(kind, parts, controls):
    """What is beside the noise counts; so does what the text encoder saw of it."""
    text = encoded(parts, PROMPT, controls)
    latents, sigma, size = noise(1), torch.tensor([0.5]), Size(64, 64)
    with torch.inference_mode():
        given = predict_velocity(parts.transformer, latents, sigma, text, size, [controls.latents])
        other = ControlLatents(controls.latents.tokens.flip(0), controls.latents.sizes)
        flipped = predict_velocity(parts.transformer, latents, sigma, text, size, [other])
    assert given.shape == latents.shape
    assert (given - flipped).abs().mean() > 1e-3 * given.abs().mean()


def test_a_batch_of_unequal_images_is_one_by_one(kind, parts, controls, to_edit):
    """In size and, where a model takes several, in number."""
    sets = [controls, encode_controls(parts, to_edit[1:2], AREA_PX), encode_controls(parts, to_edit[2:3], AREA_PX)]
    sets.append(sets[1])
    prompts = [Prompt(text, own.seen) for text, own in zip(["make it red", PROMPT, " ", PROMPT], sets, strict=True)]
    latents, sigma, size = noise(4), torch.tensor([0.1, 0.5, 0.7, 0.9]), Size(64, 64)
    with torch.inference_mode():
        text = encode_text(parts.text_encoder, parts.tokenizer, prompts, no_placeholders(), parts.variant)
        given = [own.latents for own in sets]
        together = predict_velocity(parts.transformer, latents, sigma, text, size, given)
        for i, prompt in enumerate(prompts):
            alone_text = encode_text(parts.text_encoder, parts.tokenizer, [prompt], no_placeholders(), parts.variant)
            own = latents[i : i + 1], sigma[i : i + 1], alone_text, size, given[i : i + 1]
            torch.testing.assert_close(together[i : i + 1], predict_velocity(parts.transformer, *own))


def test_with_a_modulation_table_a_velocity_is_the_same(kind, edit_models, parts, controls):
    """Of the newest model the table holds the level of the images too, which is 0."""
    sigma = torch.tensor([0.25])
    table = load_transformer(edit_models[kind], CPU, Storage(timesteps=sigma))
    text, latents, size = encoded(parts, PROMPT, controls), noise(1), Size(64, 64)
    with torch.inference_mode():
        given = sigma, text, size, [controls.latents]
        want = predict_velocity(parts.transformer, latents, *given)
        torch.testing.assert_close(predict_velocity(table, latents, *given), want)


def test_in_bf16_the_table_knows_every_level_that_sampling_shows(kind, edit_models, to_edit):
    bf16 = load_components(edit_models[kind], Placement(torch.device("cpu"), torch.bfloat16))
    request = SampleRequest(PROMPT, steps=5, guidance=1.0, width=64, height=64, seed=7)
    given = encode_controls(bf16, images_of(kind, to_edit), AREA_PX)
    job = SamplingJob(request, Size(64, 64), no_placeholders(), controls=given)
    (image,) = sampler.sample(bf16, job, lambda *_: None)
    assert image.pixels.size == (64, 64)
