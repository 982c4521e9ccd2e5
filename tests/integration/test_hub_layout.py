"""The hub's layout at small widths: several files with an index, old key names and configs, Qwen's own vocabulary.

Everything is run on it, as it is at the true size: training, the token, prediction, auto-captioning; and the hub's
cache without a hub, complete and with each part missing.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from safetensors import safe_open

from benchmarks.true_size.hub_layout import SMALL, write_folder
from lora_utils import constants
from lora_utils.config import RunOptions, SampleFiles, SampleInputs, SampleRequest, TrainConfig
from lora_utils.dataset import autocaption
from lora_utils.dataset.scan import inspect
from lora_utils.errors import UserError
from lora_utils.io.download import download_model
from lora_utils.model.device import default_placement
from lora_utils.model.text_encoder import load_text_encoder, load_tokenizer, read_text_config
from lora_utils.model.variant import EDIT_PLUS, read_variant
from lora_utils.model.vision import load_processor
from lora_utils.sampling.predictor import ModelPredictor
from tests.editing.material import write_pairs
from tests.helpers import lora_of, train_archive

CONFIG = TrainConfig(steps=3, rank=4, learning_rate=1e-3, resolution="64", seed=0, train_placeholder_token=True)


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    write_folder(folder, SMALL)
    return folder


def test_the_files_are_named_and_indexed_as_the_hubs(hub_model):
    text = sorted(path.name for path in (hub_model / "text_encoder").glob("*.safetensors"))
    assert text[0] == f"model-00001-of-{len(text):05d}.safetensors"
    index = json.loads((hub_model / "text_encoder" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name.split(".")[0] for name in index} == {"model", "visual", "lm_head"}
    assert "model.embed_tokens.weight" in index
    assert len(list((hub_model / "transformer").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    assert not (hub_model / "tokenizer" / "tokenizer.json").exists()
    with safe_open(hub_model / "vae" / "diffusion_pytorch_model.safetensors", "pt") as vae:
        assert vae.get_slice("quant_conv.weight").get_dtype() == "BF16"


def test_stock_diffusers_loads_it(hub_model):
    stock = QwenImagePipeline.from_pretrained(hub_model)
    assert len(stock.tokenizer) == 151665
    ours = load_text_encoder(hub_model, default_placement())
    theirs = stock.text_encoder.model.language_model
    ids = torch.tensor([[151644, 8948, 198, 151645]])
    expected = theirs(input_ids=ids).last_hidden_state.float()
    assert torch.allclose(ours(input_ids=ids).last_hidden_state, expected, atol=0.05)  # theirs is bf16, as stored


@pytest.mark.parametrize("nested", [False, True], ids=["flat, as in 4.4x", "nested too"])
def test_the_rotary_settings_are_read_from_either_config(nested, tmp_path):
    write_folder(tmp_path / "model", replace(SMALL, nested_text_config=nested))
    config = read_text_config(tmp_path / "model")
    assert config.rope_parameters["mrope_section"] == list(SMALL.mrope)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, 152064)
    load_text_encoder(tmp_path / "model", default_placement())


def test_the_tokenizer_is_qwens_though_it_has_no_tokenizer_json(hub_model):
    tokenizer = load_tokenizer(hub_model)
    assert len(tokenizer) == 151665
    assert len(tokenizer(constants.TEMPLATE_PREFIX).input_ids) == constants.TEMPLATE_PREFIX_TOKENS


def test_it_trains_a_token_and_generates_with_it(hub_model, archive, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "lora_utils")
    monkeypatch.setenv("BASE_MODEL", str(hub_model))
    weights = train_archive(CONFIG, archive, tmp_path / "weights.zip", RunOptions())
    placeholder = lora_of(weights)[1]["placeholder"]
    assert placeholder["token_id"] == 151665
    assert placeholder["embedding_rows"] == 152064
    assert placeholder["moved"]
    predictor = ModelPredictor()
    try:
        request = SampleRequest("a photo of <zwx>", width=64, height=64, steps=2, seed=0)
        (path,) = predictor.predict(SampleInputs(SampleFiles(replicate_weights=str(weights)), request)).paths
        assert path.stat().st_size > 0
    finally:
        predictor.close()


def test_it_describes_images(hub_model, write_zip, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    tokenizer = load_tokenizer(hub_model)
    config = TrainConfig(resolution="64", seed=0, autocaption=True)
    found = inspect(folder, config, tokenizer)
    written = autocaption.write_captions(found, config, hub_model, tokenizer, default_placement())
    assert not written.uncaptioned
    assert all(caption.strip() for caption in written.captions)


def test_a_model_that_edits_trains_on_pairs_and_edits_an_image(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_folder(folder, replace(SMALL, edits=True))
    assert read_variant(folder) is EDIT_PLUS
    processor = load_processor(folder)
    assert (processor.size["longest_edge"], processor.patch_size, processor.merge_size) == (12845056, 14, 2)

    monkeypatch.setenv("BASE_MODEL", str(folder))
    pairs = write_pairs(tmp_path / "pairs.zip", count=2, caption="make it like <zwx>")
    weights = train_archive(replace(CONFIG, control_resolution="auto"), pairs, tmp_path / "weights.zip")
    assert lora_of(weights)[1]["placeholder"]["token_id"] == 151665
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    predictor = ModelPredictor()
    try:
        request = SampleRequest("make it like <zwx>", width=64, height=64, steps=2, seed=0)
        files = SampleFiles(replicate_weights=str(weights), image=tmp_path / "photo.png")
        (path,) = predictor.predict(SampleInputs(files, request)).paths
        assert path.stat().st_size > 0
    finally:
        predictor.close()


# --- the hub's cache, without a hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(hub_model, tmp_path, monkeypatch):
    """Qwen/Qwen-Image as `hf download` leaves it in the cache: a snapshot of links to blobs."""
    repository = tmp_path / "hub" / "models--Qwen--Qwen-Image"
    snapshot = repository / "snapshots" / ("0" * 40)
    for path in (each for each in hub_model.rglob("*") if each.is_file()):
        blob = repository / "blobs" / str(abs(hash(str(path))))
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(hub_model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for module in (
        "huggingface_hub.constants.HF_HUB_CACHE",
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE",
    ):
        monkeypatch.setattr(module, str(tmp_path / "hub"))
    monkeypatch.setenv("BASE_MODEL", "Qwen/Qwen-Image")
    return snapshot


def test_a_complete_cache_is_enough(hub_cache):
    assert download_model("Qwen/Qwen-Image") == hub_cache


MISSING = {
    "transformer": "transformer/ is missing",
    "transformer/config.json": "transformer/config.json is missing",
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors": (
        "transformer/ lacks diffusion_pytorch_model-00002-of-00003.safetensors, one of its 3 weight files"
    ),
    "transformer/diffusion_pytorch_model.safetensors.index.json": "transformer/ holds no weights",
    "text_encoder": "text_encoder/ is missing",
    "text_encoder/config.json": "text_encoder/config.json is missing",
    "text_encoder/model-00001-of-00004.safetensors": "text_encoder/ lacks model-00001-of-00004.safetensors",
    "vae": "vae/ is missing",
    "vae/diffusion_pytorch_model.safetensors": "vae/ holds no weights",
    "tokenizer": "tokenizer/ is missing",
    "tokenizer/merges.txt": "tokenizer/ has neither tokenizer.json nor vocab.json with merges.txt",
    "scheduler": "scheduler/ is missing",
    "scheduler/scheduler_config.json": "scheduler/scheduler_config.json is missing",
}


@pytest.mark.parametrize("missing", MISSING)
def test_a_cache_without_a_part_is_refused_with_the_part_and_the_command(missing, hub_cache):
    path = hub_cache / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError) as refused:
        download_model("Qwen/Qwen-Image")
    said = str(refused.value)
    assert f"BASE_MODEL 'Qwen/Qwen-Image' isn't complete: {MISSING[missing]}" in said
    assert "complete it with `hf download Qwen/Qwen-Image`" in said


def test_a_file_that_was_cut_off_is_named(hub_model, tmp_path):
    folder = tmp_path / "my model"
    shutil.copytree(hub_model, folder)
    file = folder / "transformer" / "diffusion_pytorch_model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError) as refused:
        download_model(str(folder))
    said = str(refused.value)
    assert "transformer/diffusion_pytorch_model-00001-of-00003.safetensors is cut off or damaged" in said
    assert f"`hf download Qwen/Qwen-Image --local-dir '{folder}'`" in said


def test_only_the_parts_that_are_asked_for_must_be_there(hub_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(hub_model, folder)
    shutil.rmtree(folder / "transformer")
    assert download_model(str(folder), ("tokenizer",)) == folder
