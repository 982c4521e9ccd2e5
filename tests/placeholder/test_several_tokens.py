"""Several placeholder tokens in one training: each with a row of its own, from the captions to the images."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from examples import shapes
from examples.demo import call
from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.errors import UserError
from lora_utils.io.archive import extract_archive
from lora_utils.lora.weights_zip import LORA_MEMBER, META_MEMBER
from lora_utils.model.text_encoder import load_tokenizer
from lora_utils.training import loop
from predict import Predictor
from tests.helpers import make_state
from train import train

OBJECTS = {"<anna>": "mushroom", "<ben>": "fish"}
NAMES = ",".join(OBJECTS)
SETTINGS = {"steps": 4, "rank": 2, "learning_rate": 0.02, "batch_size": 2, "resolution": "64", "seed": 1}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Images of either object, each caption with its own token, and one with both."""
    path, rng = tmp_path_factory.mktemp("several") / "d.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as packed:
        for index in range(8):
            token = list(OBJECTS)[index % 2]
            scene = shapes.scene_of(shapes.Prompt(token, None, "gray"), rng, OBJECTS[token])
            with packed.open(f"{index}.png", "w") as file:
                shapes.to_image(shapes.draw(scene)).save(file, "png")
            caption = f"{NAMES} on a gray background" if index == 7 else f"a photo of {token} on a gray background"
            packed.writestr(f"{index}.txt", caption)
    return path


def test_the_log_follows_each_embedding(dataset, random_model, monkeypatch, capsys):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    call(train, dataset=dataset, train_placeholder_token=True, placeholder_token=NAMES, **SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    for token in OBJECTS:
        (*_, last) = [line for line in lines if line.startswith(f"  {token} norm")]
        assert re.fullmatch(
            rf"  {token} norm [\d.]+, [\d.]+% of a word's, grad [\de.+-]+, nearest '.+' \(cosine -?[\d.]+\)", last
        )


@pytest.fixture(scope="module")
def weights(dataset, random_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(random_model))
        given = {"train_placeholder_token": True, "placeholder_token": "<anna>, <ben>"}
        trained = call(train, dataset=dataset, **given, **SETTINGS)
    return Path(str(trained.weights)).rename(tmp_path_factory.mktemp("weights") / "weights.zip")


def draw(random_model, weights, prompt):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(random_model))
        predictor = Predictor()
        predictor.setup()
        sampling = {"steps": 2, "width": 64, "height": 64, "output_format": "png", "seed": 5}
        (path,) = call(predictor.predict, prompt=prompt, replicate_weights=weights, **sampling)
    with Image.open(path) as image:
        return np.array(image, int)


def test_the_archive_holds_an_embedding_for_each_token_and_the_meta_describes_each(weights, components, tmp_path):
    extract_archive(weights, tmp_path)
    rows = {key: row for key, row in load_file(tmp_path / LORA_MEMBER).items() if key.startswith("bundle_emb.")}
    assert set(rows) == {f"bundle_emb.{token}.lora.qwen25_7b" for token in OBJECTS}
    assert all(row.shape == (1, 128) and row.any() for row in rows.values())
    assert not torch.equal(*rows.values())
    meta = json.loads((tmp_path / META_MEMBER).read_text())
    first = len(components.tokenizer)
    assert (meta["placeholder_token"], meta["placeholder_token_id"]) == (NAMES, [first, first + 1])
    assert [described["token"] for described in meta["placeholder"]] == list(OBJECTS)
    assert [described["captions_with_token"] for described in meta["placeholder"]] == [5, 4]


def test_either_token_and_both_can_be_sampled(weights, random_model):
    prompts = ("a photo of <anna>", "a photo of <ben>", "a photo of <anna> and <ben>")
    anna, ben, both = (draw(random_model, weights, prompt) for prompt in prompts)
    assert not np.array_equal(anna, ben)
    assert not np.array_equal(anna, both)


@pytest.mark.parametrize("lost", [["<ben>"], list(OBJECTS), "exchanged"])
def test_embeddings_that_are_lost_or_exchanged_are_an_error(lost, weights, random_model, tmp_path):
    extract_archive(weights, tmp_path)
    tensors = load_file(tmp_path / LORA_MEMBER)
    anna, ben = (f"bundle_emb.{token}.lora.qwen25_7b" for token in OBJECTS)
    if lost == "exchanged":
        tensors[anna], tensors[ben] = tensors[ben], tensors[anna]
    else:
        tensors = {key: value for key, value in tensors.items() if not any(token in key for token in lost)}
    save_file(tensors, tmp_path / LORA_MEMBER)
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as packed:
        for member in (LORA_MEMBER, META_MEMBER):
            packed.write(tmp_path / member, member)
    with pytest.raises(UserError, match=r"meta\.json (speaks of|describes)|isn't the one that meta\.json describes"):
        draw(random_model, tmp_path / "changed.zip", "a photo of <anna>")


@pytest.fixture
def run(dataset, random_model, tmp_path):
    extract_archive(dataset, tmp_path)
    config = TrainConfig(train_placeholder_token=True, placeholder_token=NAMES, **{**SETTINGS, "batch_size": 1})
    return make_state(config, load(tmp_path, config), random_model)


def test_a_step_moves_the_embeddings_of_its_own_captions_alone(run):
    """Neither a gradient of zeros nor AdamW's momentum moves a row whose token the step didn't show."""
    rows = dict(zip(run.placeholders.tokens, run.placeholders.embeddings, strict=True))
    seen = set()
    before = {token: row.detach().clone() for token, row in rows.items()}
    for report in loop.train(run):
        moved = {token for token, row in rows.items() if not torch.equal(row, before[token])}
        assert moved == set(report.token_grad_norms)
        before = {token: row.detach().clone() for token, row in rows.items()}
        seen |= {frozenset(moved)}
    assert seen & {frozenset({"<anna>"}), frozenset({"<ben>"})}


def test_a_token_that_no_caption_holds_is_named(run, dataset, random_model, tmp_path):
    config = TrainConfig(train_placeholder_token=True, placeholder_token="<anna>,<carl>", **SETTINGS)
    with pytest.raises(UserError, match="none of the 8 captions holds the placeholder token '<carl>'"):
        load(tmp_path, config, load_tokenizer(random_model))


@pytest.mark.parametrize(
    ("names", "message"),
    [("<anna>,<anna>", "names '<anna>' twice"), ("<anna>,", "placeholder_token '' isn't"), ("<a>,b", "'b' isn't")],
)
def test_lists_of_names_are_checked_one_by_one(names, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(train_placeholder_token=True, placeholder_token=names)
