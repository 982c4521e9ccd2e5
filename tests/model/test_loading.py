"""Loading: what is streamed is what the libraries load, nothing more is read, and a folder with gaps is named."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from lora_utils.errors import UserError
from lora_utils.model import loading
from lora_utils.model.device import Placement, default_placement
from lora_utils.model.loading import check_complete, fill_parameters, read_ahead, stored_weights, stream_tensors
from lora_utils.model.text_encoder import load_text_encoder
from lora_utils.model.transformer import Storage, load_transformer

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


@pytest.mark.parametrize("option", ["use_additional_t_cond", "use_layer3d_rope"])
def test_a_layered_model_is_refused_by_name(option, random_model, tmp_path):
    shutil.copytree(random_model / "transformer", tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), option: True}))
    with pytest.raises(UserError, match=f"isn't a Qwen-Image that this package knows: its transformer has {option}"):
        load_transformer(tmp_path, PLACE)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_each_file_is_read_once_from_its_beginning_to_its_end(sharded, monkeypatch):
    """A disk that seeks back and forth loads slowly; the modulations' table takes its weights from the same pass."""
    read = []
    real = loading.safe_open

    class Recorded:
        def __init__(self, file, **given):
            self.file, self.opened = Path(file).name, real(file, **given)

        def __enter__(self):
            self.shard = self.opened.__enter__()
            return self

        def __exit__(self, *given):
            return self.opened.__exit__(*given)

        def __getattr__(self, name):
            return getattr(self.shard, name)

        def get_tensor(self, name):
            read.append((self.file, list(self.shard.offset_keys()).index(name), name))
            return self.shard.get_tensor(name)

    monkeypatch.setattr(loading, "safe_open", Recorded)
    times = torch.tensor([0.5])
    load_transformer(sharded, Placement(torch.device("cpu"), torch.bfloat16), Storage(timesteps=times))
    assert len({name for _, _, name in read}) == len(read), "no weight is read twice"
    in_blocks = [(file, place) for file, place, name in read if name.startswith("transformer_blocks.")]
    outside = [(file, place) for file, place, name in read if not name.startswith("transformer_blocks.")]
    assert in_blocks == sorted(in_blocks)
    assert outside == sorted(outside)


def test_a_table_needs_all_modulations(sharded):
    file = sharded / "transformer" / "part-0.safetensors"
    tensors = load_file(file)
    gone = next(name for name in sorted(tensors) if "img_mod" in name or "txt_mod" in name)
    place, storage = Placement(torch.device("cpu"), torch.bfloat16), Storage(timesteps=torch.tensor([0.5]))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file)
    with pytest.raises(UserError, match="the transformer's files lack 1 modulations"):
        load_transformer(sharded, place, storage)
    save_file({**tensors, gone: torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match=rf"{gone} \(3, 3\) doesn't fit"):
        load_transformer(sharded, place, storage)


def test_a_part_says_how_much_it_stores_and_in_which_dtype(random_model, tiny_model):
    stored = stored_weights(random_model / "transformer")
    transformer = load_transformer(random_model, PLACE)
    assert stored.count == sum(parameter.numel() for parameter in transformer.parameters())
    assert stored.dtype == torch.float32
    assert stored_weights(tiny_model / "transformer").dtype == torch.float16


def test_a_line_every_ten_seconds_tells_share_speed_and_what_is_left(sharded, monkeypatch, caplog):
    caplog.set_level("INFO", "lora_utils")
    clock = iter(range(0, 10_000, 4))  # four seconds at each look
    monkeypatch.setattr(loading.time, "monotonic", lambda: float(next(clock)))
    names = [name for name, _ in stream_tensors(sharded / "transformer", *(PLACE.device, PLACE.dtype), str)]
    lines = [record.message for record in caplog.records if "loading the transformer" in record.message]
    assert len(lines) == len(names) // 3, "the third look comes after ten seconds"
    assert "% of 0.0 GB, " in lines[0]
    assert " GB/s, ETA " in lines[0]


def test_reading_ahead_keeps_the_order_and_holds_little():
    taken, most = [], []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    for number in read_ahead(items(), 2):
        most.append(len(taken) - number - 1)
    assert taken == list(range(50))
    assert max(most) <= 4, "two wait, and one is at each end"


def test_an_error_while_reading_ahead_is_raised_where_the_tensors_are_used():
    def items():
        yield 1
        raise OSError("the disk is gone")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_a_reader_whose_consumer_is_gone_stops():
    before = threading.active_count()

    def items():
        while True:
            yield torch.zeros(1)

    ahead = read_ahead(items())
    next(ahead)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
