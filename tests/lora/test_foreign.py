"""Foreign LoRA files: applied exactly, as a stock transformer with merged weights says, or refused by name."""

import json
import time
import zipfile

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from lora_utils import constants
from lora_utils.errors import UserError
from lora_utils.io import access, download
from lora_utils.lora.formats import LAYOUTS, LoraFile, read_lora_file, write_lora_file
from lora_utils.lora.strength import HEADER_KEY
from lora_utils.lora.updates import LowRank, with_tensors
from lora_utils.lora.weights import load_weights
from lora_utils.model import modulation, transformer
from lora_utils.model.components import load_components
from lora_utils.model.device import Placement
from tests import hub_server
from tests.lora import judge

MOST = 2e-4  # of a LoRA's effect that its velocity may be off by
ATTENTION = [f"transformer_blocks.{i}.attn.{n}" for i in range(2) for n in ("to_q", "to_k", "to_v", "to_out.0")]
QUERY = ATTENTION[0]


@pytest.fixture(autouse=True)
def _base_model(random_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))


@pytest.fixture(scope="module")
def base(random_model):
    return judge.truth(judge.stock(random_model))


@pytest.fixture(scope="module")
def lora(random_model):
    return judge.pairs(random_model, ATTENTION)


def deltas(lora, strength=1.0):
    return {name: b @ a * (strength(name) if callable(strength) else strength) for name, (a, b) in lora.items()}


@pytest.fixture
def applied(components, random_model, base, tmp_path):
    """Load a file of these tensors. -> by how much of the LoRA's effect it is off, judged with these deltas"""

    def load(given, wanted, header=None, name="l.safetensors"):
        save_file(given, tmp_path / name, header)
        loaded = load_weights(tmp_path / name, components).lora
        return judge.error(judge.ours(components, loaded), judge.merged(random_model, wanted), base)

    return load


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["default", "default_0.default", "mystyle", "weights", "a.b.c"])
@pytest.mark.parametrize("ending", [".weight", ""])
def test_an_adapter_may_have_any_name(adapter, ending, lora, applied):
    given = judge.tensors(lora, "{}", f".lora_A.{adapter}{ending}", f".lora_B.{adapter}{ending}")
    assert applied(given, deltas(lora)) <= MOST


PREFIXES = ("", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "pipe.dit.")
PREFIXES += ("base_model.model.transformer.", "module.", "_orig_mod.", "module._orig_mod.", "base_model.model.module.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("parts", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
def test_a_prefix_of_any_tool_is_dropped(prefix, parts, lora, applied):
    given = judge.tensors(lora, prefix + "{}", *(f".{part}.weight" for part in parts))
    assert applied(given, deltas(lora)) <= MOST


def test_a_wrapper_inside_of_a_name_is_dropped_too(lora, applied):
    given = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in judge.tensors(lora).items()}
    assert applied(given, deltas(lora)) <= MOST


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_linear_layers_are_read_in_every_layout_that_is_written(layout, random_model, components, base, tmp_path):
    every = judge.pairs(random_model, judge.linear_layers(random_model))
    assert {name for name in every if not name.startswith("transformer_blocks")} == set(constants.OUTER_TARGETS)
    write_lora_file(
        tmp_path / "l.safetensors",
        LoraFile({name: LowRank(a, b, 4.0) for name, (a, b) in every.items()}),
        layout,
        torch.float32,
    )
    loaded = load_weights(tmp_path / "l.safetensors", components).lora
    want = judge.merged(random_model, deltas(every))
    assert judge.error(judge.ours(components, loaded), want, base) <= MOST


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "lora_transformer_", "lora_unet__orig_mod_"])
def test_flat_names_inside_and_outside_of_the_blocks(prefix, random_model, applied):
    names = [*constants.OUTER_TARGETS, QUERY, "transformer_blocks.1.img_mod.1", "transformer_blocks.0.txt_mlp.net.2"]
    lora = judge.pairs(random_model, names)
    given = {}
    for name, (a, b) in lora.items():
        flat = prefix + name.replace(".", "_")
        parts = {".lora_down.weight": a, ".lora_up.weight": b, ".alpha": torch.tensor(2.0)}
        given |= {flat + ending: part.clone() for ending, part in parts.items()}
    assert applied(given, deltas(lora, 0.5)) <= MOST


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float64]
)
def test_every_floating_point_dtype_is_applied(dtype, lora, applied):
    stored = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in lora.items()}
    as_stored = {name: (a.float(), b.float()) for name, (a, b) in stored.items()}
    assert applied(judge.tensors(stored), deltas(as_stored)) <= MOST


