"""Each optimizer learns, keeps what it promises of memory, and goes on bit for bit; averages are averages."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lora_utils.config import TrainConfig, TrainInputs, declared_inputs, from_inputs
from lora_utils.errors import UserError
from lora_utils.model import memory_estimate
from lora_utils.options import option_of
from lora_utils.presets import PRESETS, Preset, preset_for
from lora_utils.training import loop, muon
from lora_utils.training.checkpoint import read_checkpoint, restore_checkpoint, save_checkpoint
from lora_utils.training.optimizers import bytes_per_weight, new_optimizers
from lora_utils.training.run import describe_goal
from lora_utils.training.state import TrainState, describe_placeholders, final_lora
from tests.helpers import losses, make_state, same_result

OPTIMIZERS = next(option_of(each).choices for each in declared_inputs(TrainInputs) if each.name == "optimizer")
CONFIG = TrainConfig(
    steps=12,
    rank=4,
    learning_rate=1e-3,
    batch_size=4,
    resolution="64",
    seed=0,
    train_placeholder_token=True,
    lora_targets="attention_mlp",
    caption_dropout=0.0,
    validation_share=0.2,
)
# bitsandbytes keeps 32 bits of a matrix with fewer than 4096 weights: at rank 64 these have as many
RANKS = {"adamw8bit": 64}
RATES = {"adamw": 3e-3, "adamw8bit": 3e-3, "adafactor": 3e-3, "prodigy": 1.0, "muon": 3e-3}


@pytest.fixture
def new_run(dataset, random_model):
    def make(**given) -> TrainState:
        return make_state(replace(CONFIG, **given), dataset, random_model)

    return make


def with_gradients(*shapes):
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    return weights


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_the_images(optimizer, new_run):
    rank = RANKS.get(optimizer, 4)
    run = new_run(optimizer=optimizer, learning_rate=RATES[optimizer], steps=60, rank=rank, validation_share=0.0)
    curve = losses(run)
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])
    assert run.optimizers.rate > 1e-4  # prodigy, which starts from 1e-6, has found one


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_is_resumed_bit_for_bit_with_every_optimizer_and_its_average(optimizer, new_run, tmp_path):
    given = {
        "optimizer": optimizer,
        "learning_rate": RATES[optimizer],
        "ema_decay": 0.8,
        "warmup_steps": 3,
        "rank": RANKS.get(optimizer, 4),
    }
    whole = new_run(**given)
    expected = losses(whole)
    first = new_run(**given)
    before = losses(first, 7)
    path = save_checkpoint(first, tmp_path, keep=1)
    second = new_run(**given)
    restore_checkpoint(second, read_checkpoint(path))
    assert before + losses(second) == expected
    assert same_result(whole, second)
    if optimizer == "adamw8bit":
        kept, _ = second.optimizers.state_dict()
        assert any(tensor.dtype == torch.uint8 for tensor in kept.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trying_out_moves_nothing_and_leaves_nothing(optimizer):
    weights = with_gradients((64, 128), (8, 8))
    row = torch.ones(16, requires_grad=True)
    row.grad = torch.full((16,), torch.inf)
    tried = new_optimizers(replace(CONFIG, optimizer=optimizer), weights, (row,), 5e-4)
    groups = [{**group, "params": None} for group in tried.lora.param_groups]
    before = [weight.detach().clone() for weight in (*weights, row)]
    tried.try_out()
    assert all(torch.equal(weight, old) for weight, old in zip((*weights, row), before, strict=True))
    assert not tried.lora.state
    assert [{**group, "params": None} for group in tried.lora.param_groups] == groups


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_memory_plan_knows_what_an_optimizer_keeps(optimizer):
    """Of matrices as large as a LoRA's of rank 32 on Qwen-Image."""
    weights = with_gradients((32, 3072), (3072, 32))
    config = replace(CONFIG, optimizer=optimizer, ema_decay=0.99)
    kept = new_optimizers(config, weights, (), 0.0)
    kept.step(1.0)
    tensors, _ = kept.state_dict()
    held = sum(tensor.nbytes for tensor in tensors.values()) + sum(weight.grad.nbytes for weight in weights)
    assert held / sum(weight.numel() for weight in weights) == pytest.approx(bytes_per_weight(config), rel=0.02)


