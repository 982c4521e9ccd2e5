"""The package as `cog build` reads it, and the requirements as it rewrites them."""

import re

import pytest
import yaml

from lora_utils.config import SampleInputs, TrainInputs, declared_inputs
from lora_utils.options import is_required, option_of
from scripts import cog_contract, cog_signatures
from tests.helpers import ROOT

SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in ("train", "predict")}
INPUTS = {"train": TrainInputs, "predict": SampleInputs}


@pytest.mark.parametrize("name", SOURCES)
def test_the_signature_keeps_every_rule(name):
    assert cog_contract.problems(SOURCES[name]) == []


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ("x: int = Input(default=None, description='d')", "go together"),
        ("x: int = Input(default=DEFAULT, description='d')", "no plain literal"),
        ("x: int = Input(default=5, ge=6, description='d')", "below ge"),
        ("x: str = Input(default='a', choices=['b'], description='d')", "no choice"),
        ("x: str = Input(default='a', description='d' 'e')", "isn't one literal"),
        ("x: list = Input(default=1, description='d')", "type list"),
        ("x: str = Input(default='a', accept='image/*', description='d')", "accept belongs to files"),
    ],
)
def test_the_rules_can_fail(broken, rule):
    source = f"def train({broken}) -> Path:\n    ...\n"
    assert any(rule in problem for problem in cog_contract.problems(source))


@pytest.mark.parametrize("name", SOURCES)
def test_the_signature_is_the_list_of_inputs(name):
    """Read back by the rules of Cog's parser: names, order, defaults, ranges, choices, sentences, file types."""
    listed = {declared.name: declared for declared in declared_inputs(INPUTS[name])}
    read = cog_contract.inputs(SOURCES[name])
    assert [item.name for item in read] == list(listed)
    for item in read:
        about = option_of(listed[item.name])
        assert item.required == is_required(listed[item.name]), item.name
        assert item.literal("description") == about.sentence
        assert (item.literal("ge") if "ge" in item.options else None) == about.least, item.name
        assert (item.literal("le") if "le" in item.options else None) == about.most, item.name
        assert (tuple(item.literal("choices")) if "choices" in item.options else ()) == about.choices, item.name
        assert (item.literal("accept") if "accept" in item.options else "") == about.accept, item.name
        assert (item.type == "Path") == bool(about.accept), item.name
        assert (item.type == "Secret") == about.secret, item.name


def test_the_schema_says_which_files_an_input_takes():
    schemas = cog_contract.openapi_schema(SOURCES["predict"], SOURCES["train"])["components"]["schemas"]
    assert schemas["Input"]["properties"]["image"]["x-cog-accept"] == "image/*"
    assert ".zip" in schemas["TrainingInput"]["properties"]["dataset"]["x-cog-accept"]


def test_the_rarest_inputs_come_last():
    names = [item.name for item in cog_contract.inputs(SOURCES["train"])]
    assert names[0] == "dataset"
    assert names[1] == "train_placeholder_token"
    assert set(names[-4:]) == {"beta1", "beta2", "max_grad_norm", "shard_base"}


def test_the_written_files_are_up_to_date_and_a_stale_one_is_found(monkeypatch, capsys):
    assert cog_signatures.main(["--check"]) == 0
    monkeypatch.setattr(cog_signatures, "signature", lambda *_: "    # nothing\n")
    assert cog_signatures.main(["--check"]) == 1
    assert "train.py is stale; run python -m scripts.cog_signatures" in capsys.readouterr().out
    assert (ROOT / "train.py").read_text() == SOURCES["train"], "a check writes nothing"


@pytest.mark.parametrize(("name", "most"), [("train", 40), ("predict", 40)])
def test_the_entry_points_are_thin(name, most):
    inputs = [line for line in SOURCES[name].splitlines() if "= Input(" in line]
    assert len(SOURCES[name].splitlines()) - len(inputs) <= most, "beside a line for each input"


def test_cog_yaml_has_what_every_cog_takes():
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert config["predict"] == "predict.py:Predictor"
    assert config["train"] == "train.py:train"
    build = config["build"]
    assert build["gpu"] is True
    assert build["python_requirements"] == "requirements.txt"
    assert {"cuda", "python_version", "sdk_version"} <= set(build)
    assert "BASE_MODEL=Qwen/Qwen-Image" in config["environment"]


def test_requirements_are_exact_pins_that_cog_can_rewrite():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"} <= names
    assert not names & {"torchvision", "cog", "coglet", "ai-toolkit"}
