"""The noise schedule, guidance and target agree with diffusers and with the formulas."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from examples.small_model import new_scheduler
from lora_utils.dataset.buckets import buckets, choose_buckets
from lora_utils.model import flow
from lora_utils.model.latents import Size, image_size, pack_latents, round_to_token, unpack_latents

SCHEDULE = flow.Schedule()


def diffusers_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, tokens: int) -> torch.Tensor:
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", [2, 4, 20, 50])
@pytest.mark.parametrize("tokens", [16, 1024, 4096, 6889])
def test_sampling_sigmas_are_those_of_diffusers(steps, tokens):
    ours = torch.tensor(SCHEDULE.sampling_sigmas(steps, tokens))
    torch.testing.assert_close(ours, diffusers_sigmas(new_scheduler(), steps, tokens), rtol=0, atol=1e-6)


def test_one_step_goes_from_noise_to_the_image():
    assert SCHEDULE.sampling_sigmas(1, 1024) == [1.0, 0.0]


@pytest.mark.parametrize(("side_px", "shift"), [(512, 1.71), (768, 1.83), (1024, 2.00), (1328, 2.30)])
def test_shift_by_resolution_is_qwen_images_and_not_fluxs(side_px, shift):
    assert math.exp(SCHEDULE.mu((side_px // 16) ** 2)) == pytest.approx(shift, abs=0.005)


def test_random_sigmas_follow_the_resolutions_shift():
    mu = SCHEDULE.mu(4096)
    sigma = flow.sample_sigmas(200_000, mu, torch.Generator().manual_seed(0))
    assert sigma.min() > 0
    assert sigma.max() < 1
    m = math.exp(mu)  # the median of sigmoid(normal) is 0.5, which the shift moves to m / (1 + m)
    assert sigma.median().item() == pytest.approx(m / (1 + m), abs=5e-3)


def test_noise_target_and_step_belong_together():
    clean, noise = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    sigma = torch.tensor([0.3, 0.9])
    noisy = flow.add_noise(clean, noise, sigma)
    torch.testing.assert_close(noisy[0], 0.7 * clean[0] + 0.3 * noise[0])
    velocity = flow.velocity_target(clean, noise)
    torch.testing.assert_close(flow.euler_step(noisy[1:], velocity[1:], 0.9, 0.0), clean[1:], atol=1e-5, rtol=0)


def test_guidance_keeps_each_tokens_norm_and_scale_one_changes_nothing():
    conditional, unconditional = torch.randn(1, 6, 64), torch.randn(1, 6, 64)
    guided = flow.guide(conditional, unconditional, 4.0)
    torch.testing.assert_close(guided.norm(dim=-1), conditional.norm(dim=-1))
    torch.testing.assert_close(flow.guide(conditional, unconditional, 1.0), conditional)


def test_time_is_cast_before_it_is_divided_as_the_pipeline_does():
    sigma = torch.rand(1000)
    as_pipeline = (sigma * 1000).to(torch.bfloat16) / 1000
    assert torch.equal(flow.model_time(sigma, torch.bfloat16), as_pipeline)


def test_packing_is_the_pipelines():
    latents = torch.randn(2, 16, 12, 8)
    ours = pack_latents(latents)
    assert torch.equal(ours, QwenImagePipeline._pack_latents(latents.unsqueeze(1), 2, 16, 12, 8))
    assert torch.equal(unpack_latents(ours, Size(64, 96)), latents)
    assert torch.equal(QwenImagePipeline._unpack_latents(ours, 96, 64, 8)[:, :, 0], latents)


def test_sizes_round_to_sixteen_and_default_to_the_official_ones():
    assert [round_to_token(px) for px in (64, 71, 73, 1000)] == [64, 64, 80, 992]
    assert image_size(1000, 520, "1:1") == Size(992, 512)
    assert image_size(None, None, "16:9") == Size(1664, 928)
    assert image_size(None, None, "1:1").tokens == 83 * 83


@pytest.mark.parametrize("resolution_px", [64, 512, 768, 1024])
def test_buckets_are_multiples_of_sixteen_with_the_resolutions_area(resolution_px):
    for size in buckets(resolution_px):
        assert size.width_px % 16 == 0
        assert size.height_px % 16 == 0
        assert size.width_px * size.height_px == pytest.approx(
            resolution_px**2, rel=0.1 if resolution_px >= 256 else 0.4
        )
        assert Size(size.height_px, size.width_px) in buckets(resolution_px)
    assert Size(resolution_px, resolution_px) in buckets(resolution_px)


def test_an_image_trains_at_every_resolution_it_fills_and_is_enlarged_only_to_the_smallest():
    resolutions = (512, 768, 1024)
    assert choose_buckets(2000, 2000, resolutions) == [Size(512, 512), Size(768, 768), Size(1024, 1024)]
    assert choose_buckets(800, 800, resolutions) == [Size(512, 512), Size(768, 768)]
    assert choose_buckets(100, 100, resolutions) == [Size(512, 512)]
    (wide,) = choose_buckets(1600, 800, (512,))
    assert wide.width_px / wide.height_px == pytest.approx(2, rel=0.1)