def test_the_plan_counts_the_optimizer():
    transformer = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 60}
    sizes = {
        name: memory_estimate.step_size(config, transformer, 4224, 2, bytes_per_weight(config)).needed_bytes(0)
        for name, config in ((name, replace(CONFIG, optimizer=name)) for name in OPTIMIZERS)
    }
    assert sizes["adafactor"] < sizes["adamw8bit"] < sizes["muon"] < sizes["adamw"] < sizes["prodigy"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_tokens_embedding_has_an_adamw_of_its_own_without_decay(optimizer, new_run):
    run = new_run(optimizer=optimizer, weight_decay=0.5)
    (group,) = run.optimizers.embeddings.param_groups
    assert type(run.optimizers.embeddings) is AdamW
    assert group["weight_decay"] == 0
    assert group["betas"] == (0.9, 0.999)
    assert run.optimizers.lora.param_groups[0]["weight_decay"] == 0.5


def test_betas_and_decay_are_the_callers():
    (weight,) = with_gradients((4, 4))
    ours = new_optimizers(replace(CONFIG, beta1=0.5, beta2=0.6, weight_decay=0.1), [weight], (), 0.0)
    (same,) = with_gradients((4, 4))
    torchs = AdamW([same], lr=CONFIG.learning_rate, betas=(0.5, 0.6), weight_decay=0.1)
    for _ in range(3):
        ours.step(1.0)
        torchs.step()
    assert torch.allclose(weight, same, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (8, 8)])
def test_muon_steps_as_torchs_does(shape, monkeypatch):
    monkeypatch.setattr(muon, "MOST_AT_ONCE", 2 * 8 * 32)
    ours, torchs = ([nn.Parameter(torch.zeros(shape)) for _ in range(5)] for _ in range(2))
    rates = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = muon.Muon(ours, **rates), torch.optim.Muon(torchs, adjust_lr_fn="match_rms_adamw", **rates)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for own, theirs in zip(ours, torchs, strict=True):
            own.grad = torch.randn(shape, generator=generator)
            theirs.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for own, theirs in zip(ours, torchs, strict=True):
        assert theirs.norm() > 0
        assert (own - theirs).norm() < 0.03 * theirs.norm(), "torch's iterates in bf16"


@pytest.mark.parametrize("adapter", ["lora", "lokr"])
def test_muon_moves_all_that_adamw_moves(adapter, new_run):
    def moved(optimizer):
        run = new_run(optimizer=optimizer, learning_rate=1e-3, adapter=adapter, weight_decay=0.0, steps=2)
        before = [weight.detach().clone() for weight in run.lora]
        losses(run)
        return [not torch.equal(weight, old) for weight, old in zip(run.lora, before, strict=True)]

    assert moved("muon") == moved("adamw")
    assert sum(moved("muon")) >= 40, "all but what only the last block's text would need"


def test_muon_moves_all_directions_alike_and_by_a_fifth_of_the_rate():
    (weight,) = with_gradients((16, 256))
    weight.grad = torch.diag(torch.logspace(0, -1.5, 16)) @ torch.linalg.qr(weight.grad.T).Q.T
    before = weight.detach().clone()
    muon.Muon([weight], lr=1e-2).step()
    moved = before - weight.detach()
    sizes = torch.linalg.svdvals(moved)
    assert sizes.max() / sizes.min() < 2, "of gradients thirty times apart"
    assert moved.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.2)


