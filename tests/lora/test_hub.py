"""Sharing: what is pushed, what its card says and that its code works, and that a failed push loses nothing."""

import json
import os
import re
import subprocess
import sys
import zipfile

import huggingface_hub
import pytest
import torch
import yaml
from cog import Secret
from PIL import Image, ImageChops

from examples.demo import call
from lora_utils.config import RunOptions, TrainConfig
from lora_utils.errors import UserError
from lora_utils.io import download
from lora_utils.lora import hub
from lora_utils.lora.weights_zip import LORA_MEMBER, Meta
from lora_utils.tracking import contact_sheet
from lora_utils.training import launch
from predict import Predictor
from tests import hub_server
from tests.helpers import ROOT, train_archive
from train import train

TOKEN = "hf_" + "x" * 20


@pytest.fixture
def train_and_push(archive, random_model, tmp_path):
    """`python -m lora_utils train` as a user runs it, against a hub on this machine."""

    def run(url, token=TOKEN, *given):
        command = [
            sys.executable,
            "-m",
            "lora_utils",
            "train",
            str(archive),
            "--steps=4",
            "--rank=4",
            "--resolution=64",
            "--train_placeholder_token",
            "--learning_rate=1e-2",
            "--seed=0",
            "--hub_repo=me/it",
            f"--run_dir={tmp_path / 'run'}",
            "--sample_prompts=a photo of <zwx>",
            "--sample_steps=1",
            *given,
        ]
        environment = {
            **os.environ,
            "BASE_MODEL": str(random_model),
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": token,
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(tmp_path / "hub"),
        }
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_weights_previews_and_a_model_card_are_pushed_to_a_private_repository(train_and_push, tmp_path):
    with hub_server.receiving(TOKEN) as pushed:
        done = train_and_push(pushed.url)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {pushed.url}/me/it" in done.stdout
    assert [repo["visibility"] for repo in pushed.created] == ["private"]
    assert pushed.tokens == {f"Bearer {TOKEN}"}
    sheets = {f"samples/{path.name}" for path in contact_sheet.list_sheets(tmp_path / "run")}
    assert set(pushed.files) == {"weights.zip", hub.LORA_NAME, "meta.json", "README.md", *sheets}
    assert len(sheets) == 2
    assert pushed.files["weights.zip"] == (tmp_path / "weights.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "weights.zip") as packed:
        assert pushed.files[hub.LORA_NAME] == packed.read(LORA_MEMBER)
        assert json.loads(pushed.files["meta.json"]) == json.loads(packed.read("meta.json"))
    assert download._choose_file("me/it", list(pushed.files), None) == "weights.zip", "which predict's extra_lora finds"
    everything = done.stdout.encode() + done.stderr.encode() + b"".join(pushed.files.values())
    assert TOKEN.encode() not in everything
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert TOKEN.encode() not in kept


def test_a_push_that_fails_loses_nothing_and_is_said(train_and_push, tmp_path):
    """Here to a repository that is public, as was asked."""
    with hub_server.receiving(TOKEN, commits=False) as pushed:
        done = train_and_push(pushed.url, TOKEN, "--no-hub_private")
    assert done.returncode == 0, done.stderr
    assert [repo["visibility"] for repo in pushed.created] == ["public"]
    assert "warning: pushing weights.zip, from where it can be pushed again, failed" in done.stdout
    assert "the weights couldn't be pushed to me/it (" in done.stdout
    assert zipfile.is_zipfile(tmp_path / "weights.zip")


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_" + "y" * 20, "check the name and that hub_token may"), (hub_server.READER, "a token that may only read")],
)
def test_a_token_that_may_not_write_is_found_before_the_training(token, message, train_and_push, tmp_path):
    with hub_server.receiving(TOKEN) as pushed:
        done = train_and_push(pushed.url, token)
    assert done.returncode == 1
    assert "hub_repo me/it can't be written to" in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "step 1/" not in done.stdout
    assert not (tmp_path / "weights.zip").exists()


