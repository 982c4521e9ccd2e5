"""LoRA files that are refused: each by a sentence that names what it is, in every use of a file."""

import json
import zipfile
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lora_utils.config import TrainConfig
from lora_utils.convert import main
from lora_utils.errors import UserError
from lora_utils.lora.formats import LoraFile, write_lora_file
from lora_utils.lora.strength import HEADER_KEY
from lora_utils.lora.updates import LowRank
from lora_utils.lora.weights import load_weights, read_init_weights, read_weights
from lora_utils.lora.weights_zip import LORA_MEMBER, META_MEMBER, Meta
from tests.lora import judge

QUERY = "transformer_blocks.0.attn.to_q"
A, B = f"transformer.{QUERY}.lora_A.weight", f"transformer.{QUERY}.lora_B.weight"
PAIR = {A: torch.ones(4, 128), B: torch.ones(128, 4)}
ALPHA = f"transformer.{QUERY}.alpha"


@pytest.fixture(autouse=True)
def _base_model(random_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))


def config(**given):
    return {HEADER_KEY: json.dumps({f"transformer.{name}": value for name, value in given.items()})}


REFUSED = {
    # alphas
    "alpha of two": ({**PAIR, ALPHA: torch.ones(2)}, None, "must be one finite number, got [1.0, 1.0]"),
    "alpha of none": ({**PAIR, ALPHA: torch.ones(0)}, None, "must be one finite number, got []"),
    "alpha nan": ({**PAIR, ALPHA: torch.tensor(torch.nan)}, None, "must be one finite number"),
    "alpha infinite": ({**PAIR, ALPHA: torch.tensor(-torch.inf)}, None, "must be one finite number"),
    "alpha against the header's": ({**PAIR, ALPHA: torch.tensor(2.0)}, config(r=4, lora_alpha=4), "its config says 4"),
    # shapes and numbers
    "rank 0": ({A: torch.ones(0, 128), B: torch.ones(128, 0)}, None, "expected [R, D_in] and [D_out, R]"),
    "a number": ({A: torch.tensor(1.0), B: torch.ones(128, 1)}, None, "expected [R, D_in] and [D_out, R]"),
    "a convolution": ({A: torch.ones(4, 128, 1, 1), B: torch.ones(128, 4, 1, 1)}, None, "has the shapes"),
    "integers": ({A: torch.ones(4, 128, dtype=torch.int8), B: PAIR[B]}, None, "is stored as torch.int8"),
    "nan": ({A: torch.full((4, 128), torch.nan), B: PAIR[B]}, None, "holds NaN or infinity"),
    "infinity in fp8": ({**PAIR, B: torch.full((128, 4), torch.inf).to(torch.float8_e5m2)}, None, "NaN or infinity"),
    "all zero": ({A: PAIR[A], B: torch.zeros(128, 4)}, None, "would generate what the base model does"),
    "a strength of zero": (PAIR, config(r=4, lora_alpha=0), "would generate what the base model does"),
    # keys
    "a layer twice": (
        {**PAIR, f"diffusion_model.{QUERY}.lora_A.weight": PAIR[A].clone()},
        None,
        "holds layer 'transformer_blocks.0.attn.to_q' twice",
    ),
    "two adapters": (
        {key.replace(".weight", f".{name}.weight"): v.clone() for key, v in PAIR.items() for name in ("one", "two")},
        None,
        "twice, as",
    ),
    "nothing": ({"bundle_emb.<zwx>.lora.qwen25_7b": torch.ones(1, 128)}, None, "holds no LoRA layers"),
    # methods
    "a DoRA of another width": (
        {**PAIR, f"{QUERY}.lora_magnitude_vector.default.weight": torch.ones(9)},
        None,
        "has a magnitude of the shape (9,), expected [D_out, 1] or [1, D_in]",
    ),
    "a magnitude alone": ({f"diffusion_model.{QUERY}.dora_scale": torch.ones(128, 1)}, None, "lacks down and up"),
    "a magnitude of a difference": (
        {f"{QUERY}.diff": torch.ones(128, 128), f"{QUERY}.dora_scale": torch.ones(128, 1)},
        None,
        "holds magnitude without what it belongs to",
    ),
    "half a LoKr": ({"lycoris_img_in.lokr_w1": torch.ones(4, 4)}, None, "lacks lokr_w2"),
    "a LoKr twice": (
        {f"{QUERY}.{part}": torch.ones(8, 8) for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2")},
        None,
        "holds lokr_w1 twice, whole and as a product",
    ),
    "a LoKr that is no product": (
        {f"{QUERY}.{part}": torch.ones(8, 4) for part in ("lokr_w1", "lokr_w2_a", "lokr_w2_b")},
        None,
        "which have no product",
    ),
    "half a LoHa": (
        {"lycoris_transformer_blocks_0_attn_to_q.hada_w1_a": torch.ones(4, 4)},
        None,
        "lacks hada_w1_b and hada_w2_a and hada_w2_b",
    ),
    "a LoHa of two sizes": (
        {f"{QUERY}.hada_w{n}_{half}": torch.ones(4 * n if half == "a" else 4, 4) for n in (1, 2) for half in "ab"},
        None,
        "has two low-rank matrices of other sizes",
    ),
    "two methods": (
        {**PAIR, f"{QUERY}.lokr_w1": torch.ones(4, 4), f"{QUERY}.lokr_w2": torch.ones(32, 32)},
        None,
        "holds weights of LoKr and LoRA",
    ),
    "a Tucker LoKr": ({"lycoris_img_in.lokr_t2": torch.ones(4, 4)}, None, "holds Tucker weights"),
    "OFT": ({f"{QUERY}.oft_blocks": torch.ones(4, 4)}, None, "holds OFT weights"),
    "a difference of another shape": ({f"diffusion_model.{QUERY}.diff": torch.ones(4)}, None, "expected a matrix"),
    "a bias of another width": ({**PAIR, f"transformer.{QUERY}.lora_B.bias": torch.ones(9)}, None, "expected [D_out]"),
    "a bias of A": ({**PAIR, f"transformer.{QUERY}.lora_A.bias": torch.ones(4)}, None, "holds LoRA bias weights"),
    "scaled fp8": ({**PAIR, f"transformer.{QUERY}.lora_A.weight_scale": torch.ones(1)}, None, "holds scaled weights"),
    "a config of DoRA": (PAIR, config(r=4, lora_alpha=4, use_dora=True), "lacks the magnitude of a DoRA"),
    "a config of LoHa": (PAIR, config(peft_type="LOHA"), "holds LoRA weights, and l.safetensors: the header's"),
    "a config of OFT": (PAIR, config(peft_type="OFT"), "is of a OFT adapter"),
    "PiSSA": (PAIR, config(r=4, init_lora_weights="pissa_niter_16"), "which changes the base model too"),
    # configs that can't be
    "another rank": (PAIR, config(r=8, lora_alpha=8), "gives layer 'transformer_blocks.0.attn.to_q' the rank 8"),
    "alpha eight": (PAIR, config(lora_alpha="eight"), "lora_alpha must be a finite number, got 'eight'"),
    "alpha NaN": (PAIR, {HEADER_KEY: '{"transformer.lora_alpha": NaN}'}, "lora_alpha must be a finite number"),
    "alpha of a thousand digits": (PAIR, config(r=4, lora_alpha=10**1000), "lora_alpha must be a finite number"),
    "rslora in words": (PAIR, config(r=4, use_rslora="false"), "use_rslora must be true or false, got 'false'"),
    "rank true": (PAIR, config(r=True), "r must be a whole number"),
    "a pattern that is a list": (PAIR, config(r=4, alpha_pattern=[1]), "alpha_pattern must be an object of numbers"),
    "a pattern of texts": (PAIR, config(r=4, rank_pattern={"to_q": "x"}), "rank_pattern of 'to_q' must be"),
    "no regular expression": (PAIR, config(r=4, alpha_pattern={"(": 1}), "is no regular expression"),
    "an endless expression": (PAIR, config(r=4, alpha_pattern={"(a+)+$": 1}), "too complicated"),
    "no JSON": (PAIR, {HEADER_KEY: "{"}, "isn't a JSON object"),
    "JSON without end": (PAIR, {HEADER_KEY: "[" * 100_000}, "isn't a JSON object"),
    "a list": (PAIR, {HEADER_KEY: "[]"}, "isn't a JSON object, but list"),
    # other models
    "FLUX": ({"transformer.single_transformer_blocks.0.proj_out.lora_A.weight": PAIR[A]}, None, "layers of FLUX"),
    "FLUX of kohya": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": PAIR[A]}, None, "layers of FLUX"),
    "FLUX, flat": ({"lora_transformer_single_transformer_blocks_0_attn_to_q.alpha": PAIR[A]}, None, "layers of FLUX"),
    "SDXL": ({"lora_unet_down_blocks_0_attentions_0_proj_out.lora_down.weight": PAIR[A]}, None, "Stable Diffusion"),
    "Wan": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": PAIR[A]}, None, "layers of Wan"),
    "a text encoder": ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": PAIR[A]}, None, "of a text encoder"),
    "Qwen-Image-2.1": (
        {**PAIR, "transformer.transformer_blocks.0.img_mlp.gate_layer.lora_A.weight": PAIR[A].clone()},
        None,
        "holds layers of Qwen-Image-2.1",
    ),
    "Qwen-Image-2.1, flat": (
        {"lora_unet_transformer_blocks_3_img_mlp_gate_layer.lora_down.weight": PAIR[A]},
        None,
        "holds layers of Qwen-Image-2.1",
    ),
    "layered, by its header": (
        PAIR,
        {"modelspec.architecture": "Qwen-Image-Layered/lora"},
        "made for Qwen-Image-Layered",
    ),
    "2.1, by its header": (PAIR, {"modelspec.architecture": "qwen-image-2.1"}, "made for Qwen-Image-2.1"),
    "FLUX, by its header": (PAIR, {"ss_base_model_version": "flux1"}, "made for FLUX"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_in_one_sentence_in_every_use(case, components, tmp_path, capsys):
    held, header, message = REFUSED[case]
    path = tmp_path / "l.safetensors"
    save_file({name: value.clone() for name, value in held.items()}, path, header)
    uses = [
        lambda: load_weights(path, components),
        lambda: read_init_weights(path, TrainConfig(seed=0, rank=4)),
    ]
    for use in uses:
        with pytest.raises(UserError) as refused:
            use()
        assert message in str(refused.value)
        assert "l.safetensors" in str(refused.value) or "LoRA key" in str(refused.value)
    assert main([str(path), str(tmp_path / "out.safetensors")]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["l.safetensors"]


@pytest.mark.parametrize("name", ["2512", "qwen-image", "Qwen-Image/lora", "something of my own"])
def test_what_is_said_of_the_family_is_no_reason(name, tmp_path):
    save_file(PAIR, tmp_path / "l.safetensors", {"modelspec.architecture": name})
    assert read_weights(tmp_path / "l.safetensors")


def archive_of(path, meta):
    write_lora_file(path.with_suffix(".safetensors"), LoraFile({QUERY: LowRank(PAIR[A], PAIR[B], 4.0)}))
    with zipfile.ZipFile(path, "w") as packed:
        packed.write(path.with_suffix(".safetensors"), LORA_MEMBER)
        packed.writestr(META_MEMBER, meta if isinstance(meta, str | bytes) else json.dumps(meta))
    return path


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("{", "isn't JSON"),
        ("[" * 100_000, "isn't JSON"),
        (b"\xff\xfe\x00", "isn't JSON"),
        ([], "must be an object, got list"),
        ({"config": []}, "config can't be '[]'"),
        ({"rank": "four"}, "rank can't be 'four'"),
        ({"base_model": 7}, "base_model can't be '7'"),
        ({"placeholder": "x"}, "placeholder must be null or name a token"),
        ({"placeholder": {"token": ["<zwx>"], "sha256": "x"}}, "placeholder must be null or name a token"),
        ({"placeholder": [{"token": "<zwx>"}]}, "placeholder must be null or name a token"),
        ({"versions": 3}, "versions can't be '3'"),
    ],
)
def test_a_meta_json_that_cannot_be_is_refused(meta, message, tmp_path):
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("]", r"\]")):
        read_weights(archive_of(tmp_path / "w.zip", meta))


@pytest.mark.parametrize(
    ("trained_on", "outcome"),
    [
        ("black-forest-labs/FLUX.1-dev", "a FLUX model"),
        ("Qwen/Qwen-Image-Edit-2509", "warning"),
        ("Qwen/Qwen-Image-Layered", "a Qwen-Image-Layered model"),
        ("Qwen/Qwen-Image-2.1", "a Qwen-Image-2.1 model"),
        ("Qwen/Qwen-Image-2512", "warning"),
        ("Qwen/Qwen-Image", "warning"),
        ("the same", None),
        (None, None),
    ],
)
def test_weights_of_another_base_are_warned_of_and_of_another_kind_refused(
    trained_on, outcome, tmp_path, random_model, caplog
):
    meta = Meta(base_model=f"/elsewhere/{random_model.name}" if trained_on == "the same" else trained_on)
    path = archive_of(tmp_path / "w.zip", meta.to_json())
    if outcome in (None, "warning"):
        read_weights(path)
        assert (f"was trained on {str(trained_on).rpartition('/')[2]}, and the base model is" in caplog.text) == (
            outcome == "warning"
        )
        return
    with pytest.raises(UserError, match=outcome):
        read_weights(path)


# --- convert --------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, random_model):
    layers = {n: LowRank(a, b, 2.0) for n, (a, b) in judge.pairs(random_model, [QUERY, "img_in"]).items()}
    path = tmp_path / "source.safetensors"
    write_lora_file(path, LoraFile(layers, {"<zwx>": torch.randn(1, 128)}), "diffusers", torch.float32)
    return path


def test_fp16_refuses_what_it_cannot_hold_and_writes_nothing(tmp_path, capsys):
    save_file({A: PAIR[A], B: PAIR[B] * 1e6}, tmp_path / "big.safetensors")
    assert main([str(tmp_path / "big.safetensors"), str(tmp_path / "half.safetensors"), "--dtype", "fp16"]) == 1
    assert "holds 1e+06, which torch.float16 can't; convert to bf16 or fp32" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["big.safetensors"]


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_a_missing_folder_or_source_is_named(layout, source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "no" / "l.safetensors"), "--to", layout]) == 1
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err
    assert main([str(tmp_path / "none.zip"), str(tmp_path / "l.safetensors"), "--to", layout]) == 1
    assert f"there is no file {tmp_path / 'none.zip'}" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya", "diffsynth", "lycoris"])
