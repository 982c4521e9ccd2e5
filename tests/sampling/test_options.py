"""Images to start from, masks, and going fast: what each input comes to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline
from PIL import Image

from lora_utils import constants
from lora_utils.config import SampleFiles, SampleRequest
from lora_utils.errors import UserError
from lora_utils.lora.formats import LoraFile
from lora_utils.lora.updates import LowRank
from lora_utils.lora.weights import Weights, is_lightning
from lora_utils.model import flow, memory
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement
from lora_utils.model.latents import Size, image_size, pack_latents, unpack_latents
from lora_utils.model.text_encoder import encode_text
from lora_utils.model.transformer import predict_velocity
from lora_utils.model.vae import decode_images
from lora_utils.placeholder.embedding import embedding_matrix
from lora_utils.placeholder.tokens import Placeholders, no_placeholders
from lora_utils.sampling import sampler
from lora_utils.sampling.options import (
    REUSE_THRESHOLD,
    SamplingOptions,
    check_files,
    choose_options,
    feathered,
    load_init_image,
)
from lora_utils.sampling.sampler import Conditioning
from tests.helpers import job_of

REQUEST = SampleRequest("a red circle on a gray background", steps=6, width=64, height=64, seed=3)
SIZE = Size(64, 64)


@pytest.fixture
def photo(tmp_path) -> Path:
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64))
    shown.save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def mask(tmp_path) -> Path:
    shown = Image.new("L", (64, 64), 0)
    shown.paste(255, (0, 0, 32, 64))
    shown.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def start_of(components, photo, mask=None, request=REQUEST):
    return load_init_image(components, request, photo, mask)[1]


def draw(components, start=None, request=REQUEST, on_step=lambda *_: None):
    return sampler.sample(components, job_of(request, SIZE, init_image=start), on_step)[0].pixels


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_a_strength_of_one_starts_from_noise_and_of_zero_changes_nothing(components, photo):
    start = start_of(components, photo)
    assert same(draw(components, start, replace(REQUEST, strength=1.0)), draw(components))
    round_trip = decode_images(components.vae, start.clean, SIZE)[0]
    assert same(draw(components, start, replace(REQUEST, strength=0.0)), round_trip)


@pytest.mark.parametrize(("strength", "run"), [(0.5, 3), (0.34, 3), (0.33, 2), (0.01, 1), (1.0, 6)])
def test_only_the_rest_of_the_schedule_is_run(strength, run, components, photo):
    steps = []
    request = replace(REQUEST, strength=strength)
    draw(components, start_of(components, photo), request, lambda _images, step: steps.append(step))
    assert steps == list(range(1, run + 1))
    assert request.steps_run == run


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_it_is_the_pipelines_img2img(strength, components, photo, random_model):
    """Given the same latents, for diffusers draws from the VAE's distribution where we take its mode."""
    start = start_of(components, photo)
    request = replace(REQUEST, strength=strength)
    with torch.inference_mode():
        text, empty = (
            encode_text(components.text_encoder, components.tokenizer, [words], no_placeholders())
            for words in (request.prompt, " ")
        )
        noise = sampler.initial_noise(SIZE, request.seed)
        job = job_of(request, SIZE, init_image=start)
        ours = sampler.denoise(components, job, noise, Conditioning(text, empty), lambda _step: None)
    stock = QwenImageImg2ImgPipeline.from_pretrained(random_model)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompt=request.prompt,
        negative_prompt=" ",
        true_cfg_scale=4.0,
        num_inference_steps=6,
        width=64,
        height=64,
        image=unpack_latents(start.clean, SIZE),
        strength=strength,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_outside_a_mask_the_latents_are_the_images_own(components, photo, mask):
    start = start_of(components, photo, mask)
    request = replace(REQUEST, strength=1.0)
    with torch.inference_mode():
        text = encode_text(components.text_encoder, components.tokenizer, [request.prompt], no_placeholders())
        noise = sampler.initial_noise(SIZE, 3)
        job = job_of(request, SIZE, init_image=start)
        latents = sampler.denoise(components, job, noise, Conditioning(text, None), lambda _step: None)
    grid, clean = unpack_latents(latents, SIZE), unpack_latents(start.clean, SIZE)  # [1, 16, 8, 8]
    assert torch.equal(grid[..., 4:], clean[..., 4:])
    assert (grid[..., :4] - clean[..., :4]).abs().mean() > 0.3