ALPHAS = {
    "a number": torch.tensor(8.0),
    "a vector of one": torch.tensor([8.0]),
    "a matrix of one": torch.tensor([[8.0]]),
    "an integer": torch.tensor(8),
    "a half": torch.tensor(8.0, dtype=torch.float16),
    "a bf16": torch.tensor([8.0], dtype=torch.bfloat16),
    "an fp8": torch.tensor(8.0).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_alpha_of_any_shape_and_dtype_is_read(alpha, lora, applied):
    alphas = {f"transformer.{name}.alpha": ALPHAS[alpha].clone() for name in lora}
    assert applied({**judge.tensors(lora), **alphas}, deltas(lora, 2.0)) <= MOST


# --- strength -------------------------------------------------------------------------------------------------------

FULL = {"peft_type": "LORA", "r": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
STRENGTHS = {
    "alpha": ({"lora_alpha": 8}, lambda _: 2.0),
    "rslora": ({"lora_alpha": 8, "use_rslora": True}, lambda _: 4.0),
    "a pattern of a name": ({"lora_alpha": 4, "alpha_pattern": {QUERY: 12}}, lambda n: 3.0 if n == QUERY else 1.0),
    "a pattern of a suffix": ({"lora_alpha": 4, "alpha_pattern": {"to_k": 2}}, lambda n: 0.5 if "to_k" in n else 1.0),
    "a regular expression": (
        {"lora_alpha": 4, "alpha_pattern": {r"transformer_blocks\.1\..*": 8}},
        lambda n: 2.0 if "blocks.1." in n else 1.0,
    ),
    "the first pattern that fits": (
        {"lora_alpha": 4, "alpha_pattern": {r".*\.to_[qk]": 8, "to_q": 2}},
        lambda n: 2.0 if n.endswith(("to_q", "to_k")) else 1.0,
    ),
    "an alpha of zero in part": (
        {"lora_alpha": 0, "alpha_pattern": {"to_q": 4}},
        lambda n: 1.0 if n.endswith("to_q") else 0.0,
    ),
    "the default alpha of peft, 8": ({}, lambda _: 2.0),
}


@pytest.mark.parametrize("case", STRENGTHS)
@pytest.mark.parametrize("where", ["header", "zip", "folder", "beside the file"])
def test_strength_is_read_as_peft_reads_it(where, case, lora, components, random_model, base, tmp_path):
    said, strength = STRENGTHS[case]
    config, path = {**FULL, **said}, tmp_path / "adapter_model.safetensors"
    if where == "header":
        header = {HEADER_KEY: json.dumps({f"transformer.{key}": value for key, value in config.items()})}
        save_file(judge.tensors(lora), path, header)
    else:
        save_file(judge.tensors(lora, "base_model.model.{}"), path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if where == "zip":
        with zipfile.ZipFile(tmp_path / "peft.zip", "w") as packed:
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                packed.write(tmp_path / name, f"my_adapter/{name}")
        path = tmp_path / "peft.zip"
    loaded = load_weights(tmp_path if where == "folder" else path, components).lora
    want = judge.merged(random_model, deltas(lora, strength))
    assert judge.error(judge.ours(components, loaded), want, base) <= MOST


@pytest.mark.parametrize(
    "given",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_k": 2}, "alpha_pattern": {r".*0\.attn\.to_q": 16}},
    ],
)
def test_a_folder_that_peft_saved_is_what_peft_computes(given, random_model, components, base, tmp_path):
    theirs = judge.stock(random_model)
    adapted = get_peft_model(theirs, LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **given))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    adapted.save_pretrained(tmp_path)
    loaded = load_weights(tmp_path, components).lora
    assert judge.error(judge.ours(components, loaded), judge.truth(theirs), base) <= MOST


def test_a_hub_repository_of_pefts_is_read_with_its_config(lora, components, random_model, base, tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    save_file(judge.tensors(lora, "base_model.model.{}"), repository / "adapter_model.safetensors")
    (repository / "adapter_config.json").write_text(json.dumps({**FULL, "lora_alpha": 12}))
    with hub_server.serving(repository) as (url, _):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(download, "HfApi", lambda token: __import__("huggingface_hub").HfApi(url, token=token))
        monkeypatch.setattr(download, "hf_hub_url", lambda repo, name, revision: f"{url}/{repo}/resolve/main/{name}")
        path = download.download_weights("Qwen/small", tmp_path / "cache", None, access.client_access())
    loaded = load_weights(path, components).lora
    assert judge.error(judge.ours(components, loaded), judge.merged(random_model, deltas(lora, 3.0)), base) <= MOST


def test_a_bare_peft_file_cannot_say_its_alpha_and_that_is_said(lora, applied, caplog):
    assert applied(judge.tensors(lora, "base_model.model.{}"), deltas(lora)) <= MOST
    assert "l.safetensors says nothing of its alpha, which is taken to be its rank" in caplog.text
    caplog.clear()
    assert applied(judge.tensors(lora), deltas(lora)) <= MOST
    assert not caplog.text


def test_many_patterns_of_names_cost_no_time(tmp_path):
    """A file of 720 layers of unequal ranks has as many patterns; matched each with each they took a minute."""
    names = [f"transformer_blocks.{i}.{layer}" for i in range(60) for layer in constants.LORA_TARGETS["attention_mlp"]]
    layers = {n: LowRank(torch.ones(1 + i % 3, 2), torch.ones(2, 1 + i % 3), 1.0 + i % 3) for i, n in enumerate(names)}
    write_lora_file(tmp_path / "l.safetensors", LoraFile(layers))
    began = time.process_time()
    assert len(read_lora_file(tmp_path / "l.safetensors").layers) == 720
    assert time.process_time() - began < 5


# --- the base: tables, storage --------------------------------------------------------------------------------------

TIMED = [
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "transformer_blocks.0.img_mod.1",
    "transformer_blocks.1.txt_mod.1",
    "img_in",
]


@pytest.fixture
def always_a_table(monkeypatch):
    monkeypatch.setattr(modulation, "pays", lambda *_: True)  # the small model is narrower than a table is long


@pytest.mark.usefixtures("always_a_table")
@pytest.mark.parametrize("layer", TIMED)
def test_beside_the_modulation_table_a_lora_is_what_it_is_without(layer, random_model, tmp_path, monkeypatch):
    """In bf16 bit for bit, and in fp32 by the judge; the base comes back bit for bit."""
    lora = judge.pairs(random_model, [layer])
    save_file(judge.tensors(lora), tmp_path / "l.safetensors")
    bf16 = Placement(torch.device("cpu"), torch.bfloat16)
    tabled = load_components(random_model, bf16)
    before = judge.ours(tabled)
    got = judge.ours(tabled, load_weights(tmp_path / "l.safetensors", tabled).lora)
    assert torch.equal(judge.ours(tabled), before)
    monkeypatch.undo()
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    plain = load_components(random_model, bf16)
    assert torch.equal(got, judge.ours(plain, load_weights(tmp_path / "l.safetensors", plain).lora))

    fp32 = Placement(torch.device("cpu"), torch.float32)
    exact = load_components(random_model, fp32)
    times = transformer.flow.model_time(torch.tensor([judge.SIGMA]), torch.float32)
    exact.transformer = transformer.load_transformer(random_model, fp32, transformer.Storage(timesteps=times))
    assert modulation.has_table(exact.transformer)
    loaded = load_weights(tmp_path / "l.safetensors", exact).lora
    want, base = judge.merged(random_model, deltas(lora)), judge.truth(judge.stock(random_model))
    assert judge.error(judge.ours(exact, loaded), want, base) <= MOST
    assert modulation.has_table(exact.transformer)


@pytest.mark.parametrize("quantization", ["fp8", "int8", "nf4"])
def test_on_a_quantised_base_it_is_added_to_what_that_base_computes(quantization, random_model, tmp_path):
    lora = judge.pairs(random_model, [*ATTENTION, "transformer_blocks.0.img_mod.1", "proj_out"])
    save_file(judge.tensors(lora), tmp_path / "l.safetensors")
    stored = load_components(random_model, Placement(torch.device("cpu"), torch.float32), quantization)
    loaded = load_weights(tmp_path / "l.safetensors", stored).lora
    base, want = (judge.merged(random_model, given, stored) for given in ({}, deltas(lora)))
    assert judge.error(judge.ours(stored, loaded), want, base) <= MOST


def failing_at(count, error):
    """What stands in for the stream of weights: it fails at its tensor `count`."""
    real = transformer.stream_tensors

    def stream(*given, **named):
        for index, item in enumerate(real(*given, **named)):
            if index == count:
                raise error
            yield item

    return stream


@pytest.mark.usefixtures("always_a_table")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), OSError("the disk is gone")])
def test_whatever_fails_while_weights_are_loaded_the_base_is_the_same_bit_for_bit(
    error, random_model, tmp_path, monkeypatch
):
    """At every tensor: on its way from the disk, and on its way to the device."""
    components = load_components(random_model, Placement(torch.device("cpu"), torch.bfloat16))
    before = judge.ours(components)
    lora = judge.pairs(random_model, ["transformer_blocks.0.img_mod.1", *ATTENTION])
    save_file(judge.tensors(lora), tmp_path / "l.safetensors")
    modulations = 2 * 2 * 2  # two blocks, two streams, weight and bias
    for count in range(modulations):
        with monkeypatch.context() as patch:
            patch.setattr(transformer, "stream_tensors", failing_at(count, error))
            with pytest.raises((UserError, OSError), match=r"don't fit into|the disk is gone"):
                load_weights(tmp_path / "l.safetensors", components)
        assert torch.equal(judge.ours(components), before), count
    for count in range(len(lora)):
        calls = iter(range(10**6))

        def moved(update, change, limit=count, calls=calls):
            if next(calls) == limit:
                raise error
            return with_tensors(update, change)

        with monkeypatch.context() as patch:
            patch.setattr("lora_utils.lora.hooks.with_tensors", moved)
            with pytest.raises((UserError, OSError), match=r"doesn't fit into|the disk is gone"):
                load_weights(tmp_path / "l.safetensors", components)
        assert torch.equal(judge.ours(components), before), count
    loaded = load_weights(tmp_path / "l.safetensors", components).lora
    assert not torch.equal(judge.ours(components, loaded), before)
    assert torch.equal(judge.ours(components), before)


@pytest.mark.usefixtures("always_a_table")
def test_a_refused_lora_loads_no_modulations(random_model, tmp_path, monkeypatch):
    components = load_components(random_model, Placement(torch.device("cpu"), torch.bfloat16))
    monkeypatch.setattr(transformer, "stream_tensors", lambda *_: pytest.fail("loaded"))
    lora = judge.pairs(random_model, ["transformer_blocks.0.img_mod.1"])
    strange = {"transformer.transformer_blocks.9.attn.to_q": (torch.ones(4, 128), torch.ones(128, 4))}
    save_file({**judge.tensors(lora), **judge.tensors(strange, "{}")}, tmp_path / "l.safetensors")
    with pytest.raises(UserError, match="don't exist here"):
        load_weights(tmp_path / "l.safetensors", components)
    narrow = {"transformer.transformer_blocks.0.img_mod.1": (torch.ones(4, 128), torch.ones(700, 4))}
    save_file(judge.tensors(narrow, "{}"), tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=r"takes and gives \(128, 768\) values"):
        load_weights(tmp_path / "l.safetensors", components)
