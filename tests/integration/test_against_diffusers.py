"""The comparison with diffusers' own script: both get the same images and captions, and ours trains as users do."""

import json
import sys
import zipfile

import pytest
from PIL import Image

from benchmarks import against_diffusers
from benchmarks.recipes.peers import IMAGE_ATTENTION
from examples.demo import MODEL
from lora_utils.model.adapter_sizes import adapted_layers
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement


def test_both_sides_get_the_same_images_and_captions(tmp_path):
    against_diffusers.write_images(tmp_path, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    with zipfile.ZipFile(tmp_path / "dataset.zip") as packed:
        captions = {name: packed.read(name).decode() for name in packed.namelist() if name.endswith(".txt")}
        for line in lines:
            packed_name = next(name for name in packed.namelist() if name.endswith(line["file_name"]))
            assert (tmp_path / "images" / line["file_name"]).read_bytes() == packed.read(packed_name)
            assert captions[packed_name.replace(".png", ".txt")] == line["text"]
    assert len(lines) == len(captions) == 15
    assert Image.open(tmp_path / "images" / lines[0]["file_name"]).size == (64, 64)


def test_the_same_layers_are_adapted():
    first, *_ = adapted_layers(IMAGE_ATTENTION, 6)
    assert {layer.split("attn.")[-1] for layer in first} == set(against_diffusers.LAYERS.split(","))


def test_a_command_that_fails_says_what_it_wrote(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 3:\nwhy"):
        against_diffusers.run_timed([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path / "log.txt")


@pytest.mark.slow
def test_our_side_trains_in_a_process_of_its_own_and_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(MODEL))
    against_diffusers.write_images(tmp_path, seed=0)
    inputs = {"dataset": str(tmp_path / "dataset.zip"), "steps": 2, "resolution": "64"}
    command = [sys.executable, "-c", against_diffusers.CHILD, json.dumps(inputs), str(tmp_path / "weights.zip")]
    seconds, memory_gb = against_diffusers.run_timed(command, tmp_path / "log.txt")
    assert seconds > 1.0
    assert 0.2 < memory_gb < 24
    components = load_components(MODEL, default_placement())
    found = against_diffusers.measure(components, tmp_path / "weights.zip")
    assert found["fidelity"] == 0.0, "after two steps"
    assert found["others"] >= 0.9
