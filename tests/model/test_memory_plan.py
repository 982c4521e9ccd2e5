"""Plans: what a GPU runs with, from arithmetic alone, as README's table says."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLTextConfig

from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.model import flops, memory, memory_estimate, memory_plan, roofline
from lora_utils.model.device import Placement, default_placement
from lora_utils.model.memory_estimate import Room
from lora_utils.training import loop
from lora_utils.training.optimizers import bytes_per_weight
from lora_utils.training.recompute import probe_batch
from tests.helpers import ROOT, make_state

MEMORY_PAGE = ROOT / "docs" / "memory.md"
QWEN_IMAGE = {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}
QWEN_TEXT = Qwen2_5_VLTextConfig(
    hidden_size=3584,
    num_hidden_layers=28,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)
COUNTS = memory_estimate.count_weights(QWEN_IMAGE)
TRANSFORMER = memory_estimate.transformer_bytes(COUNTS, 2, table=True)
TEXT = memory_estimate.text_encoder_bytes(QWEN_TEXT, 2)
TEXT_TOKENS = 128
GPUS = (16, 24, 48, 80, 141)  # GB


def size_of(side_px):
    return memory_estimate.step_size(TrainConfig(seed=0), QWEN_IMAGE, side_px**2 // 256 + TEXT_TOKENS, 2)


def estimate_of(config, folder, tokens):
    shapes = memory_estimate.read_shapes(folder)
    step = memory_estimate.step_size(config, shapes.transformer, tokens, 4, bytes_per_weight(config))
    return memory_estimate.training_estimate(shapes, step, None, Room(default_placement(), 1e12))


def demand(free, side_px=1024):
    return demand_of(size_of(side_px), free)


def demand_of(size, free):
    work = size.needed_bytes(60) + 4.0 * size.lora_parameters
    return memory_estimate.MemoryEstimate(free, TEXT, TRANSFORMER, work, 506, ram_free=1e12)


def checkpointed(chosen, free, side_px, live_text):
    return checkpointed_of(chosen, free, size_of(side_px), live_text)


def checkpointed_of(chosen, free, size, live_text):
    """Of 60, with what is left when all is loaded."""
    stays = live_text and chosen.text_encoder_on_device
    left = free - TRANSFORMER[chosen.quantization] - 4.0 * size.lora_parameters - TEXT * stays
    return memory.blocks_to_checkpoint(size, left)


def test_the_real_model_is_as_large_as_is_known():
    whole = memory_estimate.transformer_bytes(COUNTS, 2, table=False)
    assert whole["none"] == 2 * 20_430_401_088
    assert TRANSFORMER["none"] / 1e9 == pytest.approx(27.3, abs=0.1)
    assert pytest.approx(14.1, abs=0.1) == TEXT / 1e9
    assert size_of(1024).lora_parameters == 106_168_320


def test_the_docs_say_what_each_gpu_runs_with():
    for gpu in GPUS:
        cells = [f"{gpu} GB"]
        for live_text in (False, True):
            chosen = memory_plan.choose_training_plan("auto", demand(gpu * 1e9), live_text)
            counts = [checkpointed(chosen, gpu * 1e9, side_px, live_text) for side_px in (512, 1024)]
            cells.append({"none": "bf16"}.get(chosen.quantization, chosen.quantization))
            if live_text:
                cells.append("GPU" if chosen.text_encoder_on_device else "CPU")
            cells.append(" / ".join(map(str, counts)))
        line = f"| {' | '.join(cells)} |"
        print(line)
        assert line in MEMORY_PAGE.read_text()


def test_an_exact_base_comes_before_a_rounded_one_and_eight_bits_before_four():
    order = ("nf4", "fp8", "none")
    for live_text in (False, True):
        ranks = [
            order.index(memory_plan.choose_training_plan("auto", demand(gb * 1e9), live_text).quantization)
            for gb in (16, 22, 48, 80)
        ]
        assert ranks == sorted(ranks)
        assert ranks[0] == 0
        assert ranks[-1] == 2


def test_a_scheme_that_was_asked_for_is_taken_and_int8_never_by_itself():
    assert memory_plan.choose_training_plan("int8", demand(141e9), live_text=True).quantization == "int8"
    assert memory_plan.choose_training_plan("none", demand(34e9), live_text=False).quantization == "none"
    taken = {
        memory_plan.choose_training_plan("auto", demand(gb * 1e9), live_text=False).quantization
        for gb in range(16, 142)
    }
    assert taken == {"none", "fp8", "nf4"}


def test_a_gpu_that_is_too_small_is_refused_with_the_numbers_and_the_way_out():
    with pytest.raises(
        UserError,
        match=r"needs 15\.9 GB \(the model in nf4 10\.5, a step at least 3\.93.*12 GB are free; lower resolution",
    ):
        memory_plan.choose_training_plan("auto", demand(12e9), live_text=False)
    with pytest.raises(UserError, match="set quantization to auto"):
        memory_plan.choose_training_plan("none", demand(24e9), live_text=False)


def test_a_larger_image_needs_more():
    assert memory_plan.choose_training_plan("auto", demand(32e9, 512), live_text=False).quantization == "none"
    assert memory_plan.choose_training_plan("auto", demand(32e9, 1024), live_text=False).quantization == "fp8"


def of_several(gpus, free):
    shared = memory_estimate.sharded_bytes(TRANSFORMER["none"], 60, gpus)
    return replace(demand(free), transformer={**TRANSFORMER, memory_estimate.SHARDED: shared})


def test_several_small_gpus_share_out_what_one_would_round():
    assert memory_plan.choose_training_plan(
        "auto", of_several(2, 24e9), False, shard_base="auto"
    ) == memory_plan.MemoryPlan("none", True, sharded=True)
    assert (
        memory_plan.choose_training_plan("auto", of_several(2, 24e9), False, shard_base="never").quantization == "fp8"
    )
    assert memory_plan.choose_training_plan("auto", of_several(4, 16e9), False, shard_base="auto").sharded
    assert memory_plan.choose_training_plan("auto", of_several(2, 16e9), False, shard_base="auto").quantization == "nf4"
    assert not memory_plan.choose_training_plan("auto", of_several(2, 80e9), False, shard_base="auto").sharded, (
        "it fits on one"
    )
    assert not memory_plan.choose_training_plan("auto", demand(80e9), False, shard_base="always").sharded, (
        "there is only one"
    )


def test_sharding_is_had_by_asking_and_rounding_excludes_it():
    assert memory_plan.choose_training_plan("none", of_several(2, 80e9), False, shard_base="always").sharded
    assert memory_plan.choose_training_plan("none", of_several(2, 24e9), False, shard_base="auto").sharded
    assert memory_plan.choose_training_plan(
        "fp8", of_several(2, 24e9), False, shard_base="auto"
    ) == memory_plan.MemoryPlan("fp8", True)
    with pytest.raises(UserError, match="set quantization to auto, not fp8"):
        memory_plan.choose_training_plan("fp8", of_several(2, 24e9), False, shard_base="always")


def test_what_is_chosen_is_said_with_the_reason():
    several = of_several(2, 24e9)
    output = " ".join(
        memory_plan.describe_plan(
            memory_plan.choose_training_plan("auto", several, False, shard_base="auto"), "auto", several
        )
    )
    assert "the transformer in parts on several GPUs takes 14.5" in output
    assert "quantised" not in output
    output = " ".join(
        memory_plan.describe_plan(memory_plan.choose_training_plan("auto", demand(24e9), True), "auto", demand(24e9))
    )
    assert "24 GB free" in output
    assert "a table of 506 timesteps replaces the modulations" in output
    assert "quantised to fp8 because it doesn't fit otherwise" in output
    assert "the text encoder runs on the CPU" in output
    output = " ".join(
        memory_plan.describe_plan(memory_plan.choose_training_plan("nf4", demand(80e9), True), "nf4", demand(80e9))
    )
    assert "quantised to nf4 as asked" in output
    assert "CPU" not in output


CONFIG = TrainConfig(
    steps=4, rank=4, learning_rate=1e-3, batch_size=2, resolution="64", seed=0, train_placeholder_token=True
)


def test_a_run_follows_its_plan_and_writes_down_what_it_came_to(dataset, random_model, monkeypatch, caplog):
    caplog.set_level("INFO", "lora_utils")
    monkeypatch.setattr(memory, "SPARE_BYTES", 0.0)
    exact = estimate_of(CONFIG, random_model, 2 * (16 + 60))
    room = exact.needed("nf4", with_text_encoder=True) * 1.02
    assert room < exact.needed("none", with_text_encoder=True)
    monkeypatch.setattr(memory_estimate, "free_bytes", lambda _device: room)
    run = make_state(CONFIG, dataset, random_model, any_timestep=True)
    assert run.resolved_config.quantization == "nf4"
    assert run.config.quantization == "auto"
    assert "quantised to nf4 because" in caplog.text
    list(loop.train(run))


def test_a_text_encoder_on_the_cpu_trains_the_same_embedding(dataset, random_model, monkeypatch):
    rows = []
    for on_gpu in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(
                memory_plan,
                "choose_training_plan",
                lambda *_, on_gpu=on_gpu, **_named: memory_plan.MemoryPlan("none", on_gpu),
            )
            run = make_state(CONFIG, dataset, random_model)
        list(loop.train(run))
        rows.append(run.placeholders.embeddings[0].detach().clone())
        assert run.components.text_encoder is not None
        assert next(run.components.text_encoder.parameters()).device.type == "cpu"
    assert torch.equal(*rows)


def test_the_caption_counts_into_the_estimate(random_model):
    short, long = (estimate_of(CONFIG, random_model, 2 * 80 * factor).work for factor in (1, 2))
    assert long > short
    assert estimate_of(replace(CONFIG, rank=32), random_model, 2 * 80).work > short


def test_the_largest_batch_is_counted_once_by_tokens(dataset, random_model):
    """Plan, probe and step size speak of one batch, whose caption is the longest by tokens, not by letters."""
    rare = "zzz qqq " * 6  # few letters, many tokens
    wordy = "a photograph of a photograph of a photograph of a photograph on a photograph background"
    examples = [replace(dataset.examples[0], caption=rare), replace(dataset.examples[1], caption=wordy)]
    config = replace(CONFIG, train_placeholder_token=False, batch_size=3, caption_dropout=0.0)
    run = make_state(config, replace(dataset, examples=examples), random_model)
    assert len(rare) < len(wordy)
    tokens = {caption: len(text) for caption, text in run.data.texts.items()}
    assert tokens[rare] > tokens[wordy]
    assert run.largest.caption == rare
    assert run.largest.text_tokens == tokens[rare] == run.data.text_tokens[rare]
    assert run.largest.step_size.tokens == 3 * (16 + tokens[rare])
    probe = probe_batch(run)
    assert (probe.captions, probe.noisy.shape) == ((rare,) * 3, (3, 16, 64))


def test_captions_that_hold_the_class_count_into_the_largest_batch(dataset, random_model):
    config = replace(CONFIG, class_word="a very long name of a class of things", preservation_weight=0.5)
    plain, with_class = (make_state(each, dataset, random_model) for each in (CONFIG, config))
    assert with_class.largest.text_tokens > plain.largest.text_tokens
    assert with_class.largest.text_tokens == max(with_class.data.text_tokens.values())


# --- prediction -----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_configs(tmp_path):
    """The real model's configs, with one weight of each part: enough for arithmetic."""
    text = {"text_config": QWEN_TEXT.to_dict()}
    for part, config in (("transformer", QWEN_IMAGE), ("text_encoder", text), ("vae", {"base_dim": 96})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
        weights = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file({"first": torch.zeros(1, dtype=torch.bfloat16)}, tmp_path / part / f"{weights}.safetensors")
    return tmp_path


def plan_of(folder, free_gb, asked="auto"):
    shapes = memory_estimate.read_shapes(folder)
    gpu = Placement(torch.device("cuda"), torch.bfloat16)
    estimate = memory_estimate.sampling_estimate(shapes, Room(gpu, free_gb * 1e9, ram_free=1e12))
    return memory_plan.choose_sampling_plan(asked, estimate)


def test_the_docs_say_how_each_gpu_predicts(real_configs):
    for gpu, sentence in {
        80: "bf16, all of it on the GPU",
        48: "bf16, all of it on the GPU",
        32: "bf16, the text encoder on the CPU",
        24: "fp8, the text encoder on the CPU",
        16: "nf4, the text encoder on the CPU",
    }.items():
        chosen = plan_of(real_configs, gpu)
        where = "all of it on the GPU" if chosen.text_encoder_on_device else "the text encoder on the CPU"
        assert f"{chosen.quantization.replace('none', 'bf16')}, {where}" == sentence
        assert f"| {gpu} GB | {sentence} |" in MEMORY_PAGE.read_text()


CARDS_GB = {"A100": 80, "RTX 4090": 24, "A10G": 24, "L40S": 48, "H100": 80, "H200": 141}


def row_gb(gpu):
    """The sizes of GPUs that a row of README's table is about."""
    return (80, 141) if gpu == 80 else (gpu,)


def predicted_s(name, gb):
    """A step without the token at 1024x1024, as a GPU of this size would run it."""
    (gpu,) = [each for each in roofline.GPUS if each.name == name]
    size, estimate = size_of(1024), demand(gb * 1e9)
    targets, parameters = TrainConfig(seed=0).lora_targets, size.lora_parameters
    step = roofline.Step(flops.Shape(60, 3072, 64, 3584), 4096, TEXT_TOKENS, targets, parameters)
    timing = memory_plan.Timing(gpu, step, size, 1000)
    plan = memory_plan.choose_training_plan("auto", estimate, False, timing)
    return plan.predicted_s


def test_readme_sums_both_tables_up(real_configs):
    for gpu, row in {16: "16 GB", 24: "24 GB", 48: "48 GB", 80: "80 GB and more"}.items():
        trains = memory_plan.choose_training_plan("auto", demand(gpu * 1e9), True)
        cells = [trains.quantization.replace("none", "bf16")]
        cells += [] if trains.text_encoder_on_device else ["text encoder on the CPU"]
        cells += [] if checkpointed(trains, gpu * 1e9, 1024, True) else ["no activation checkpointing"]
        try:
            predicts = plan_of(real_configs, gpu)
            where = "all of it on the GPU" if predicts.text_encoder_on_device else "text encoder on the CPU"
            prediction = f"{predicts.quantization.replace('none', 'bf16')}, {where}"
        except UserError:
            prediction = "too small"
        own = {name: gb for name, gb in CARDS_GB.items() if gb in row_gb(gpu)}
        seconds = ", ".join(f"{name} {predicted_s(name, gb):.2f}" for name, gb in own.items())
        line = f"| {row} | {', '.join(cells)} | {prediction} | {seconds} |".replace("|  |", "| |")
        print(line)
        assert line in (ROOT / "README.md").read_text()


def test_a_gpu_that_is_too_small_to_predict_is_refused_and_a_strange_scheme_too(real_configs):
    message = r"prediction needs 14\.5 GB \(the model in nf4 10\.5, an image of the official size 2\.5.*12 GB are free"
    with pytest.raises(UserError, match=message):
        plan_of(real_configs, 12)
    with pytest.raises(UserError, match="set QUANTIZATION to auto"):
        plan_of(real_configs, 24, "none")
    with pytest.raises(UserError, match="QUANTIZATION must be one of auto, none, fp8, int8, nf4, got 'fp4'"):
        plan_of(real_configs, 80, "fp4")
    assert plan_of(real_configs, 141, "int8") == memory_plan.MemoryPlan("int8", text_encoder_on_device=True)
    assert plan_of(real_configs, 30, "int8") == memory_plan.MemoryPlan("int8", text_encoder_on_device=False)