@pytest.mark.parametrize(("most", "expected"), [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_gradients_are_clipped_to_the_norm_asked_for(most, expected, new_run, monkeypatch):
    run, seen = new_run(max_grad_norm=most), []
    for weight in run.lora:
        weight.grad = torch.zeros_like(weight)
    run.lora[0].grad[0, :2] = torch.tensor([3.0, 4.0])
    monkeypatch.setattr(type(run.optimizers), "step", lambda *_: seen.append(run.lora[0].grad.norm().item()))
    norm, _ = loop.clip_and_step(run, 0)
    assert float(norm) == pytest.approx(5.0), "reported as it was"
    assert seen == [pytest.approx(expected)]


def test_what_is_written_is_the_average_of_the_weights_on_the_way(new_run):
    decay, run = 0.6, new_run(ema_decay=0.6)
    expected = None
    for taken, _ in enumerate(loop.train(run), start=1):
        share = min(decay, taken / (9 + taken)) if taken > 1 else 0.0  # (1 + t) / (10 + t), with t counted from 0
        now = [weight.detach().clone() for weight in (*run.lora, *run.placeholders.embeddings)]
        expected = [share * old + (1 - share) * new for old, new in zip(expected or now, now, strict=True)]
    written = final_lora(run)
    downs_and_ups = [part for layer in written.layers.values() for part in (layer.down, layer.up)]
    for got, wanted in zip([*downs_and_ups, written.embeddings["<zwx>"][0]], expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-7)
    assert not torch.allclose(downs_and_ups[1], run.lora[1], atol=1e-7), "the run itself goes on from its last step"
    (reported,) = describe_placeholders(run, final_lora(run))
    assert reported["last_norm"] == pytest.approx(float(written.embeddings["<zwx>"].norm()))


@pytest.mark.parametrize(
    ("scheduler", "factors"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4)]),
    ],
)
def test_schedules(scheduler, factors):
    config = replace(CONFIG, lr_scheduler=scheduler, warmup_steps=2, steps=6)
    assert [loop.rate_factor(step, config) for step in range(6)] == pytest.approx(factors)


# --- goals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", PRESETS)
def test_a_goal_chooses_what_is_left_open_and_nothing_else(goal):
    def resolved(**given):
        config = from_inputs(TrainInputs, {"dataset": "d.zip", "goal": goal, "seed": 1, **given}).config
        return {name: getattr(config, name) for name in asdict(PRESETS[goal])}

    assert resolved() == asdict(PRESETS[goal])
    assert resolved(rank=99) == {**asdict(PRESETS[goal]), "rank": 99}
    assert resolved(steps=7, learning_rate=0.5, rank=3, lora_targets="attention") == asdict(
        Preset(7, 0.5, 3, "attention")
    )
    assert resolved(optimizer="prodigy")["learning_rate"] == 1.0
    assert resolved(optimizer="prodigy", learning_rate=0.5)["learning_rate"] == 0.5
    assert resolved(optimizer="muon")["learning_rate"] == 2 * PRESETS[goal].learning_rate
    assert preset_for(goal, "adamw") == PRESETS[goal]


def test_the_defaults_are_what_no_goal_chooses():
    given = asdict(TrainConfig(seed=0))
    assert {name: given[name] for name in asdict(PRESETS["none"])} == asdict(PRESETS["none"])


def test_each_choice_is_printed_with_what_the_caller_has_in_its_place():
    config = TrainConfig(goal="object", **{**asdict(PRESETS["object"]), "steps": 300}, seed=0)
    (line,) = describe_goal(config)
    assert line.startswith("goal object: steps 300 (yours; the goal's is 1000), ")
    assert "rank 16, lora_targets attention_mlp" in line
    assert describe_goal(TrainConfig(seed=0)) == []


def test_an_unknown_goal_or_optimizer_is_refused_with_the_ones_there_are():
    with pytest.raises(UserError, match="goal must be one of none, person, object, style"):
        from_inputs(TrainInputs, {"dataset": "d.zip", "goal": "dog"})
    with pytest.raises(UserError, match="optimizer must be one of adamw, adamw8bit, prodigy, adafactor, muon"):
        TrainConfig(optimizer="lion", seed=0)