def test_the_tokens_embedding_goes_only_where_readers_take_it(layout, source, tmp_path, capsys):
    from diffusers import QwenImagePipeline  # noqa: PLC0415

    target, apart = tmp_path / "out.safetensors", tmp_path / "out.embeddings.safetensors"
    assert main([str(source), str(target), "--to", layout]) == 0
    said = capsys.readouterr().out
    held = [key for key in load_file(target) if key.startswith("bundle_emb")]
    if layout == "diffusers":
        assert len(held) == 1
        assert not apart.exists()
    else:
        assert not held
        assert torch.equal(*(load_file(path)["bundle_emb.<zwx>.lora.qwen25_7b"] for path in (apart, source)))
        assert f"wrote {apart}: the embeddings of <zwx>" in said
    if layout in ("diffusers", "comfyui", "kohya", "diffsynth"):
        assert QwenImagePipeline.lora_state_dict(target)


def test_pefts_layout_is_a_folder_that_peft_loads(source, random_model, tmp_path):
    target = tmp_path / "adapter"
    assert main([str(source), str(target), "--to", "peft", "--dtype", "fp32"]) == 0
    assert {path.name for path in target.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    adapted = PeftModel.from_pretrained(judge.stock(random_model), str(target))
    lora = judge.pairs(random_model, [QUERY, "img_in"])
    base = judge.truth(judge.stock(random_model))
    want = judge.merged(random_model, {name: b @ a * 0.5 for name, (a, b) in lora.items()})
    assert judge.error(judge.truth(adapted.base_model.model), want, base) <= 2e-4
    again, _ = read_weights(target)
    assert set(again.layers) == {QUERY, "img_in"}


def test_a_layer_of_another_rank_survives_pefts_layout(random_model, tmp_path):
    lora = judge.pairs(random_model, [QUERY, "img_in"])
    narrow = replace(LowRank(*lora["img_in"], 4.0), down=lora["img_in"][0][:2], up=lora["img_in"][1][:, :2], alpha=3.0)
    write_lora_file(tmp_path / "l.safetensors", LoraFile({QUERY: LowRank(*lora[QUERY], 4.0), "img_in": narrow}))
    assert main([str(tmp_path / "l.safetensors"), str(tmp_path / "folder"), "--to", "peft"]) == 0
    adapted = PeftModel.from_pretrained(judge.stock(random_model), str(tmp_path / "folder"))
    assert {layer.rank for layer in read_weights(tmp_path / "folder")[0].layers.values()} == {2, 4}
    assert adapted.base_model.model.img_in.scaling == {"default": 1.0}
