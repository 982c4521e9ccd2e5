"""A file's header: what model managers read of it, the same bytes each time, and no path of the machine."""

import base64
import json
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_utils.config import TrainConfig
from lora_utils.convert import main
from lora_utils.lora.formats import LoraFile, read_lora_file, write_lora_file
from lora_utils.lora.metadata import (
    MOST_THUMBNAIL_BYTES,
    Described,
    count_tags,
    describe_training,
    sort_header,
    thumbnail_uri,
)
from tests.helpers import SHORT_RUN, lora_of
from tests.lora.test_ranks import random_lora

DESCRIBED = Described("/mnt/models/my-qwen/", ["<zwx>, hat", "<zwx>, snow"], 2, 30, 0.5, "my fox")


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_header_says_what_managers_show(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    config = TrainConfig(train_placeholder_token=True, trigger_word="fox", rank=8, resolution="512,768", seed=1)
    found = describe_training(config, DESCRIBED)
    assert found["format"] == "pt"
    assert found["modelspec.architecture"] == "Qwen-Image/lora"
    assert found["modelspec.title"] == "my fox"
    assert found["modelspec.trigger_phrase"] == "<zwx>, fox"
    assert found["modelspec.resolution"] == "768x768"
    assert found["modelspec.date"] == "2023-11-14"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("8", "32")
    assert (found["ss_num_train_images"], found["ss_steps"]) == ("2", "30")
    assert found["ss_sd_model_name"] == "my-qwen", "no path of the machine"
    assert json.loads(found["ss_tag_frequency"]) == {"dataset": {"<zwx>": 2, "hat": 1, "snow": 1}}
    assert all(isinstance(value, str) for value in found.values())
    assert describe_training(replace(config, lora_alpha=2.5), DESCRIBED)["ss_network_alpha"] == "2.5"


def test_tags_are_counted_once_a_caption():
    assert count_tags(["a, b, a", "b", ""]) == {"b": 2, "a": 1}


@pytest.mark.parametrize("size", [(64, 64), (1664, 928), (3000, 40)])
def test_a_thumbnail_fits_into_64_kilobytes(size):
    noise = Image.effect_noise(size, 100).convert("RGB")
    uri = thumbnail_uri(noise)
    assert len(uri) <= MOST_THUMBNAIL_BYTES
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(BytesIO(base64.b64decode(data))) as image:
        assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.35)


def test_a_file_of_many_entries_is_the_same_each_time_and_any_reader_reads_it(tmp_path):
    entries = {f"ss_{name}": f'{name} ü "quoted" \\ 狐\n' for name in map(str, range(40))}
    lora = replace(random_lora(), metadata={**entries, "format": "pt", "elsewhere": "not kept"})
    for name in "ab":
        write_lora_file(tmp_path / name, lora)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {name: value for name, value in header_of(tmp_path / "a").items() if name.startswith("ss_")} == entries
    assert "elsewhere" not in header_of(tmp_path / "a")
    assert len(read_lora_file(tmp_path / "a").layers) == 2
    tensors = {"x": torch.arange(5.0), "y": torch.ones(3, 3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "c", entries)
    sort_header(tmp_path / "c")
    read = load_file(tmp_path / "c")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_trainings_file_has_its_header_and_a_converted_one_keeps_it(train_run, tmp_path, capsys):
    weights, _ = train_run(sample_prompts="a red circle", sample_steps=1)
    (tmp_path / "l.safetensors").write_bytes(lora_of(weights)[0])
    found = header_of(tmp_path / "l.safetensors")
    assert found["modelspec.title"] == "<zwx>"
    assert found["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert found["ss_steps"] == "8"
    assert "lora_adapter_metadata" in found, "diffusers' own"
    for layout in ("comfyui", "kohya"):
        target = tmp_path / f"{layout}.safetensors"
        assert main([str(weights), str(target), "--to", layout]) == 0
        assert header_of(target) == {name: value for name, value in found.items() if name != "lora_adapter_metadata"}


def test_no_path_of_the_machine_is_in_any_file_of_a_run(train_run, random_model, tmp_path):
    weights, folder = train_run(config=SHORT_RUN, sample_prompts="a red circle", sample_steps=1, save_every=4)
    lora, meta = lora_of(weights)
    assert meta["base_model"] == random_model.name
    texts = [lora, json.dumps(meta).encode()]
    texts += [path.read_bytes() for path in folder.glob("*") if path.is_file() and path.suffix != ".zip"]
    for path in (tmp_path, random_model, folder):
        assert not any(str(path).encode() in text for text in texts), path


def test_a_bare_lora_has_no_header(tmp_path):
    write_lora_file(tmp_path / "l", LoraFile(random_lora().layers), "comfyui")
    assert not header_of(tmp_path / "l")
