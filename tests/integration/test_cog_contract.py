"""The package as `cog build` reads it, and the requirements as it rewrites them."""

import ast
import re
from dataclasses import asdict, fields

import pytest
import yaml

from lora_utils import constants
from lora_utils.config import (
    LR_SCHEDULERS,
    OPTIMIZERS,
    OUTPUT_FORMATS,
    SHARDINGS,
    RunOptions,
    SampleRequest,
    TrainConfig,
)
from lora_utils.presets import PRESETS
from scripts import cog_contract
from tests.conftest import ROOT

SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in ("train", "predict")}


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
    ],
)
def test_the_rules_can_fail(broken, rule):
    source = f"def train({broken}) -> Path:\n    ...\n"
    assert any(rule in problem for problem in cog_contract.problems(source))


@pytest.mark.parametrize(("name", "settings"), [("train", (TrainConfig, RunOptions)), ("predict", (SampleRequest,))])
def test_literals_are_the_defaults_of_the_dataclass_behind_them(name, settings):
    declared = {item.name: item for item in cog_contract.inputs(SOURCES[name])}
    known = [item for kind in settings for item in fields(kind)]
    own = {item.name: item.default for item in known if item.name not in ("seed", "prompt")}
    if name == "train":  # empty: what the goal chooses, which without one is the dataclass's own
        assert {name: own[name] for name in asdict(PRESETS["none"])} == asdict(PRESETS["none"])
        own |= dict.fromkeys(asdict(PRESETS["none"]))
    assert {item: declared[item].literal("default") for item in own} == own
    extra = set(declared) - set(own)
    assert (
        extra == {"dataset", "seed", "init_weights", "hub_token"}
        if name == "train"
        else extra == {"prompt", "seed", "replicate_weights", "image", "mask", "hf_token"}
    )


@pytest.mark.parametrize(("name", "settings"), [("train", TrainConfig), ("predict", SampleRequest)])
def test_ranges_are_those_of_the_dataclass(name, settings):
    given = {"prompt": "x"} if name == "predict" else {"train_placeholder_token": True}
    for item in cog_contract.inputs(SOURCES[name]):
        for bound, beyond in (("ge", -1e-3), ("le", 1e-3)):
            if bound not in item.options or item.name == "seed":
                continue
            edge = item.literal(bound)
            kind, needed = settings, given
            if name == "train" and item.name in RunOptions.__dataclass_fields__:
                kind, needed = RunOptions, {"run_dir": "x"}
            other = {"width": "height", "height": "width"}.get(item.name)
            pair = {other: 64} if other else {}
            kind(**needed, **pair, **{item.name: edge})
            step = (1 if beyond > 0 else -1) if item.type == "int" else edge * 0.5 * (beyond > 0) + beyond
            with pytest.raises(ValueError, match=item.name):
                kind(**needed, **pair, **{item.name: edge + step})


def test_choices_are_the_librarys():
    declared = {item.name: item for name in SOURCES for item in cog_contract.inputs(SOURCES[name])}
    assert declared["lora_targets"].literal("choices") == list(constants.LORA_TARGETS)
    assert declared["lr_scheduler"].literal("choices") == list(LR_SCHEDULERS)
    assert declared["optimizer"].literal("choices") == list(OPTIMIZERS)
    assert declared["goal"].literal("choices") == list(PRESETS)
    assert declared["shard_base"].literal("choices") == list(SHARDINGS)
    assert declared["output_format"].literal("choices") == list(OUTPUT_FORMATS)
    assert declared["aspect_ratio"].literal("choices") == list(constants.OFFICIAL_SIZES_PX)


def test_whole_numbers_may_come_as_floats_and_broken_ones_are_refused():
    assert TrainConfig(rank=8.0, seed=1).rank == 8  # type: ignore[arg-type]
    for bad in (8.5, True, "8", float("nan")):
        with pytest.raises(ValueError, match="rank must be a whole number"):
            TrainConfig(rank=bad)  # type: ignore[arg-type]


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


