"""Quantised bases: stored small, computed as the rounded matrices would, and still something to learn on."""

import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.speed.jobs import weights_of
from examples import demo, evaluate
from lora_utils.config import TrainConfig
from lora_utils.lora.adapter import AdapterSettings, attach_adapter
from lora_utils.lora.formats import LoraFile
from lora_utils.lora.hooks import applied_loras, move_lora
from lora_utils.lora.updates import LowRank
from lora_utils.model import memory_estimate, quantization
from lora_utils.model.device import Placement, default_placement
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import TextEmbeddings
from lora_utils.model.transformer import Storage, build_transformer, load_transformer, predict_velocity
from tests.helpers import ROOT, losses, make_state
from train import train

SCHEMES = list(quantization.WEIGHT_BYTES)
ROUNDING = {"fp8": 0.03, "int8": 0.01, "nf4": 0.11}  # relative error of a matrix
PLACE = default_placement()
SIZE = Size(64, 64)


def load(folder, scheme):
    return load_transformer(folder, PLACE, Storage(scheme))


def linears(transformer):
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def dense_twin(folder, quantized):
    """The plain transformer with the same rounded numbers in its matrices."""
    twin, stored = load(folder, "none"), linears(quantized)
    for name, layer in linears(twin).items():
        if quantization.is_quantized(name):
            layer.weight = nn.Parameter(quantization.dense(stored[name].weight), requires_grad=False)
    return twin


