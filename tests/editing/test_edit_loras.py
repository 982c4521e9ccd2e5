"""LoRAs on a model that edits are what diffusers' editing pipeline makes of the same file, Lightning ones too."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from examples import stock_edit
from lora_utils import constants
from lora_utils.config import SampleRequest
from lora_utils.lora.formats import LoraFile, write_lora_file
from lora_utils.lora.hooks import applied_loras
from lora_utils.lora.parts import LowRank
from lora_utils.lora.weights import load_weights
from lora_utils.model.controls import encode_controls
from lora_utils.model.latents import Size
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.sampling import sampler
from lora_utils.sampling.options import choose_options
from lora_utils.sampling.sampler import Conditioning, PromptCache, SamplingJob
from tests.editing.material import stock_run

PROMPT, AREA_PX, SIZE = "make it red", 64 * 64, Size(64, 64)


@pytest.fixture(params=["2509", "2511"])
def kind(request):
    return request.param


def layers_of(transformer, rank, alpha):
    """A LoRA of all of the blocks' attention and MLPs, strong enough to show."""
    generator, layers = torch.Generator().manual_seed(2), {}
    for name, module in transformer.named_modules():
        if name.split(".", 2)[-1] in constants.LORA_TARGETS["attention_mlp"]:
            down = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            up = torch.randn(module.out_features, rank, generator=generator) * 0.1 * (rank / alpha) / rank**0.5
            layers[name] = LowRank(down, up, alpha)
    return layers


def write_lightning(path, layers):
    """The keys and alphas of lightx2v/Qwen-Image-Lightning's files for editing models."""
    tensors = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, path)


def edited(parts, path, request, to_edit):
    """Our latents, with the file applied and the schedule that `choose_options` takes."""
    weights = load_weights(path, parts)
    controls = encode_controls(parts, to_edit, AREA_PX)
    request, options = choose_options(request, [weights], None)
    job = SamplingJob(request, SIZE, no_placeholders(), options, controls=controls)
    with torch.inference_mode(), applied_loras(parts.transformer, [(weights.lora, 1.0)]):
        prompts = [request.prompt, request.negative_prompt]
        text, negative = (PromptCache().encode(parts, prompt, job.placeholders, controls) for prompt in prompts)
        noise = sampler.initial_noise(SIZE, request.seed)
        return sampler.denoise(
            parts, job, noise, Conditioning(text, negative if request.guided else None), lambda _step: None
        )


def test_stock_diffusers_edits_with_our_file_as_we_do(kind, edit_models, parts_of, to_edit, tmp_path):
    parts, path = parts_of[kind], tmp_path / "l.safetensors"
    write_lora_file(path, LoraFile(layers_of(parts.transformer, 4, 4.0)), dtype=torch.float32)
    request = SampleRequest(PROMPT, steps=4, guidance=4.0, width=64, height=64, seed=7)
    ours = edited(parts, path, request, to_edit)

    stock = stock_edit.load_pipeline(edit_models[kind])
    without = stock_run(stock, to_edit, PROMPT, SIZE, 4.0, AREA_PX)
    stock.load_lora_weights(str(path))
    theirs = stock_run(stock, to_edit, PROMPT, SIZE, 4.0, AREA_PX)
    assert (theirs - without).abs().mean() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_lightning_lora_for_editing_samples_as_its_authors_say(kind, edit_models, parts_of, to_edit, tmp_path):
    """Four steps, no guidance, a shift of 3 for all sizes: the scheduler of lightx2v's own examples."""
    parts, path = parts_of[kind], tmp_path / "l.safetensors"
    write_lightning(path, layers_of(parts.transformer, 64, 8.0))
    request = SampleRequest(PROMPT, steps=4, guidance=4.0, width=64, height=64, seed=7, go_fast=True)
    ours = edited(parts, path, request, to_edit)

    stock = stock_edit.load_pipeline(edit_models[kind])
    shift = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
    stock.scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config, **shift)
    stock.load_lora_weights(str(path))
    theirs = stock_run(stock, to_edit, PROMPT, SIZE, 1.0, AREA_PX)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
