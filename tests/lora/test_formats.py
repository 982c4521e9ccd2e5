"""LoRA files: every layout reads as the same LoRA, ours is what diffusers loads, and nothing is dropped in silence."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file, save_file
from torch import nn

from lora_utils import constants
from lora_utils.convert import main
from lora_utils.errors import UserError
from lora_utils.lora.adapter import AdapterSettings, attach_adapter, trained_layers
from lora_utils.lora.formats import HEADER_KEY, LAYOUTS, LoraFile, read_lora_file, write_lora_file
from lora_utils.lora.hooks import applied_loras, check_lora, move_lora
from lora_utils.lora.updates import LowRank
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import TextEmbeddings
from lora_utils.model.transformer import load_transformer, predict_velocity

RANK = 3
NAMES = [f"transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in constants.LORA_TARGETS["attention_mlp"]]


@pytest.fixture(scope="module")
def lora(components) -> LoraFile:
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in NAMES:
        linear = components.transformer.get_submodule(name)
        down = torch.randn(RANK, linear.in_features, generator=generator).bfloat16().float()
        up = torch.randn(linear.out_features, RANK, generator=generator).mul(0.3).bfloat16().float()
        layers[name] = LowRank(down, up, alpha=RANK)
    return LoraFile(layers)


def layout(lora, key, down, up, alpha=None, flat=False):
    """The tensors of a LoRA under another tool's names."""
    tensors = {}
    for name, layer in lora.layers.items():
        base = key.format(name.replace(".", "_") if flat else name)
        tensors[base + down], tensors[base + up] = layer.down.clone(), layer.up.clone()
        if alpha is not None:
            tensors[base + ".alpha"] = torch.tensor(alpha)
    return tensors


FOREIGN_LAYOUTS = {
    "diffusers": ("transformer.{}", ".lora_A.weight", ".lora_B.weight", False),
    "ai-toolkit, fal, ComfyUI": ("diffusion_model.{}", ".lora_A.weight", ".lora_B.weight", False),
    "ComfyUI, old": ("diffusion_model.{}", ".lora_down.weight", ".lora_up.weight", False),
    "bare": ("{}", ".lora_A.weight", ".lora_B.weight", False),
    "bare, old": ("{}", ".lora_down.weight", ".lora_up.weight", False),
    "DiffSynth, peft in memory": ("{}", ".lora_A.default.weight", ".lora_B.default.weight", False),
    "PeftModel.save_pretrained": ("base_model.model.{}", ".lora_A.weight", ".lora_B.weight", False),
    "kohya, musubi": ("lora_unet_{}", ".lora_down.weight", ".lora_up.weight", True),
    "LyCORIS": ("lycoris_{}", ".lora_down.weight", ".lora_up.weight", True),
    "OneTrainer": ("lora_transformer_{}", ".lora_down.weight", ".lora_up.weight", True),
}


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("name", FOREIGN_LAYOUTS)
def test_every_layout_reads_as_the_same_lora(name, alpha, lora, tmp_path):
    key, down, up, flat = FOREIGN_LAYOUTS[name]
    save_file(layout(lora, key, down, up, alpha, flat), tmp_path / "lora.safetensors")
    read = read_lora_file(tmp_path / "lora.safetensors")
    assert set(read.layers) == set(NAMES)
    for module, layer in read.layers.items():
        assert torch.equal(layer.down, lora.layers[module].down)
        assert torch.equal(layer.up, lora.layers[module].up)
        assert layer.alpha == (alpha or RANK)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_written_reads_as_the_same_lora(name, lora, tmp_path):
    """Alphas that aren't the rank, and unequal ranks, too: the update of each layer is what counts."""
    layers = {**lora.layers, NAMES[0]: replace(lora.layers[NAMES[0]], alpha=1.5)}
    layers[NAMES[1]] = LowRank(torch.randn(2, layers[NAMES[1]].down.shape[1]), torch.randn(128, 2), 2.0)
    given = LoraFile(layers, {"<zwx>": torch.randn(1, 128)})
    write_lora_file(tmp_path / "l.safetensors", given, name, torch.float32)
    read = read_lora_file(tmp_path / "l.safetensors")
    assert set(read.layers) == set(layers)
    for module, layer in read.layers.items():
        wanted = layers[module]
        update = layer.up @ layer.down * layer.alpha / layer.rank
        torch.testing.assert_close(update, wanted.up @ wanted.down * wanted.alpha / wanted.rank)
    if LAYOUTS[name].takes_embeddings:
        assert torch.equal(read.embeddings["<zwx>"], given.embeddings["<zwx>"])
    else:
        assert not read.embeddings, "its readers refuse them: they go into a file of their own"