FLOORS = [
    {"train", "predict", "dataset.__main__", "__main__", "convert"},
    {"session"},
    {
        "training",
        "checkpoints",
        "objective",
        "fitting",
        "preparation",
        "preflight",
        "sampling",
        "ways",
        "weights",
        "validation",
        "samples",
        "journal",
        "watching",
        "report",
    },
    {
        "models",
        "adapters",
        "autocaption",
        "caching",
        "placeholder",
        "single_frame",
        "fresh_token",
        "modulation",
        "blocks",
        "draws",
        "memory",
        "plan",
        "quantization",
        "optimizers",
        "first_block",
        "GPUs",
        "sharding",
    },
    {
        "dataset",
        "captions",
        "masks",
        "images",
        "archive",
        "bundle",
        "lora_file",
        "outputs",
        "fetch",
        "hub",
        "store",
        "streaming",
    },
    {"flow", "sizes", "console", "command_line", "disk", "flops"},
    {"config", "recipes", "checks", "errors", "qwen"},
]
SIDEWAYS = {  # within a floor, only these
    ("training", "preparation"),
    ("checkpoints", "preparation"),
    ("validation", "objective"),
    ("validation", "preparation"),
    ("samples", "preparation"),
    ("samples", "sampling"),
    ("journal", "training"),
    ("journal", "validation"),
    ("watching", "journal"),
    ("watching", "preparation"),
    ("watching", "samples"),
    ("watching", "training"),
    ("watching", "validation"),
    ("report", "journal"),
    ("report", "samples"),
    ("plan", "optimizers"),
    ("plan", "GPUs"),
    ("models", "sharding"),
    ("hub", "bundle"),
    ("hub", "fetch"),
    ("ways", "sampling"),
    ("ways", "weights"),
    ("training", "fitting"),
    ("training", "objective"),
    ("fitting", "objective"),
    ("fitting", "preparation"),
    ("objective", "preparation"),
    ("preparation", "preflight"),
    ("autocaption", "models"),
    ("autocaption", "memory"),
    ("dataset", "masks"),
    ("masks", "captions"),
    ("masks", "images"),
    ("adapters", "blocks"),
    ("adapters", "models"),
    ("caching", "models"),
    ("caching", "placeholder"),
    ("draws", "caching"),
    ("fresh_token", "placeholder"),
    ("models", "blocks"),
    ("models", "modulation"),
    ("models", "placeholder"),
    ("models", "quantization"),
    ("models", "single_frame"),
    ("plan", "memory"),
    ("plan", "modulation"),
    ("plan", "quantization"),
    ("dataset", "archive"),
    ("bundle", "archive"),
    ("dataset", "captions"),
    ("dataset", "images"),
    ("config", "errors"),
    ("config", "checks"),
    ("config", "recipes"),
    ("recipes", "checks"),
    ("checks", "errors"),
    ("config", "qwen"),
}


def test_imports_go_down_only_and_heavy_libraries_have_one_home():
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    files = {name: ROOT / f"{name}.py" for name in ("train", "predict")}
    for file in sorted((ROOT / "lora_utils").rglob("*.py")):
        parts = file.relative_to(ROOT / "lora_utils").with_suffix("").parts
        files[".".join(part for part in parts if part != "__init__")] = file
    assert set(files) - {""} == set(floor_of)
    for name, file in files.items():
        if not name:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lora_utils":
                rooms = [imported.name for imported in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_utils."):
                rooms = [str(node.module).split(".")[1]]
            else:
                rooms = []
            for room in rooms:
                down = floor_of[room] > floor_of[name] or (name, room) in SIDEWAYS
                assert down, f"{name} imports {room}, which isn't below it"
            if isinstance(node, ast.ImportFrom | ast.Import):
                module = getattr(node, "module", None) or node.names[0].name
                if module.split(".")[0] in {"diffusers", "transformers", "peft"}:
                    assert floor_of[name] <= 3, f"{name} imports {module}"
