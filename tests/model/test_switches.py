"""Every switch of the engine, on and off: the loss curve of twenty steps of the small model is the plain one's.

Plain: diffusers' blocks and modulations, peft's LoRA layers, everything kept for the backward pass.
"""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformerBlock

from lora_utils.config import TrainConfig
from lora_utils.model import memory_plan, modulation
from lora_utils.training import loop
from lora_utils.training.recompute import change_plan
from lora_utils.training.state import TrainState
from tests.helpers import make_state, use_pefts_layers

CONFIG = TrainConfig(
    steps=20,
    rank=8,
    learning_rate=1e-3,
    batch_size=4,
    resolution="64",
    lora_targets="attention_mlp",
    seed=0,
    train_placeholder_token=True,
    quantization="none",
)


def new_run(dataset, folder, table, text_on_gpu=True) -> TrainState:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modulation, "pays", lambda *_: table)
        patch.setattr(
            memory_plan, "choose_training_plan", lambda *_, **_named: memory_plan.MemoryPlan("none", text_on_gpu)
        )
        return make_state(CONFIG, dataset, folder)


def use_stock_blocks(run: TrainState) -> None:
    """diffusers' forward of each block, and its RoPE, in place of ours."""
    run.components.transformer.pos_embed = run.components.transformer.pos_embed.original
    assert isinstance(run.components.transformer.pos_embed, QwenEmbedRope)
    for block in run.components.transformer.transformer_blocks:
        del block.forward
        assert isinstance(block, QwenImageTransformerBlock)


def curve(run: TrainState, change: Callable[[TrainState], None]) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plan_recompute", change)
        return [report.loss for report in loop.train(run)]


@pytest.fixture(scope="module")
def plain(dataset, tiny_model):
    def change(run):
        use_pefts_layers(run.components.transformer)
        use_stock_blocks(run)

    run = new_run(dataset, tiny_model, table=False)
    losses = curve(run, change)
    assert run.placeholders.embeddings[0].norm() > 10 * run.initial_embeddings[0].norm(), "the row has learned too"
    return losses


def own_layers(run):
    use_stock_blocks(run)


SWITCHES = {
    "own LoRA layers": (False, own_layers),
    "own blocks": (False, lambda _run: None),
    "modulation table": (True, lambda _run: None),
    "half of the blocks checkpointed": (True, lambda run: change_plan(run, checkpointed_blocks=3)),
    "all blocks checkpointed": (True, lambda run: change_plan(run, checkpointed_blocks=6)),
    "compiled": (True, lambda run: change_plan(run, compiled=True)),
    "compiled, and half checkpointed": (True, lambda run: change_plan(run, compiled=True, checkpointed_blocks=3)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "compiled" in name else name for name in SWITCHES]
)
def test_the_loss_curve_is_the_plain_one(name, plain, dataset, tiny_model):
    table, change = SWITCHES[name]
    run = new_run(dataset, tiny_model, table)
    assert modulation.has_table(run.components.transformer) == table
    assert curve(run, change) == pytest.approx(plain, rel=1e-5)
    assert run.plan.compiled == name.startswith("compiled"), "it didn't fall back"


def test_a_text_encoder_on_the_cpu_gives_the_same_curve(plain, dataset, tiny_model):
    assert curve(new_run(dataset, tiny_model, True, text_on_gpu=False), lambda _run: None) == pytest.approx(
        plain, rel=1e-5
    )


def test_the_curve_is_one_of_learning(plain):
    assert torch.tensor(plain[-5:]).mean() < torch.tensor(plain[:5]).mean()