def test_outside_a_mask_the_image_is_the_same_bit_for_bit_after_any_number_of_passes(tiny_model, tmp_path, mask):
    components = load_components(tiny_model, default_placement())
    shown = Image.new("RGB", (64, 64), (120, 215, 225))
    shown.paste((220, 40, 40), (40, 24, 56, 40))
    shown.save(tmp_path / "a.png")
    request = replace(REQUEST, prompt="a photo of a blue ring on a cyan background", steps=20, strength=1.0)
    white = np.asarray(Image.open(mask)) > 0
    for _ in range(3):
        start = start_of(components, tmp_path / "a.png", mask, request)
        painted = draw(components, start, request)
        assert np.array_equal(np.asarray(painted)[~white], np.asarray(shown)[~white])
        painted.save(tmp_path / "a.png")
    inside = np.asarray(painted, float)[white] - np.asarray(shown, float)[white]
    assert np.abs(inside).mean() > 5, "and inside it something is drawn"


def test_a_masks_white_fades_inwards_and_its_black_stays():
    drawn = Image.new("L", (512, 512), 0)
    drawn.paste(255, (100, 100, 400, 400))
    drawn.paste(255, (450, 0, 454, 512))
    shares = np.asarray(feathered(drawn), float) / 255
    assert not shares[np.asarray(drawn) == 0].any()
    assert (shares[110:390, 110:390] == 1).all()
    edge = shares[250, 100:108]
    assert (np.diff(edge) >= 0).all()
    assert 0.4 < edge[0] < 0.9
    assert shares[250, 450:454].max() > 0.5, "a thin line is still one"


def test_any_white_of_a_latent_makes_it_one_to_be_generated(components, photo, tmp_path):
    thin = Image.new("L", (64, 64), 0)
    thin.paste(255, (17, 9, 19, 11))  # 4 of the 64 pixels of one latent
    thin.save(tmp_path / "thin.png")
    repaint = start_of(components, photo, tmp_path / "thin.png").repaint
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., 1, 2] = 1
    assert torch.equal(repaint, pack_latents(expected.repeat(1, 16, 1, 1)).bool())


@pytest.mark.parametrize(
    ("image", "mask_size", "message"),
    [
        (False, (64, 64), "mask says what of image is generated again, and there is no image"),
        (True, (64, 32), r"mask\.png has 64x32 pixels, its image 64x64"),
        (True, None, "there is no file"),
    ],
)
def test_what_cannot_be_painted_is_refused(image, mask_size, message, components, photo, tmp_path):
    if mask_size:
        Image.new("L", mask_size, 255).save(tmp_path / "mask.png")
    files = SampleFiles(image=photo if image else None, mask=tmp_path / "mask.png")

    def start() -> None:
        check_files(files, components.variant)
        load_init_image(components, REQUEST, files.image, files.mask)

    with pytest.raises(UserError, match=message):
        start()


def test_sizes_follow_the_image_the_aspect_ratio_and_the_area():
    assert image_size(None, None, "1:1", like_px=(640, 480)) == Size(640, 480)
    wide = image_size(None, None, "1:1", like_px=(4000, 2000))
    assert wide.width_px * wide.height_px == pytest.approx(1328**2, rel=0.03)
    assert wide.width_px / wide.height_px == pytest.approx(2, rel=0.03)
    assert image_size(512, 256, "1:1", like_px=(4000, 2000)) == Size(512, 256)
    for aspect_ratio, (width, height) in constants.OFFICIAL_SIZES_PX.items():
        assert image_size(None, None, aspect_ratio) == Size(width, height)
        quarter = image_size(None, None, aspect_ratio, 0.25)
        assert quarter.width_px * quarter.height_px == pytest.approx(0.25e6, rel=0.05)
        assert quarter.width_px / quarter.height_px == pytest.approx(width / height, rel=0.05)


# --- fast -----------------------------------------------------------------------------------------------------------


def weights_named(name, title=None):
    return Weights(LoraFile({}, metadata={"modelspec.title": title} if title else {}), None, name)


def known_lightning(rank=64, alpha=8.0, **given):
    layers = {
        f"transformer_blocks.{block}.{layer}": LowRank(torch.ones(rank, 8), torch.ones(8, rank), alpha)
        for block in range(2)
        for layer in constants.LORA_TARGETS["attention_mlp"]
    }
    return LoraFile(layers, alphas_in_keys=True, **given)


def test_a_lightning_lora_is_known_by_its_header_or_its_ranks_and_alphas_and_not_by_its_files_name():
    assert is_lightning(known_lightning())
    assert is_lightning(LoraFile({}, metadata={"modelspec.title": "Qwen-Image-Lightning-8steps-V1.1"}))
    assert not is_lightning(known_lightning(alpha=64.0))
    assert not is_lightning(known_lightning(rank=32))
    assert not is_lightning(replace(known_lightning(), alphas_in_keys=False))
    assert not is_lightning(LoraFile({}, metadata={"modelspec.title": "lightning over the sea"}))