def test_the_command_converts_there_and_back(lora, tmp_path, capsys):
    write_lora_file(tmp_path / "a.safetensors", lora)
    steps = [("a", "kohya", "b"), ("b", "comfyui", "c"), ("c", "diffusers", "d")]
    for source, layout, target in steps:
        paths = [str(tmp_path / f"{name}.safetensors") for name in (source, target)]
        assert main([*paths, "--to", layout]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    assert "24 layers in the layout of kohya" in capsys.readouterr().out
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "d.safetensors")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), str(tmp_path / "e")]) == 1
    assert not (tmp_path / "e").exists()


def comfyui_keys(name: str) -> set[str]:
    """What ComfyUI's comfy/lora.py maps to a weight of its Qwen-Image, whose names are diffusers'.

    The first is its rule for every model, the others stand under `isinstance(model, comfy.model_base.QwenImage)`.
    """
    return {f"diffusion_model.{name}", name, f"transformer.{name}", f"lycoris_{name.replace('.', '_')}"}


@pytest.mark.parametrize("layout_name", ["diffusers", "comfyui", "lycoris"])
def test_comfyui_maps_every_key_of_ours(layout_name, lora, tmp_path):
    write_lora_file(tmp_path / "l.safetensors", lora, layout_name)
    known = set().union(*map(comfyui_keys, NAMES))
    endings = (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha")
    for key in load_file(tmp_path / "l.safetensors"):
        ending = next(ending for ending in endings if key.endswith(ending))
        assert key.removesuffix(ending) in known


def test_alphas_of_the_header_are_honoured(lora, tmp_path):
    header = {"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK, "transformer.alpha_pattern": {NAMES[0]: 1}}
    tensors = layout(lora, "transformer.{}", ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "l.safetensors", {HEADER_KEY: json.dumps(header)})
    layers = read_lora_file(tmp_path / "l.safetensors").layers
    assert layers[NAMES[0]].alpha == 1
    assert layers[NAMES[1]].alpha == 2 * RANK


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("transformer.transformer_blocks.0.attn.to_q.dora_scale", "has a magnitude of the shape"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "holds weights of LoKr and LoRA"),
        ("transformer_blocks.0.attn.to_q.diff_b", "has a bias of the shape"),
        ("transformer_blocks.0.attn.to_q.w_norm", "normalisation or replaced"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "made for another model"),
        ("some.weight", "belongs to no LoRA"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(key, message, lora, tmp_path):
    tensors = layout(lora, "transformer.{}", ".lora_A.weight", ".lora_B.weight")
    save_file({**tensors, key: torch.zeros(3, 3)}, tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora_file(tmp_path / "l.safetensors")


def test_half_a_pair_wrong_shapes_and_strangers_are_refused(lora, tmp_path):
    path = tmp_path / "l.safetensors"
    tensors = layout(lora, "transformer.{}", ".lora_A.weight", ".lora_B.weight")
    half = {key: value for key, value in tensors.items() if key != f"transformer.{NAMES[0]}.lora_B.weight"}
    save_file(half, path)
    with pytest.raises(UserError, match="lacks up"):
        read_lora_file(path)
    save_file({**tensors, f"transformer.{NAMES[0]}.lora_B.weight": torch.zeros(128, RANK + 1)}, path)
    with pytest.raises(UserError, match="has the shapes"):
        read_lora_file(path)
    path.write_bytes(b"GGUF not safetensors")
    with pytest.raises(UserError, match="no safetensors file"):
        read_lora_file(path)
    save_file({"bundle_emb.<zwx>.lora.qwen25_7b": torch.ones(1, 128)}, path)
    with pytest.raises(UserError, match="no LoRA layers"):
        read_lora_file(path)


def test_a_header_that_is_no_json_is_named(lora, tmp_path):
    tensors = layout(lora, "transformer.{}", ".lora_A.weight", ".lora_B.weight")
    for header in ("{", "[]"):
        save_file(tensors, tmp_path / "l.safetensors", {HEADER_KEY: header})
        with pytest.raises(UserError, match="isn't a JSON object"):
            read_lora_file(tmp_path / "l.safetensors")


def predict(components, text, latents):
    with torch.inference_mode():
        return predict_velocity(components.transformer, latents, torch.full((1,), 0.5), text, Size(64, 64))


@pytest.fixture(scope="module")
def inputs(components):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 7, 128, generator=generator)
    return TextEmbeddings(states, None), torch.randn(1, 16, 64, generator=generator)


def test_an_applied_lora_is_w_plus_scale_b_a_and_leaves_no_trace(lora, components, inputs):
    before = predict(components, *inputs)
    placed = move_lora(lora, components.transformer, components.placement)
    with applied_loras(components.transformer, [(placed, 0.7)]):
        applied = predict(components, *inputs)
    with applied_loras(components.transformer, [(placed, 0.0)]):
        assert torch.equal(predict(components, *inputs), before)
    assert torch.equal(predict(components, *inputs), before)
    assert (applied - before).abs().max() > 0.01
    weights = {name: components.transformer.get_submodule(name).weight for name in NAMES}
    original = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, layer in lora.layers.items():
                weights[name] += 0.7 * layer.up @ layer.down
        torch.testing.assert_close(applied, predict(components, *inputs), atol=2e-4, rtol=1e-3)
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(original[name])


def test_hooks_are_gone_after_an_exception(lora, components, inputs):
    before = predict(components, *inputs)
    placed = move_lora(lora, components.transformer, components.placement)
    with pytest.raises(KeyboardInterrupt), applied_loras(components.transformer, [(placed, 1.0)]):
        raise KeyboardInterrupt
    assert torch.equal(predict(components, *inputs), before)


def test_two_loras_add_up(lora, components, inputs):
    placed = move_lora(lora, components.transformer, components.placement)
    with applied_loras(components.transformer, [(placed, 0.3), (placed, 0.4)]):
        twice = predict(components, *inputs)
    with applied_loras(components.transformer, [(placed, 0.7)]):
        torch.testing.assert_close(twice, predict(components, *inputs), atol=1e-4, rtol=1e-3)


def test_stock_diffusers_loads_all_of_our_file(lora, components, inputs, random_model, tmp_path):
    row = torch.randn(1, 128)
    path = tmp_path / "lora.safetensors"
    write_lora_file(path, LoraFile(lora.layers, {"<zwx>": row}))
    tensors = load_file(path)
    assert tensors["bundle_emb.<zwx>.lora.qwen25_7b"].dtype == torch.float32
    assert {value.dtype for key, value in tensors.items() if "lora_A" in key} == {torch.bfloat16}
    assert not [key for key in tensors if key.endswith(".alpha")]

    stock = QwenImagePipeline.from_pretrained(random_model)
    stock.load_lora_weights(path)
    adapted = [name for name, module in stock.transformer.named_modules() if hasattr(module, "lora_A")]
    assert sorted(adapted) == sorted(NAMES)
    text, latents = inputs
    with torch.inference_mode():
        theirs = predict_velocity(stock.transformer, latents, torch.full((1,), 0.5), text, Size(64, 64))
    read = read_lora_file(path)
    assert torch.equal(read.embeddings["<zwx>"], row)
    with applied_loras(components.transformer, [(move_lora(read, components.transformer, components.placement), 1.0)]):
        torch.testing.assert_close(predict(components, *inputs), theirs, atol=1e-4, rtol=1e-3)


def test_a_lora_that_fits_only_in_part_is_refused_with_the_count(lora, components):
    stray = {**lora.layers, "transformer_blocks.59.attn.to_q": lora.layers[NAMES[0]]}
    with pytest.raises(UserError, match=r"24 of its 25 layers match .*, 1 don't exist here \(.*\.59\.attn\.to_q\)"):
        check_lora(LoraFile(stray), components.transformer)
    wide = {NAMES[0]: LowRank(torch.zeros(2, 3072), torch.zeros(3072, 2), 2.0)}
    with pytest.raises(UserError, match="takes and gives"):
        check_lora(LoraFile(wide), components.transformer)


def test_a_trainable_lora_covers_its_targets_and_starts_as_no_change(random_model, components, inputs):
    transformer = load_transformer(random_model, components.placement)
    before = predict_velocity(transformer, inputs[1], torch.full((1,), 0.5), inputs[0], Size(64, 64))
    parameters = attach_adapter(transformer, AdapterSettings("attention_mlp", 4), torch.Generator().manual_seed(0))
    assert len(parameters) == 2 * 12 * 2
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert {id(p) for p in transformer.parameters() if p.requires_grad} == {id(p) for p in parameters}
    after = predict_velocity(transformer, inputs[1], torch.full((1,), 0.5), inputs[0], Size(64, 64))
    assert torch.equal(before, after)
    lora = trained_layers(transformer)
    assert {(layer.rank, layer.alpha) for layer in lora.values()} == {(4, 4.0)}
    assert all(isinstance(components.transformer.get_submodule(name), nn.Linear) for name in lora)