def attach(transformer):
    """A LoRA that does something."""
    parameters = attach_adapter(transformer, AdapterSettings("attention_mlp", 4), torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    return parameters


def velocity(transformer):
    torch.manual_seed(3)
    latents, states = torch.randn(2, SIZE.tokens, 64), torch.randn(2, 7, transformer.txt_in.in_features)
    return predict_velocity(transformer, latents, torch.tensor([0.3, 0.8]), TextEmbeddings(states, None), SIZE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_computes_what_the_rounded_matrices_would(scheme, random_model):
    quantized = load(random_model, scheme)
    outcomes = []
    for transformer in (quantized, dense_twin(random_model, quantized)):
        parameters = attach(transformer)
        out = velocity(transformer)
        out.square().mean().backward()
        outcomes.append([out.detach(), *(weight.grad for weight in parameters if weight.grad is not None)])
    for ours, plain in zip(*outcomes, strict=True):
        assert torch.allclose(ours, plain, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_matrices_are_rounded_a_little_and_the_sensitive_layers_not_at_all(scheme, tiny_model):
    exact, stored = linears(load(tiny_model, "none")), linears(load(tiny_model, scheme))
    kept = {name for name in exact if not quantization.is_quantized(name)}
    for name in exact.keys() - kept:
        error = quantization.dense(stored[name].weight) - exact[name].weight
        assert 0 < error.norm() / exact[name].weight.norm() < ROUNDING[scheme], name
        assert torch.equal(stored[name].bias, exact[name].bias)
    for name in kept:
        assert torch.equal(stored[name].weight, exact[name].weight), name
    assert {name.split(".", 2)[-1] for name in kept if "blocks" in name} == {"img_mod.1", "txt_mod.1", "img_mlp.net.2"}
    assert {"img_in", "txt_in", "proj_out", "norm_out.linear"} < kept
    assert any("time_text_embed" in name for name in kept)


def stored_bytes(tensor):
    """Of all that a parameter holds."""
    if state := getattr(tensor, "quant_state", None):
        parts = [tensor.data, state.absmax, state.code, state.state2.absmax, state.state2.code]
    elif hasattr(tensor, "tensor_data_names"):
        parts = [getattr(tensor, name) for name in tensor.tensor_data_names]
    else:
        parts = [tensor]
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
def test_a_loaded_transformer_holds_the_bytes_that_the_plan_counts_on(scheme, table):
    config = {"num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 8, "joint_attention_dim": 256}
    place, times = Placement(torch.device("cpu"), torch.bfloat16), torch.tensor([0.5]) if table else None
    transformer = build_transformer(config, weights_of(config, place), Path("nowhere"), place, Storage(scheme, times))
    held = sum(stored_bytes(parameter) for parameter in transformer.parameters())
    assert held == pytest.approx(
        memory_estimate.transformer_bytes(memory_estimate.count_weights(config), 2, table)[scheme], rel=0.01
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_dense_matrix_is_kept_for_the_backward_pass(scheme, random_model):
    quantized = load(random_model, scheme)
    attach(quantized)
    held = {weight.data_ptr() for name, weight in quantized.named_parameters() if not quantization.is_quantized(name)}
    matrices = {frozenset(layer.weight.shape) for layer in linears(load(random_model, "none")).values()}
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        velocity(quantized)
    own = [tensor for tensor in kept if tensor.data_ptr() not in held]
    assert not [tensor.shape for tensor in own if tensor.ndim == 2 and frozenset(tensor.shape) in matrices]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_taking_a_lora_away_leaves_the_quantised_base_as_it_was(scheme, random_model):
    quantized = load(random_model, scheme)
    with torch.inference_mode():
        before = velocity(quantized)
        layers = {"transformer_blocks.0.attn.to_q": LowRank(torch.ones(2, 128), torch.ones(128, 2), 2.0)}
        lora = move_lora(LoraFile(layers, {}, ""), quantized, PLACE)
        with applied_loras(quantized, [(lora, 1.0)]):
            assert not torch.equal(velocity(quantized), before)
        assert torch.equal(velocity(quantized), before)


@pytest.fixture(scope="module")
def curve_of(dataset, tiny_model):
    """The losses of a short run on a base in this scheme."""
    config = TrainConfig(
        steps=20, rank=8, learning_rate=1e-3, batch_size=4, resolution="64", seed=0, train_placeholder_token=True
    )

    @lru_cache
    def curve(scheme):
        run = make_state(replace(config, quantization=scheme), dataset, tiny_model, placement=PLACE)
        assert run.config.quantization == scheme
        return losses(run)

    return curve


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_stays_within_five_percent(scheme, curve_of):
    quantized, exact = curve_of(scheme), curve_of("none")
    assert quantized != exact
    assert sum(quantized[-5:]) == pytest.approx(sum(exact[-5:]), rel=0.05)


@pytest.mark.slow
def test_what_is_taught_on_the_coarsest_base_is_found_on_the_exact_one(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(tiny_model))
    demo.write_dataset(tmp_path / "dataset.zip", demo.OBJECT, demo.shapes.Prompt(demo.TOKEN))
    trained = demo.call(train, dataset=tmp_path / "dataset.zip", **demo.TRAINING, quantization="nf4")
    weights = shutil.copy(str(trained.weights), tmp_path / "weights.zip")
    scores = evaluate.evaluate_weights(tiny_model, weights, demo.OBJECT, demo.TOKEN, prompts=40)
    taught, others = scores[f"{demo.TOKEN} with the LoRA"], scores["other prompts with the LoRA"]
    print({name: str(score) for name, score in scores.items()})
    assert taught.kind >= 0.75, str(taught)
    assert others.all_three >= scores["other prompts, base model"].all_three - 0.05, str(others)


HELD = """
    import torch
    from pathlib import Path
    from benchmarks.speed.jobs import TRUE_WIDTH, weights_of
    from lora_utils.model import ram, memory_estimate
    from lora_utils.model.device import Placement
    from lora_utils.model.transformer import Storage, build_transformer

    config, place = {{"num_layers": 3, **TRUE_WIDTH}}, Placement(torch.device("cpu"), torch.bfloat16)
    planned = memory_estimate.transformer_bytes(memory_estimate.count_weights(config), 2, True)["{scheme}"]
    before = ram.ram_usage().held
    storage = Storage("{scheme}", torch.tensor([0.5]))
    transformer = build_transformer(config, weights_of(config, place), Path("nowhere"), place, storage)
    print((ram.ram_usage().held - before) / planned)
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "nf4", "fp8"])
def test_on_a_cpu_the_process_holds_what_is_planned_and_nothing_that_quantising_has_left(scheme):
    code = textwrap.dedent(HELD.format(scheme=scheme))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(1.0, abs=0.04)