@pytest.mark.parametrize(("said", "schedule"), [("auto", None), ("yes", flow.LIGHTNING), ("no", None)])
def test_a_file_that_is_called_lightning_is_none_unless_the_caller_says_so(said, schedule):
    request = replace(REQUEST, go_fast=True, lightning=said)
    _, options = choose_options(request, [weights_named("lightning-storm.safetensors")], None)
    assert options.schedule is schedule


def test_a_lightning_lora_samples_without_guidance_on_its_own_schedule_when_asked_to(caplog):
    caplog.set_level("INFO", "lora_utils")
    lightning = weights_named("l.safetensors", "Qwen-Image-Lightning-8steps-V1.1")
    plain, options = choose_options(REQUEST, [lightning], None)
    assert (plain, options) == (REQUEST, SamplingOptions())
    assert "was made for go_fast" in caplog.text
    request, options = choose_options(replace(REQUEST, go_fast=True, steps=40), [weights_named("x"), lightning], None)
    assert not request.guided
    assert request.steps == 40, "never a silent cap"
    assert "40 take longer and gain nothing" in caplog.text
    assert options.schedule is flow.LIGHTNING
    assert options.reuse_threshold is None


def test_the_lightning_schedule_is_a_fixed_shift_of_three_down_to_zero():
    for tokens in (256, 6889):
        sigmas = flow.LIGHTNING.sampling_sigmas(4, tokens)
        assert sigmas == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


def test_without_one_steps_are_reused_and_said_to_be_lossy(caplog):
    caplog.set_level("INFO", "lora_utils")
    request, options = choose_options(replace(REQUEST, go_fast=True), [weights_named("x")], None)
    assert request.guided
    assert options.reuse_threshold == REUSE_THRESHOLD
    assert "differs from the full run's" in caplog.text


# --- memory ---------------------------------------------------------------------------------------------------------


def test_images_are_sampled_together_as_far_as_memory_goes(components, monkeypatch):
    """Out of memory, fewer of them; and each is what it is alone."""
    request, asked = replace(REQUEST, num_outputs=4), []
    alone = [draw(components, request=replace(REQUEST, seed=3 + index)) for index in range(4)]
    predict = predict_velocity

    def predict_in_little_memory(transformer, latents, *given):
        asked.append(len(latents))
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(transformer, latents, *given)

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "predict_velocity", predict_in_little_memory)
        several = sampler.sample(components, job_of(request, SIZE), lambda *_: None)
    assert asked[0] == 8, "four images, and both branches of their guidance"
    assert set(asked[1:]) == {4}
    for one, drawn in zip(alone, several, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(drawn.pixels, int)).max() <= 1
    monkeypatch.setattr(sampler, "free_bytes", lambda _: memory.SPARE_BYTES + 1)
    assert sampler.at_once(components, SIZE.tokens) == 1


def test_an_image_that_never_fits_is_refused_with_one_that_would(components, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = draw(components)
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "predict_velocity", fail)
        patch.setattr(sampler, "free_bytes", lambda _: 3e9)
        with pytest.raises(UserError, match=r"64x64 doesn't fit into the 3 GB .* set megapixels to 0\.05"):
            draw(components)
    assert same(draw(components), before)


def test_a_prompt_is_encoded_once(components, monkeypatch):
    prompts, encoded = sampler.PromptCache(), []
    encode = encode_text
    monkeypatch.setattr(sampler, "encode_text", lambda *given: encoded.append(given[2][0].text) or encode(*given))
    for prompt in ("a red circle", "a blue ring", "a red circle"):
        request = replace(REQUEST, prompt=prompt)
        sampler.sample(components, job_of(request, SIZE), lambda *_: None, prompts)
    assert encoded == ["a red circle", " ", "a blue ring"]
    encoded.clear()
    one, other = (torch.full([embedding_matrix(components.text_encoder).shape[1]], value) for value in (0.1, 0.2))
    for embedding in (one, one.clone(), other, one):
        token = Placeholders(("<zwx>",), (4,), (embedding,))
        states = prompts.encode(components, "a <zwx>", token).states
        assert torch.equal(states, encode(components.text_encoder, components.tokenizer, ["a <zwx>"], token).states)
    assert encoded == ["a <zwx>", "a <zwx>"], "once for each embedding of the token"
    for index in range(40):
        prompts.encode(components, f"number {index}", no_placeholders())
    assert len(prompts.kept) == sampler.PROMPTS_KEPT
