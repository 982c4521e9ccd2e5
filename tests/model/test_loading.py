"""Loading: what is streamed is what the libraries load, nothing more is read, and a folder with gaps is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from lora_utils.errors import UserError
from lora_utils.model.device import Placement, default_placement
from lora_utils.model.loading import check_complete, fill_parameters
from lora_utils.model.text_encoder import load_text_encoder
from lora_utils.model.transformer import load_transformer

PLACE = default_placement()


def assert_same_state(ours, theirs):
    mine, expected = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(expected)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    pairs = zip(ours.buffers(), theirs.buffers(), strict=True)
    assert all(torch.equal(one, other) and not one.is_meta for one, other in pairs)


def test_the_transformer_is_what_diffusers_loads(random_model):
    theirs = QwenImageTransformer2DModel.from_pretrained(random_model / "transformer")
    ours = load_transformer(random_model, PLACE)
    assert_same_state(ours, theirs)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_the_text_encoder_is_the_language_model_that_transformers_loads(random_model):
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(random_model / "text_encoder").model.language_model
    ours = load_text_encoder(random_model, PLACE)
    assert_same_state(ours, theirs)
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."], ids=["old names", "new names"])
def test_vision_tower_and_head_are_not_read(prefix, random_model, tmp_path):
    """They are spoiled in the file: whoever reads them would fail."""
    shutil.copytree(random_model / "text_encoder", tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    language = {k: v for k, v in load_file(file).items() if "visual." not in k and k != "lm_head.weight"}
    renamed = {prefix + k.removeprefix("model.").removeprefix("language_model."): v for k, v in language.items()}
    save_file({**renamed, "visual.blocks.0.x": torch.ones(1), "lm_head.weight": torch.ones(1)}, file)
    assert_same_state(load_text_encoder(tmp_path, PLACE), load_text_encoder(random_model, PLACE))


@pytest.fixture
def sharded(random_model, tmp_path):
    """The transformer in two files with an index, as the real one is stored in nine."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    shutil.copy(random_model / "transformer" / "config.json", folder)
    tensors = load_file(random_model / "transformer" / "diffusion_pytorch_model.safetensors")
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name, file in weight_map.items() if file == part}, folder / part)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_shards_load_as_one(sharded, random_model):
    assert_same_state(load_transformer(sharded, PLACE), load_transformer(random_model, PLACE))


def test_weights_arrive_in_the_compute_dtype(random_model):
    bf16 = Placement(torch.device("cpu"), torch.bfloat16)
    for part in (load_transformer(random_model, bf16), load_text_encoder(random_model, bf16)):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}


def test_a_tensor_has_its_place_before_the_next_is_read():
    with init_empty_weights():
        module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    def tensors():
        for name, empty in list(module.named_parameters()):
            yield name, torch.zeros(empty.shape)
            assert not module.get_parameter(name).is_meta, f"{name} was still on its way"

    fill_parameters(module, tensors(), Path("folder"))
    check_complete(module, Path("folder"))


def test_an_incomplete_folder_is_named(sharded, random_model, tmp_path):
    folder = sharded / "transformer"
    file = folder / "part-0.safetensors"
    tensors = load_file(file)
    first, second = sorted(tensors)[:2]
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)
    with pytest.raises(UserError, match=f"lacks 1 weights, the first is {first}"):
        load_transformer(sharded, PLACE)
    save_file({**tensors, second: torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match=rf"{second} \(3, 3\) doesn't fit"):
        load_transformer(sharded, PLACE)
    save_file({**tensors, "controlnet.weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="no such weight there"):
        load_transformer(sharded, PLACE)
    file.unlink()
    with pytest.raises(UserError, match=r"lacks part-0\.safetensors, one of its 2 weight files"):
        load_transformer(sharded, PLACE)
    (tmp_path / "empty" / "text_encoder").mkdir(parents=True)
    shutil.copy(random_model / "text_encoder" / "config.json", tmp_path / "empty" / "text_encoder")
    with pytest.raises(UserError, match="holds no weights"):
        load_text_encoder(tmp_path / "empty", PLACE)


@pytest.mark.parametrize("option", ["zero_cond_t", "use_layer3d_rope"])
def test_an_editing_or_layered_model_is_refused_by_name(option, random_model, tmp_path):
    shutil.copytree(random_model / "transformer", tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), option: True}))
    with pytest.raises(UserError, match=f"isn't a text-to-image Qwen-Image: its transformer has {option}"):
        load_transformer(tmp_path, PLACE)
