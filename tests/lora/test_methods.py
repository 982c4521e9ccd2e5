"""Adapters of every method in common use: applied as W' says, computed by hand in fp32 from each method's paper.

The second judges are the modules of peft and of LyCORIS themselves.
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_utils.errors import UserError
from lora_utils.lora.formats import LAYOUTS, LoraFile, read_lora_file, write_lora_file, write_peft_folder
from lora_utils.lora.weights import load_weights, read_weights
from lora_utils.model.components import load_components
from lora_utils.model.device import Placement
from tests.lora import judge
from tests.lora.test_formats import comfyui_keys

MOST = 2e-4  # of an adapter's effect that its velocity may be off by
LAYERS = [f"transformer_blocks.{i}.{n}" for i in range(2) for n in ("attn.to_q", "attn.to_out.0", "img_mlp.net.2")]
LAYERS.append("transformer_blocks.1.txt_mod.1")  # one that the modulation table follows from
RANK, ALPHA = 4, 6.0


@pytest.fixture(autouse=True)
def _base_model(random_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))


@pytest.fixture(scope="module")
def base(random_model):
    return judge.truth(judge.stock(random_model))


# --- by hand --------------------------------------------------------------------------------------------------------

Parts = dict[str, Tensor]
Method = Callable[[Tensor, torch.Generator], tuple[Parts, Tensor]]  # of W: a file's parts, and W' - W


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator) * 0.2


def lora(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
    b, a = normal(generator, len(weight), RANK), normal(generator, RANK, weight.shape[1])
    parts = {"lora_up.weight": b, "lora_down.weight": a, "alpha": torch.tensor(ALPHA)}
    return parts, b @ a * ALPHA / RANK


def kron(a: Tensor, b: Tensor) -> Tensor:
    """By its definition: block (i, j) is a[i, j] times b."""
    return torch.cat([torch.cat([entry * b for entry in row], dim=1) for row in a])


def lokr_whole(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
    """As ai-toolkit saves what it calls full rank, with the alpha that it writes there."""
    w1, w2 = normal(generator, 8, 4), normal(generator, len(weight) // 8, weight.shape[1] // 4)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1e10)}, kron(w1, w2)


def lokr_half(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
    w1 = normal(generator, 8, 8)
    a, b = normal(generator, len(weight) // 8, RANK), normal(generator, RANK, weight.shape[1] // 8)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return parts, kron(w1, a @ b) * ALPHA / RANK


def lokr_both(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
    c, d = normal(generator, 16, RANK), normal(generator, RANK, 8)
    a, b = normal(generator, len(weight) // 16, RANK), normal(generator, RANK, weight.shape[1] // 8)
    parts = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return parts, kron(c @ d, a @ b) * ALPHA / RANK


def loha(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
    pairs = [(normal(generator, len(weight), RANK), normal(generator, RANK, weight.shape[1])) for _ in range(2)]
    (a1, b1), (a2, b2) = pairs
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(ALPHA)}
    return parts, (a1 @ b1) * (a2 @ b2) * ALPHA / RANK


def difference(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
    delta = normal(generator, *weight.shape) * 0.3
    return {"diff": delta}, delta


def dora(name: str, dimension: int, of: Method = lora) -> Method:
    """W' = m (W + BA) / ||W + BA||, with a length for each output (dimension 1) or each input (0)."""

    def method(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
        parts, delta = of(weight, generator)
        changed = weight + delta
        length = changed.pow(2).sum(dimension, keepdim=True).sqrt()
        magnitude = weight.pow(2).sum(dimension, keepdim=True).sqrt() * (
            1 + 0.3 * torch.rand(length.shape, generator=generator)
        )
        kept = magnitude.squeeze(1) if name != "dora_scale" else magnitude
        return {**parts, name: kept}, magnitude * changed / length - weight

    return method


METHODS: dict[str, Method] = {
    "LoRA": lora,
    "LoKr, whole": lokr_whole,
    "LoKr, second as a product": lokr_half,
    "LoKr, both as products": lokr_both,
    "LoHa": loha,
    "difference": difference,
    "DoRA of LyCORIS, by output": dora("dora_scale", 1),
    "DoRA of LyCORIS, by input": dora("dora_scale", 0),
    "DoRA of peft": dora("lora_magnitude_vector", 1),
    "DoRA of ai-toolkit": dora("magnitude", 1),
    "LoKr with DoRA": dora("dora_scale", 1, lokr_half),
    "LoHa with DoRA": dora("dora_scale", 0, loha),
}
KEYS = {  # of a layer, by tool
    "LyCORIS": lambda layer: f"lycoris_{layer.replace('.', '_')}",
    "musubi, kohya": lambda layer: f"lora_unet_{layer.replace('.', '_')}",
    "OneTrainer": lambda layer: f"lora_transformer_{layer.replace('.', '_')}",
    "ai-toolkit": lambda layer: f"diffusion_model.{layer}",
    "diffusers": lambda layer: f"transformer.{layer}",
    "peft": lambda layer: f"base_model.model.{layer}",
}


def made(method: Method, weights: dict[str, Tensor], key=KEYS["LyCORIS"], seed=0) -> tuple[Parts, dict[str, Tensor]]:
    """-> a file's tensors, and W' - W by layer"""
    generator = torch.Generator().manual_seed(seed)
    found = {layer: method(weights[layer], generator) for layer in LAYERS}
    tensors = {f"{key(layer)}.{part}": value for layer, (parts, _) in found.items() for part, value in parts.items()}
    return tensors, {layer: delta for layer, (_, delta) in found.items()}


@pytest.fixture(scope="module")
def weights(random_model) -> dict[str, Tensor]:
    stock = judge.stock(random_model)
    return {layer: stock.get_submodule(layer).weight for layer in LAYERS}


@pytest.mark.parametrize("tool", KEYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_applied_as_its_paper_says(method, tool, weights, components, random_model, base, tmp_path):
    tensors, deltas = made(METHODS[method], weights, KEYS[tool])
    save_file(tensors, tmp_path / "l.safetensors")
    before = judge.ours(components)
    loaded = load_weights(tmp_path / "l.safetensors", components).lora
    assert judge.error(judge.ours(components, loaded), judge.merged(random_model, deltas), base) <= MOST
    assert torch.equal(judge.ours(components), before), "the base is the same bit for bit"


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_goes_from_w_to_w_dash_in_a_straight_line(method, weights, components, random_model, base, tmp_path):
    tensors, deltas = made(METHODS[method], weights)
    save_file(tensors, tmp_path / "l.safetensors")
    loaded = load_weights(tmp_path / "l.safetensors", components).lora
    want = judge.merged(random_model, {layer: -0.4 * delta for layer, delta in deltas.items()})
    assert judge.error(judge.ours(components, loaded, scale=-0.4), want, base) <= MOST


@pytest.mark.parametrize("quantization", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("method", ["LoKr, second as a product", "LoHa", "difference", *list(METHODS)[6:8]])
def test_a_method_changes_the_weights_that_a_quantised_base_stores(method, quantization, random_model, tmp_path):
    stored = load_components(random_model, Placement(torch.device("cpu"), torch.float32), quantization)
    kept = {layer: judge.stored_weight(stored, random_model, layer) for layer in LAYERS}
    tensors, deltas = made(METHODS[method], kept)
    save_file(tensors, tmp_path / "l.safetensors")
    loaded = load_weights(tmp_path / "l.safetensors", stored).lora
    base, want = (judge.merged(random_model, given, stored) for given in ({}, deltas))
    before = judge.ours(stored)
    assert judge.error(judge.ours(stored, loaded), want, base) <= MOST
    assert torch.equal(judge.ours(stored), before)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_base_in_bf16_a_method_is_off_by_that_dtypes_rounding_alone(method, weights, random_model, base, tmp_path):
    """What rounding alone does is what the stock transformer does with the changed weights in bf16."""
    bf16 = load_components(random_model, Placement(torch.device("cpu"), torch.bfloat16))
    tensors, deltas = made(METHODS[method], weights)
    save_file(tensors, tmp_path / "l.safetensors")
    before = judge.ours(bf16)
    loaded = load_weights(tmp_path / "l.safetensors", bf16).lora
    want, rounded = (judge.merged(random_model, deltas, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert judge.error(judge.ours(bf16, loaded), want, base) <= 1.25 * judge.error(rounded, want, base)
    assert torch.equal(judge.ours(bf16), before)


COMFYUI_ENDINGS = {  # comfy/weight_adapter: lora.py, lokr.py, loha.py; comfy/lora.py for the others
    *(".lora_A.weight", ".lora_B.weight", ".lora_up.weight", ".lora_down.weight", ".alpha", ".dora_scale", ".diff"),
    *(f".lokr_w{side}{half}" for side in "12" for half in ("", "_a", "_b")),
    *(f".hada_w{side}_{half}" for side in "12" for half in "ab"),
}


@pytest.mark.parametrize("layout", ["comfyui", "lycoris"])
@pytest.mark.parametrize("method", METHODS)
def test_comfyui_maps_every_key_of_a_method(method, layout, weights, tmp_path):
    tensors, _ = made(METHODS[method], weights)
    save_file(tensors, tmp_path / "l.safetensors")
    write_lora_file(tmp_path / "c.safetensors", read_lora_file(tmp_path / "l.safetensors"), layout)
    known = set().union(*map(comfyui_keys, LAYERS))
    for key in load_file(tmp_path / "c.safetensors"):
        ending = next(each for each in COMFYUI_ENDINGS if key.endswith(each) and key.removesuffix(each) in known)
        assert ending


def test_several_methods_at_once_add_up_on_the_same_layers(weights, components, random_model, base, tmp_path):
    loaded, sums = [], dict.fromkeys(LAYERS, torch.zeros(()))
    scales = {name: 0.3 + 0.1 * index for index, name in enumerate(METHODS)}
    for seed, (name, method) in enumerate(METHODS.items()):
        tensors, deltas = made(method, weights, seed=seed)
        save_file(tensors, tmp_path / f"{seed}.safetensors")
        loaded.append((load_weights(tmp_path / f"{seed}.safetensors", components).lora, scales[name]))
        sums = {layer: sums[layer] + scales[name] * deltas[layer] for layer in LAYERS}
    before = judge.ours(components)
    got = judge.ours(components, *loaded)
    assert judge.error(got, judge.merged(random_model, sums), base) <= MOST
    assert torch.equal(judge.ours(components), before)
    assert not any(module._forward_hooks for module in components.transformer.modules())


def test_a_bias_is_changed_alone_and_beside_any_method(weights, components, random_model, base, tmp_path):
    generator = torch.Generator().manual_seed(1)
    biases = {layer: normal(generator, len(weight)) for layer, weight in weights.items()}
    tensors, deltas = made(METHODS["DoRA of LyCORIS, by output"], weights)
    del deltas[LAYERS[-1]]
    tensors = {key: value for key, value in tensors.items() if not key.startswith(KEYS["LyCORIS"](LAYERS[-1]))}
    tensors |= {f"{KEYS['LyCORIS'](layer)}.diff_b": bias for layer, bias in biases.items()}
    save_file(tensors, tmp_path / "l.safetensors")
    loaded = load_weights(tmp_path / "l.safetensors", components).lora
    half = {layer: 0.5 * delta for layer, delta in deltas.items()}
    want = judge.merged(random_model, half, biases={layer: 0.5 * bias for layer, bias in biases.items()})
    assert judge.error(judge.ours(components, loaded, scale=0.5), want, base) <= MOST


# --- the tools' own modules -----------------------------------------------------------------------------------------

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PEFTS: dict[str, Any] = {
    "LoRA with a bias": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, lora_bias=True),
    "DoRA": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, use_dora=True),
    "DoRA, rank stabilised": LoraConfig(
        r=4, lora_alpha=6, target_modules=ATTENTION, use_dora=True, use_rslora=True, alpha_pattern={"to_q": 3}
    ),
    "LoHa": LoHaConfig(r=4, alpha=6, target_modules=ATTENTION),
    "LoKr": LoKrConfig(r=4, alpha=6, target_modules=ATTENTION),
    "LoKr, both as products": LoKrConfig(r=2, alpha=6, target_modules=ATTENTION, decompose_both=True),
    "LoKr, whole": LoKrConfig(r=64, alpha=6, target_modules=ATTENTION, rank_pattern={"to_v": 48}),
}


@pytest.mark.parametrize("case", PEFTS)
def test_what_peft_saved_is_what_peft_computes(case, random_model, components, base, tmp_path):
    wrapped = get_peft_model(judge.stock(random_model), PEFTS[case])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.copy_(normal(generator, *parameter.shape))
    wrapped.save_pretrained(str(tmp_path / "saved"))
    loaded = load_weights(tmp_path / "saved", components).lora
    want = judge.truth(wrapped.eval().base_model.model)
    assert judge.error(judge.ours(components, loaded), want, base) <= MOST


LYCORIS: dict[str, dict[str, Any]] = {
    "LoCon": {"algo": "locon"},
    "LoCon with DoRA": {"algo": "locon", "dora_wd": True, "wd_on_output": True},
    "LoHa": {"algo": "loha"},
    "LoHa with DoRA": {"algo": "loha", "dora_wd": True, "wd_on_output": True},
    "LoKr": {"algo": "lokr", "factor": 8},
    "LoKr, both as products": {"algo": "lokr", "factor": 16, "decompose_both": True},
    "LoKr, whole": {"algo": "lokr", "full_matrix": True},
    "LoKr, rank stabilised": {"algo": "lokr", "factor": 8, "rs_lora": True},
    "full": {"algo": "full"},
}


@pytest.mark.parametrize("case", LYCORIS)
def test_what_lycoris_saved_is_what_lycoris_computes(case, random_model, components, base, tmp_path):
    stock = judge.stock(random_model)
    LycorisNetwork.apply_preset({"target_name": ["transformer_blocks.*.attn.to_*"], "use_fnmatch": True})
    network = create_lycoris(stock, 1.0, linear_dim=4, linear_alpha=6, **LYCORIS[case])
    network.apply_to()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif case == "full":
                parameter.add_(normal(generator, *parameter.shape))
            else:
                parameter.copy_(normal(generator, *parameter.shape))
    network.save_weights(str(tmp_path / "l.safetensors"), torch.float32, None)
    network.eval()
    want = judge.truth(stock)
    loaded = load_weights(tmp_path / "l.safetensors", components).lora
    assert judge.error(judge.ours(components, loaded), want, base) <= MOST


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_written_as_it_was_read_or_refused(method, layout, weights, components, tmp_path):
    tensors, _ = made(METHODS[method], weights)
    save_file(tensors, tmp_path / "l.safetensors")
    read = read_lora_file(tmp_path / "l.safetensors")
    target = tmp_path / "written.safetensors"
    plain = method == "LoRA" or ("DoRA of" in method and "by input" not in method)
    takes = LAYOUTS[layout].takes_lycoris and not ("by input" in method and layout == "diffusers")
    takes = takes and not (method == "LoHa with DoRA" and layout == "diffusers")
    if not takes and not (plain and (method == "LoRA" or LAYOUTS[layout].magnitude)):
        with pytest.raises(UserError, match="has no place for"):
            write_lora_file(target, read, layout, torch.float32)
        return
    write_lora_file(target, read, layout, torch.float32)
    want, got = (
        judge.ours(components, load_weights(path, components).lora) for path in (tmp_path / "l.safetensors", target)
    )
    assert judge.error(got, want, judge.ours(components)) <= 1e-5


def test_pefts_one_config_takes_no_file_of_two_kinds(weights, tmp_path):
    read = {}
    for method in ("LoRA", "DoRA of peft"):
        tensors, _ = made(METHODS[method], weights)
        save_file(tensors, tmp_path / "l.safetensors")
        read[method] = read_lora_file(tmp_path / "l.safetensors").layers
    both = LoraFile({**read["LoRA"], LAYERS[0]: read["DoRA of peft"][LAYERS[0]]})
    with pytest.raises(UserError, match="LoRAs alone or DoRAs alone"):
        write_peft_folder(tmp_path / "both", both)
    assert not (tmp_path / "both").exists()
    for layers in read.values():
        write_peft_folder(tmp_path / "one", LoraFile(layers))
        assert {type(each) for each in read_weights(tmp_path / "one")[0].layers.values()} == set(
            map(type, layers.values())
        )
        shutil.rmtree(tmp_path / "one")
