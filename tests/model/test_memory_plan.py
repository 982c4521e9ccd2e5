"""Plans: what a GPU runs with, from arithmetic alone, as README's table says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLTextConfig

from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.model import memory, memory_plan
from lora_utils.model.device import default_placement
from lora_utils.training import loop
from lora_utils.training.setup import setup

README = Path(__file__).parent.parent / "README.md"
QWEN_IMAGE = {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}
QWEN_TEXT = Qwen2_5_VLTextConfig(
    hidden_size=3584,
    num_hidden_layers=28,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)
TRANSFORMER = memory_plan.transformer_bytes(QWEN_IMAGE, 2, table=True)
TEXT = memory_plan.text_encoder_bytes(QWEN_TEXT, 2)
TEXT_TOKENS = 128
CARDS = (16, 24, 48, 80, 141)  # GB


def size_of(side_px):
    return memory_plan.step_size(TrainConfig(seed=0), QWEN_IMAGE, side_px**2 // 256 + TEXT_TOKENS, 2)


def demand(free, side_px=1024):
    size = size_of(side_px)
    return memory_plan.MemoryEstimate(free, TEXT, TRANSFORMER, size.needed_bytes(60) + 4.0 * size.lora_parameters, 506)


def recomputed(chosen, free, side_px, live_text):
    """Of 60, with what is left when all is loaded."""
    size, stays = size_of(side_px), live_text and chosen.text_encoder_on_device
    left = free - TRANSFORMER[chosen.quantization] - 4.0 * size.lora_parameters - TEXT * stays
    return memory.blocks_to_recompute(size, left)


def test_the_real_model_is_as_large_as_is_known():
    whole = memory_plan.transformer_bytes(QWEN_IMAGE, 2, table=False)
    assert whole["none"] == 2 * 20_430_401_088
    assert TRANSFORMER["none"] / 1e9 == pytest.approx(27.3, abs=0.1)
    assert pytest.approx(14.1, abs=0.1) == TEXT / 1e9
    assert size_of(1024).lora_parameters == 94_371_840


def test_readme_says_what_each_card_runs_with():
    for card in CARDS:
        cells = [f"{card} GB"]
        for live_text in (False, True):
            chosen = memory_plan.choose("auto", demand(card * 1e9), live_text)
            counts = [recomputed(chosen, card * 1e9, side_px, live_text) for side_px in (512, 1024)]
            cells.append({"none": "bf16"}.get(chosen.quantization, chosen.quantization))
            if live_text:
                cells.append("GPU" if chosen.text_encoder_on_device else "host")
            cells.append(" / ".join(map(str, counts)))
        line = f"| {' | '.join(cells)} |"
        print(line)
        assert line in README.read_text()


def test_an_exact_base_comes_before_a_rounded_one_and_eight_bits_before_four():
    order = ("nf4", "fp8", "none")
    for live_text in (False, True):
        ranks = [
            order.index(memory_plan.choose("auto", demand(gb * 1e9), live_text).quantization) for gb in (16, 22, 48, 80)
        ]
        assert ranks == sorted(ranks)
        assert ranks[0] == 0
        assert ranks[-1] == 2


def test_a_scheme_that_was_asked_for_is_taken_and_int8_never_by_itself():
    assert memory_plan.choose("int8", demand(141e9), live_text=True).quantization == "int8"
    assert memory_plan.choose("none", demand(34e9), live_text=False).quantization == "none"
    taken = {memory_plan.choose("auto", demand(gb * 1e9), live_text=False).quantization for gb in range(16, 142)}
    assert taken == {"none", "fp8", "nf4"}


def test_a_card_that_is_too_small_is_refused_with_the_numbers_and_the_way_out():
    with pytest.raises(
        UserError, match=r"needs 16 GB \(the model in nf4 10\.5, a step 4\.03.*12 GB are free; lower resolution"
    ):
        memory_plan.choose("auto", demand(12e9), live_text=False)
    with pytest.raises(UserError, match="set quantization to auto"):
        memory_plan.choose("none", demand(24e9), live_text=False)


def test_a_larger_picture_needs_more():
    assert memory_plan.choose("auto", demand(32e9, 512), live_text=False).quantization == "none"
    assert memory_plan.choose("auto", demand(32e9, 1024), live_text=False).quantization == "fp8"


def of_several(cards, free):
    shared = memory_plan.sharded_bytes(TRANSFORMER["none"], 60, cards)
    return replace(demand(free), transformer={**TRANSFORMER, memory_plan.SHARDED: shared})


def test_several_small_cards_share_out_what_one_would_round():
    assert memory_plan.choose("auto", of_several(2, 24e9), False, shard_base="auto") == memory_plan.MemoryPlan(
        "none", True, sharded=True
    )
    assert memory_plan.choose("auto", of_several(2, 24e9), False, shard_base="never").quantization == "fp8"
    assert memory_plan.choose("auto", of_several(4, 16e9), False, shard_base="auto").sharded
    assert memory_plan.choose("auto", of_several(2, 16e9), False, shard_base="auto").quantization == "nf4"
    assert not memory_plan.choose("auto", of_several(2, 80e9), False, shard_base="auto").sharded, "it fits on one"
    assert not memory_plan.choose("auto", demand(80e9), False, shard_base="always").sharded, "there is only one"


def test_sharding_is_had_by_asking_and_rounding_excludes_it():
    assert memory_plan.choose("none", of_several(2, 80e9), False, shard_base="always").sharded
    assert memory_plan.choose("none", of_several(2, 24e9), False, shard_base="auto").sharded
    assert memory_plan.choose("fp8", of_several(2, 24e9), False, shard_base="auto") == memory_plan.MemoryPlan(
        "fp8", True
    )
    with pytest.raises(UserError, match="set quantization to auto, not fp8"):
        memory_plan.choose("fp8", of_several(2, 24e9), False, shard_base="always")


def test_what_is_chosen_is_said_with_the_reason():
    several = of_several(2, 24e9)
    told = " ".join(
        memory_plan.describe_plan(memory_plan.choose("auto", several, False, shard_base="auto"), "auto", several)
    )
    assert "the transformer in parts on several GPUs takes 14.5" in told
    assert "quantised" not in told
    told = " ".join(memory_plan.describe_plan(memory_plan.choose("auto", demand(24e9), True), "auto", demand(24e9)))
    assert "24 GB free" in told
    assert "a table of 506 timesteps stands in for the modulations" in told
    assert "quantised to fp8 because it doesn't fit otherwise" in told
    assert "the text encoder runs on the CPU" in told
    told = " ".join(memory_plan.describe_plan(memory_plan.choose("nf4", demand(80e9), True), "nf4", demand(80e9)))
    assert "quantised to nf4 as asked" in told
    assert "host" not in told


CONFIG = TrainConfig(
    steps=4, rank=4, learning_rate=1e-3, batch_size=2, resolution="64", seed=0, train_placeholder_token=True
)


def test_a_run_follows_its_plan_and_writes_down_what_it_came_to(dataset, random_model, monkeypatch, caplog):
    caplog.set_level("INFO", "lora_utils")
    monkeypatch.setattr(memory, "SPARE_BYTES", 0.0)
    exact = memory_plan.training_estimate(CONFIG, random_model, torch.device("cpu"), torch.float32, 2 * (16 + 60), None)
    room = exact.needed("fp8", with_text_encoder=True) * 1.02
    assert room < exact.needed("none", with_text_encoder=True)
    monkeypatch.setattr(memory, "free_bytes", lambda _device: room)
    run = setup(CONFIG, dataset, random_model, default_placement(), any_timestep=True)
    assert run.config.quantization == "fp8"
    assert "quantised to fp8 because" in caplog.text
    list(loop.train(run))


def test_a_text_encoder_on_the_host_trains_the_same_row(dataset, random_model, monkeypatch):
    rows = []
    for on_card in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(
                memory_plan, "choose", lambda *_, on_card=on_card, **_named: memory_plan.MemoryPlan("none", on_card)
            )
            run = setup(CONFIG, dataset, random_model, default_placement())
        list(loop.train(run))
        rows.append(run.placeholders.embeddings[0].detach().clone())
        assert run.components.text_encoder is not None
        assert next(run.components.text_encoder.parameters()).device.type == "cpu"
    assert torch.equal(*rows)


def test_the_caption_counts_into_the_demand(random_model):
    device, few = torch.device("cpu"), 2 * 80
    sizes = [
        memory_plan.training_estimate(CONFIG, random_model, device, torch.float32, few * k, None).step for k in (1, 2)
    ]
    assert sizes[1] > sizes[0]
    larger = memory_plan.training_estimate(replace(CONFIG, rank=32), random_model, device, torch.float32, few, None)
    assert larger.step > sizes[0]


# --- prediction -----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_configs(tmp_path):
    """The real model's configs, without its weights: enough for arithmetic."""
    text = {"text_config": QWEN_TEXT.to_dict()}
    for part, config in (("transformer", QWEN_IMAGE), ("text_encoder", text), ("vae", {"base_dim": 96})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    return tmp_path


def placement(folder, free_gb, asked="auto"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda _device: free_gb * 1e9)
        return memory_plan.choose_sampling_plan(asked, folder, torch.device("cpu"), torch.bfloat16)


def test_readme_says_how_each_card_predicts(real_configs):
    for card, sentence in {
        80: "bf16, all of it on the GPU",
        48: "bf16, the text encoder on the CPU",
        32: "fp8, the text encoder on the CPU",
        24: "nf4, the text encoder on the CPU",
    }.items():
        chosen = placement(real_configs, card)
        where = "all of it on the GPU" if chosen.text_encoder_on_device else "the text encoder on the CPU"
        assert f"{chosen.quantization.replace('none', 'bf16')}, {where}" == sentence
        assert f"| {card} GB | {sentence} |" in README.read_text()


def test_a_card_that_is_too_small_to_predict_is_refused_and_a_strange_scheme_too(real_configs):
    with pytest.raises(UserError, match=r"prediction needs 20\.9 GB with the model in nf4, and 16 GB are free"):
        placement(real_configs, 16)
    with pytest.raises(UserError, match="set QUANTIZATION to auto"):
        placement(real_configs, 32, "none")
    with pytest.raises(UserError, match="QUANTIZATION must be one of auto, none, fp8, int8, nf4, got 'fp4'"):
        placement(real_configs, 80, "fp4")
    assert placement(real_configs, 141, "int8") == memory_plan.MemoryPlan("int8", text_encoder_on_device=True)
    assert placement(real_configs, 30, "int8") == memory_plan.MemoryPlan("int8", text_encoder_on_device=False)
