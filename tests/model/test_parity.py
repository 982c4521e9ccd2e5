"""Our sampler and encoders compute what the stock diffusers pipeline computes."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from lora_utils.config import SampleRequest
from lora_utils.model.latents import Size, pack_latents
from lora_utils.model.text_encoder import encode_text
from lora_utils.model.transformer import predict_velocity
from lora_utils.model.vae import decode_images, encode_images, fold_temporal_convolutions, unfolded_state
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.sampling import sampler
from lora_utils.sampling.sampler import Conditioning
from tests.helpers import job_of

PROMPTS = ["a red circle", "", " ", "a photo of a big blue ring on a pink background at the left", "ein Bär {0} 🐻 <b>"]


def encode(components, prompts):
    with torch.inference_mode():
        return encode_text(components.text_encoder, components.tokenizer, prompts, no_placeholders())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_prompt_is_encoded_as_by_the_pipeline_and_without_a_mask(prompt, components, pipeline):
    ours = encode(components, [prompt])
    theirs, mask = pipeline.encode_prompt(prompt, device=torch.device("cpu"))
    assert ours.mask is None
    assert mask is None
    torch.testing.assert_close(ours.states, theirs, atol=1e-5, rtol=0)


def test_empty_prompts_keep_the_templates_tail(components):
    assert encode(components, [""]).states.shape[1] == 5
    assert encode(components, [" "]).states.shape[1] == 6


def test_a_batch_of_unequal_prompts_is_encoded_as_one_by_one(components, pipeline):
    ours = encode(components, PROMPTS)
    theirs, mask = pipeline.encode_prompt(PROMPTS, device=torch.device("cpu"))
    assert ours.mask is not None
    assert torch.equal(ours.mask, mask.bool())
    torch.testing.assert_close(ours.states * ours.mask[..., None], theirs * mask[..., None], atol=1e-5, rtol=0)
    for index, prompt in enumerate(PROMPTS):
        alone = encode(components, [prompt]).states[0]
        torch.testing.assert_close(ours.states[index, : len(alone)], alone, atol=1e-5, rtol=0)
        assert not ours.states[index, len(alone) :].any()


def test_padding_never_changes_a_prediction(components):
    texts = encode(components, PROMPTS)
    latents, sigma = torch.randn(len(PROMPTS), 16, 64), torch.rand(len(PROMPTS))
    size = Size(64, 64)
    with torch.inference_mode():
        together = predict_velocity(components.transformer, latents, sigma, texts, size)
        for i, prompt in enumerate(PROMPTS):
            text = encode(components, [prompt])
            alone = predict_velocity(components.transformer, latents[i : i + 1], sigma[i : i + 1], text, size)
            torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [Size(64, 64), Size(96, 64)])
def test_a_complete_sampling_run_gives_the_pipelines_latents(guidance, size, components, pipeline):
    request = SampleRequest(PROMPTS[3], steps=5, guidance=guidance, width=size.width_px, height=size.height_px, seed=7)
    with torch.inference_mode():
        text = encode(components, [request.prompt])
        empty = encode(components, [" "]) if request.guided else None
        noise = sampler.initial_noise(size, 7)
        conditioning = Conditioning(text, empty)
        ours = sampler.denoise(components, job_of(request, size), noise, conditioning, lambda _step: None)
    theirs = pipeline(
        prompt=request.prompt,
        negative_prompt=" " if request.guided else None,
        true_cfg_scale=guidance,
        num_inference_steps=5,
        width=size.width_px,
        height=size.height_px,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("together", [True, False])
def test_prompts_of_unequal_length_sampled_as_one_batch_are_those_sampled_alone(together, components, monkeypatch):
    """Both branches of the guidance as one batch, or one after the other: padding is told from text in either."""
    monkeypatch.setattr(sampler, "TOGETHER_TOKENS", 10_000 if together else 0)
    request, size = SampleRequest("", steps=4, seed=0), Size(64, 64)
    noise = torch.cat([sampler.initial_noise(size, seed) for seed in range(len(PROMPTS))])

    def latents(noise, prompts):
        text, empty = encode(components, prompts), encode(components, [" "] * len(prompts))
        return sampler.denoise(components, job_of(request, size), noise, Conditioning(text, empty), lambda _step: None)

    with torch.inference_mode():
        several = latents(noise, PROMPTS)
        for index, prompt in enumerate(PROMPTS):
            alone = latents(noise[index : index + 1], [prompt])
            torch.testing.assert_close(several[index : index + 1], alone, atol=1e-3, rtol=1e-3)


def test_a_sampled_image_is_the_pipelines(components, pipeline):
    request = SampleRequest("a red circle", steps=3, width=64, height=64, seed=1)
    (ours,) = sampler.sample(components, job_of(request, Size(64, 64)), lambda *_: None)
    theirs = pipeline(
        prompt="a red circle",
        negative_prompt=" ",
        true_cfg_scale=4.0,
        num_inference_steps=3,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images[0]
    difference = torch.from_numpy(theirs * 255).round() - torch.from_numpy(np.array(ours.pixels))
    assert difference.abs().max() <= 1


def test_the_folded_vae_is_the_video_vae_for_one_frame(random_model, components):
    whole = AutoencoderKLQwenImage.from_pretrained(random_model / "vae")
    pixels = torch.rand(2, 3, 48, 64) * 2 - 1
    with torch.no_grad():
        latents = whole.encode(pixels.unsqueeze(2)).latent_dist.mode()
        mean = torch.tensor(whole.config["latents_mean"]).view(1, -1, 1, 1)
        std = torch.tensor(whole.config["latents_std"]).view(1, -1, 1, 1)
        theirs = whole.decode(latents).sample[:, :, 0]
    ours = encode_images(components.vae, pixels)
    torch.testing.assert_close(ours, pack_latents((latents[:, :, 0] - mean) / std), atol=1e-5, rtol=0)
    decoded = decode_images(components.vae, ours, Size(64, 48))
    expected = ((theirs / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    for image, wanted in zip(decoded, expected, strict=True):
        assert (torch.from_numpy(np.array(image)) - wanted).abs().max() <= 1


def test_unfolding_gives_a_video_vae_that_folds_to_the_same(random_model):
    folded = fold_temporal_convolutions(AutoencoderKLQwenImage.from_pretrained(random_model / "vae"))
    again = AutoencoderKLQwenImage.from_config(folded.config)
    again.load_state_dict(unfolded_state(folded))
    refolded = fold_temporal_convolutions(again).state_dict()
    assert all(torch.equal(refolded[key], value) for key, value in folded.state_dict().items())
