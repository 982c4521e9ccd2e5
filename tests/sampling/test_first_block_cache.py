"""Reusing earlier steps: exact where nothing is skipped, and gone when the call ends."""

from contextlib import contextmanager

import pytest
import torch

from lora_utils.config import SampleRequest
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import encode_text
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.sampling import first_block_cache, sampler
from lora_utils.sampling.first_block_cache import extrapolate
from lora_utils.sampling.sampler import Conditioning
from tests.helpers import job_of

SIZE = Size(64, 64)
REQUEST = SampleRequest("a red circle", steps=8, seed=1)


def latents(components, branches=1, prompt="a red circle", request=REQUEST):
    with torch.inference_mode():
        text, empty = (
            encode_text(components.text_encoder, components.tokenizer, [words], no_placeholders())
            for words in (prompt, " ")
        )
        job, noise = job_of(request, SIZE), sampler.initial_noise(SIZE, 1)

        def denoise():
            return sampler.denoise(components, job, noise, Conditioning(text, empty), lambda _step: None)

        if branches == 2:  # as images that are too large for one batch
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sampler, "TOGETHER_TOKENS", 0)
                return denoise()
        return denoise()


@pytest.mark.parametrize("branches", [1, 2])
def test_a_threshold_of_zero_computes_everything(branches, components):
    full = latents(components, branches)
    with first_block_cache.first_block_caching(components.transformer, 0.0, branches) as reuse:
        assert torch.equal(latents(components, branches), full)
    assert (reuse.forwards, reuse.skipped) == (8 * branches, 0)
    assert torch.equal(latents(components, branches), full), "and nothing of it stays"


@pytest.mark.parametrize("branches", [1, 2])
def test_a_large_threshold_computes_the_first_forward_of_each_branch_only(branches, components):
    full = latents(components, branches)
    with first_block_cache.first_block_caching(components.transformer, 1e9, branches) as reuse:
        fast = latents(components, branches)
    assert (reuse.forwards, reuse.skipped) == (8 * branches, 7 * branches)
    assert not torch.equal(fast, full)
    assert torch.isfinite(fast).all()
    assert torch.equal(latents(components, branches), full)


def test_branches_do_not_mix_even_when_their_prompts_are_of_one_length(components):
    """With the negative prompt equal to the prompt, both branches are one, and so are their decisions."""
    same, different = [], []
    for prompt, kept in ((" ", same), ("a red circle", different)):
        with first_block_cache.first_block_caching(components.transformer, 0.3, 2) as reuse:
            latents(components, 2, prompt)
        kept.extend(branch.rests[0] for branch in reuse.branches)
    assert torch.equal(*same)
    assert not torch.equal(different[0].mean(), different[1].mean())


def test_what_blocks_add_is_foretold_by_the_polynomial_through_what_they_added():
    line, curve = (lambda t: 3 + 2 * t), (lambda t: 1 - t + 0.5 * t * t)
    for values, times in ((line, [4, 1]), (curve, [6, 5, 2])):
        kept = [torch.full((2, 3), float(values(at))) for at in times]
        torch.testing.assert_close(extrapolate(times, kept, 9), torch.full((2, 3), float(values(9))))
    assert torch.equal(extrapolate([4], [torch.ones(2)], 9), torch.ones(2))


def test_along_a_line_fewer_blocks_are_computed_for_the_same_difference(tiny_model):
    """At the thresholds that docs/benchmarks.md compares."""
    components = load_components(tiny_model, default_placement())
    found = {}
    for order, threshold in ((0, 0.1), (1, 0.07)):
        request, prompt = SampleRequest("", steps=40, seed=0), "a photo of a red circle on a cyan background"
        full = latents(components, prompt=prompt, request=request)
        with first_block_cache.first_block_caching(components.transformer, threshold, 1, order) as reuse:
            fast = latents(components, prompt=prompt, request=request)
        found[order] = (reuse.skipped / reuse.forwards, float((fast - full).abs().mean()))
    assert found[1][0] > found[0][0]
    assert found[1][1] < 1.5 * found[0][1]


def test_a_failure_within_leaves_the_blocks_as_they_were(components):
    full = latents(components)

    def fail():
        with first_block_cache.first_block_caching(components.transformer, 1e9, 1):
            latents(components)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(latents(components), full)


def test_on_the_trained_model_it_saves_forwards_and_the_image_stays(tiny_model, monkeypatch):
    components, states, reused = (
        load_components(tiny_model, default_placement()),
        [],
        first_block_cache.first_block_caching,
    )
    request = SampleRequest("a photo of a red circle on a gray background", steps=50, seed=2)

    @contextmanager
    def watched(*given):
        with reused(*given) as state:
            states.append(state)
            yield state

    monkeypatch.setattr(sampler, "first_block_caching", watched)

    def draw(threshold):
        return sampler.sample(components, job_of(request, SIZE, reuse_threshold=threshold), lambda *_: None)[0].pixels

    full, fast = (torch.tensor(list(draw(threshold).tobytes())).float() for threshold in (None, 0.1))
    assert 0 < (full - fast).abs().mean() < 3
    (state,) = states
    assert state.skipped > 0.4 * state.forwards, "the full run doesn't reuse"
