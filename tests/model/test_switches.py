"""Every switch of the engine, on and off: the loss curve of twenty steps of the small model is the plain one's.

Plain: diffusers' blocks and modulations, peft's LoRA layers, everything kept for the backward pass.
"""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformerBlock

from lora_utils import adapters, fitting, models, modulation, plan, preparation, training
from lora_utils.config import TrainConfig

CONFIG = TrainConfig(
    steps=20, rank=8, learning_rate=1e-3, batch_size=4, resolution="64", lora_targets="attention_mlp", seed=0,
    train_placeholder_token=True, quantization="none",
)  # fmt: skip


def prepare(dataset, folder, table, text_on_card=True) -> preparation.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modulation, "pays", lambda *_: table)
        patch.setattr(plan, "choose", lambda *_, **_named: plan.Plan("none", text_on_card))
        return preparation.prepare(CONFIG, dataset, folder, models.default_place())


def use_stock_layers(run: preparation.Run) -> None:
    """peft's forward of each wrapped layer, in place of ours."""
    for module in run.transformer.modules():
        if isinstance(module, adapters.LoraLayer):
            del module.forward


def use_stock_blocks(run: preparation.Run) -> None:
    """diffusers' forward of each block, and its RoPE, in place of ours."""
    run.transformer.pos_embed = run.transformer.pos_embed.original
    assert isinstance(run.transformer.pos_embed, QwenEmbedRope)
    for block in run.transformer.transformer_blocks:
        del block.forward
        assert isinstance(block, QwenImageTransformerBlock)


def curve(run: preparation.Run, change: Callable[[preparation.Run], None]) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plan_memory", change)
        return [report.loss for report in training.train(run)]


@pytest.fixture(scope="module")
def plain(dataset, tiny_model):
    def change(run):
        use_stock_layers(run)
        use_stock_blocks(run)

    run = prepare(dataset, tiny_model, table=False)
    losses = curve(run, change)
    assert run.placeholders.rows[0].norm() > 10 * run.first_rows[0].norm(), "the row has learned too"
    return losses


def own_layers(run):
    use_stock_blocks(run)


SWITCHES = {
    "own LoRA layers": (False, own_layers),
    "own blocks": (False, lambda _run: None),
    "modulation table": (True, lambda _run: None),
    "half of the blocks recompute": (True, lambda run: fitting.use_plan(run, 3)),
    "all blocks recompute": (True, lambda run: fitting.use_plan(run, 6)),
    "compiled": (True, lambda run: fitting.use_compiled(run, compiled=True)),
    "compiled, and half recompute": (
        True, lambda run: (fitting.use_compiled(run, compiled=True), fitting.use_plan(run, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_the_loss_curve_is_the_plain_one(name, plain, dataset, tiny_model):
    table, change = SWITCHES[name]
    run = prepare(dataset, tiny_model, table)
    assert modulation.has_table(run.transformer) == table
    assert curve(run, change) == pytest.approx(plain, rel=1e-5)
    assert run.compiled == name.startswith("compiled"), "it didn't fall back"


def test_a_text_encoder_on_the_host_gives_the_same_curve(plain, dataset, tiny_model):
    assert curve(prepare(dataset, tiny_model, True, text_on_card=False), lambda _run: None) == pytest.approx(
        plain, rel=1e-5
    )


def test_the_curve_is_one_of_learning(plain):
    assert torch.tensor(plain[-5:]).mean() < torch.tensor(plain[:5]).mean()