def test_without_a_token_a_repository_is_refused(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_operator")  # that isn't the caller's
    with pytest.raises(UserError, match="hub_repo me/it needs hub_token"):
        hub.ensure_repository("me/it", None, private=True)


def test_without_a_network_it_is_a_clear_error():
    with pytest.raises(UserError, match="can't be written to"):
        hub.ensure_repository("me/it", TOKEN, private=True)  # HF_HUB_OFFLINE is set


@pytest.mark.parametrize("name", ["it", "me/it/too", "me /it", "/it"])
def test_a_repository_has_an_owner_and_a_name(name):
    with pytest.raises(UserError, match="hub_repo must be owner/name"):
        RunOptions(hub_repo=name)


def test_cogs_secret_is_passed_on_and_stands_in_nothing_that_is_kept(archive, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(launch, "train_in_process", lambda inputs, *_: given.append(inputs) or tmp_path)
    call(train, dataset=archive, hub_repo="me/it", hub_token=Secret(TOKEN), seed=0)
    assert given[0].files.hub_token == TOKEN
    assert TOKEN not in repr(given)


# --- the card -------------------------------------------------------------------------------------------------------


def header_of(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---", card, re.S)[1])


def test_the_model_card_says_what_a_reader_needs():
    meta = Meta(
        base_model="Qwen/Qwen-Image",
        rank=16,
        training_steps=900,
        num_images=12,
        placeholder={"token": "<zwx>", "sha256": ""},
        config={"steps": 900, "seed": 77, "default_caption": "my dog Rex"},
    )
    card = hub.model_card("me/it", meta, ["samples/a.png", "samples/b.png"])
    header = header_of(card)
    assert header["base_model"] == "Qwen/Qwen-Image"
    assert header["instance_prompt"] == "<zwx>"
    assert header["library_name"] == "diffusers"
    assert "rank 16, 900 steps on 12 images" in card
    assert "![samples](samples/b.png)" in card
    assert "| steps | `900` |" in card
    assert "Rex" not in card
    assert "77" not in card


def test_the_gpu_of_a_trigger_word_and_of_neither():
    word = hub.model_card("me/it", Meta(config={"trigger_word": 'my "ohwx"'}), [])
    assert header_of(word)["instance_prompt"] == 'my "ohwx"'
    neither = hub.model_card("me/it", Meta(base_model="/models/own"), [])
    assert "instance_prompt" not in header_of(neither)
    assert "base_model" not in header_of(neither), "a folder means nothing to others"
    assert "/models" not in neither


def test_the_model_cards_code_generates_what_predict_generates(archive, random_model, tmp_path, monkeypatch):
    """With the stock pipeline, its LoRA loader and the learned row put into its own embedding matrix."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    config = TrainConfig(
        steps=8,
        rank=4,
        resolution="64",
        train_placeholder_token=True,
        learning_rate=1e-2,
        seed=0,
        placeholder_learning_rate=0.05,
    )
    weights = train_archive(config, archive, tmp_path / "weights.zip", RunOptions())
    with zipfile.ZipFile(weights) as packed:
        (tmp_path / hub.LORA_NAME).write_bytes(packed.read(LORA_MEMBER))
        card = hub.model_card("me/it", Meta.from_json(packed.read("meta.json").decode(), "weights.zip"), [])
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    for written, here in {
        '"Qwen/Qwen-Image"': repr(str(random_model)),
        '.to("cuda")': "",
        "bfloat16": "float32",
        'load_lora_weights("me/it"': f"load_lora_weights({str(tmp_path)!r}",
    }.items():
        assert written in code
        code = code.replace(written, here)
    code = code[: code.index('pipeline("a photo')]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _repository, name: str(tmp_path / name))
    namespace = {}
    exec(code, namespace)
    pipeline = namespace["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        "a photo of <zwx>",
        true_cfg_scale=4.0,
        negative_prompt=" ",
        width=64,
        height=64,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    predictor = Predictor()
    predictor.setup()
    (path,) = call(
        predictor.predict,
        prompt="a photo of <zwx>",
        replicate_weights=weights,
        width=64,
        height=64,
        steps=4,
        seed=5,
        output_format="png",
    )
    with Image.open(str(path)) as image:
        apart = ImageChops.difference(stock, image.convert("RGB"))
    assert max(most for _, most in apart.getextrema()) <= 1
