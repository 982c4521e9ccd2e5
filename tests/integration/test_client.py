"""The snippets of docs/serving.md, run by the real `replicate` client, against real Cog servers."""

import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile

import pytest

from examples.demo import write_dataset
from examples.shapes import Prompt
from lora_utils.io.images import read_settings
from tests.helpers import ROOT
from tests.hosted_api import BASE_VERSION, hosted_api

pytestmark = pytest.mark.slow  # three servers start
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.S)
FEWER = {  # what the snippets leave to the defaults, or wait
    '"train_placeholder_token": True,': '"train_placeholder_token": True, "steps": 2, "rank": 2, "resolution": "64",',
    '"output_format": "png"': '"output_format": "png", "steps": 2, "width": 64, "height": 64, "seed": 1',
    "time.sleep(5)": "time.sleep(0.2)",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, random_model):
    """A user's folder after all snippets, one program, what it printed, and the API's side of it."""
    folder = tmp_path_factory.mktemp("user")
    write_dataset(folder / "dataset.zip", "mushroom", Prompt("<zwx>"), count=10)
    program = "\n".join(SNIPPETS)
    for written, replaced in FEWER.items():
        assert written in program
        program = program.replace(written, replaced)
    with hosted_api(tmp_path_factory.mktemp("hosted"), random_model) as api:
        environment = {**os.environ, "REPLICATE_API_TOKEN": "secret", "REPLICATE_BASE_URL": api.url}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, api


def test_a_training_becomes_a_version_with_weights(ran):
    _, printed, api = ran
    (training,) = api.trainings.values()
    assert training["input"]["dataset"].endswith("/dataset.zip"), "the client uploaded it"
    assert training["output"]["version"] == "you/fox:v1"
    assert str(training["output"]) in printed


def test_the_version_predicts_with_its_weights_and_any_other_with_given_ones(ran):
    folder, _, api = ran
    assert set(api.versions) == {"v1", BASE_VERSION}
    with zipfile.ZipFile(io.BytesIO(next(content for path, content in api.files.items() if "weights" in path))) as made:
        trained = hashlib.sha256(made.read("lora/lora_weights.safetensors")).hexdigest()
    for name in ("fox-0.png", "painting.png"):
        settings = read_settings(folder / name)
        assert [lora["sha256"] for lora in settings["loras"]] == [trained]
        assert settings["size"] == "64x64"
