"""README's command lines work as they are written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from examples.demo import call, write_dataset
from examples.shapes import Prompt
from predict import Predictor
from scripts import cog_contract
from tests.cog_server import cog_server
from tests.helpers import ROOT
from train import train

README = (ROOT / "README.md").read_text()
CONSOLE = [line for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines() if line]
COG = [line for line in CONSOLE if line.startswith("cog ")]


def given_inputs(line: str, folder: Path) -> dict[str, object]:
    """The inputs of a `cog train` or `cog predict` line, typed by the signature as cog's command line does it."""
    words = shlex.split(line)
    assert words[0] == "cog"
    declared = {item.name: item for item in cog_contract.inputs((ROOT / f"{words[1]}.py").read_text())}
    pairs = [words[index + 1].split("=", 1) for index, word in enumerate(words) if word == "-i"]
    casts = {"int": int, "float": float, "bool": lambda text: text == "true", "str": str}
    typed = {}
    for name, value in pairs:
        kind = declared[name].type
        typed[name] = folder / value.removeprefix("@") if kind == "Path" else casts[kind](value)
    return typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_model):
    """A user's folder: dataset.zip, and weights.zip once a training has run."""
    place = tmp_path_factory.mktemp("user")
    write_dataset(place / "dataset.zip", "mushroom", Prompt("<zwx>"), count=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(random_model))
        for line in (line for line in COG if line.startswith("cog train")):
            fast = {"steps": 2, "resolution": "64", "rank": 2}  # the rest as README says
            output = call(train, **{**given_inputs(line, place), **fast})
            if "train_placeholder_token=true" in line:
                Path(str(output.weights)).rename(place / "weights.zip")
    return place


def test_there_are_commands_to_check():
    assert {line.split()[1] for line in COG} == {"train", "predict"}
    assert "make demo" in CONSOLE
    assert "make test" in CONSOLE


@pytest.mark.parametrize("line", [line for line in COG if line.startswith("cog predict")])
def test_predict_lines_draw(line, folder, random_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))

    predictor = Predictor()
    predictor.setup()
    given = given_inputs(line, folder)
    fewer = {"steps": min(int(str(given.get("steps", 50))), 2)}  # the sizes as README says
    paths = call(predictor.predict, **{**given, **fewer})
    assert len(paths) == given.get("num_outputs", 1)


def test_make_targets_and_modules_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in CONSOLE:
        if line.startswith("make "):
            assert line.split()[1] in targets
        elif line.startswith("python -m "):
            if line.startswith("python -m lora_utils"):
                continue  # run below
            module = line.split()[2].replace(".", "/") + ".py"
            assert (ROOT / module).is_file(), line
            for option in re.findall(r"--[a-z-]+", line):
                assert f'"{option}"' in (ROOT / module).read_text(), line


def test_the_report_on_a_dataset_runs_as_written(folder, random_model):
    (line,) = (line for line in CONSOLE if line.startswith("python -m lora_utils.dataset"))
    words = shlex.split(line.replace("DATASET", str(folder / "dataset.zip")))
    environment = {**os.environ, "BASE_MODEL": str(random_model)}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "10 images" in done.stdout


def test_training_and_sampling_without_cog_run_as_written(folder, random_model, tmp_path):
    """With fewer and smaller steps behind what is written."""
    shutil.copy(folder / "dataset.zip", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BASE_MODEL": str(random_model)}
    fewer = {"train": "--steps 2 --resolution 64 --rank 2", "sample": "--steps 2 --width 64 --height 64"}
    for line in (line for line in CONSOLE if line.startswith("python -m lora_utils ")):
        words = shlex.split(line)[1:]
        command = [sys.executable, *words, *fewer[words[2]].split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "images").iterdir())) == 1
    again = subprocess.run(
        [sys.executable, "-m", "lora_utils", "train", "dataset.zip"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 1
    assert "weights.zip is there already" in again.stderr


def test_the_conversion_runs_as_written(folder, tmp_path):
    (line,) = (line for line in CONSOLE if line.startswith("python -m lora_utils.convert"))
    shutil.copy(folder / "weights.zip", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *shlex.split(line)[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lora.safetensors").is_file()


def test_the_requests_to_make_serve_work_as_written(tmp_path, tiny_model):
    """All but their ports, which may be taken here."""
    write_dataset(tmp_path / "dataset.zip", "house", Prompt("<zwx>"))
    (tmp_path / "out").mkdir()
    (tmp_path / "dataset.zip").rename(tmp_path / "out" / "dataset.zip")
    block = next(block for block in re.findall(r"```console\n(.*?)```", README, re.S) if "curl" in block)
    train_line, weights_line, predict_line, picture_line, long_line, cancel_line = block.strip().splitlines()
    places = {mode: tmp_path / mode for mode in ("predict", "train")}
    for place in places.values():
        place.mkdir()

    def run(line: str) -> str:
        for port, mode in (("5000", "predict"), ("5001", "train")):
            line = line.replace(
                f"localhost:{port}", str(servers[mode].client.base_url).removeprefix("http://").rstrip("/")
            )
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    with (
        cog_server(places["predict"], tiny_model, "predict") as predicts,
        cog_server(places["train"], tiny_model, "train") as trains,
    ):
        servers = {"predict": predicts, "train": trains}
        run(train_line)
        run(weights_line)
        assert zipfile.is_zipfile(tmp_path / "out" / "weights.zip")
        run(predict_line)
        run(picture_line)
        with Image.open(tmp_path / "out" / "served.png") as image:
            assert image.size == (64, 64)
        predicts.wait_until_ready(10)
        assert '"starting"' in run(long_line) or '"processing"' in run(long_line)
        run(cancel_line)
        predicts.wait_until_ready(30)


def test_files_that_readme_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(("name", "heading"), [("train", "Inputs of `train`"), ("predict", "Inputs of `predict`")])
def test_readme_lists_every_input_and_no_other(name, heading):
    section = README.split(f"### {heading}")[1].split("\n### ")[0]
    listed = {
        found for row in re.findall(r"^\| (`.*?) \|", section, re.M) for found in re.findall(r"`([a-z0-9_]+)`", row)
    }
    assert listed == {item.name for item in cog_contract.inputs((ROOT / f"{name}.py").read_text())}
