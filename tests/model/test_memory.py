"""Memory plans: the fewest blocks are checkpointed, and a step that runs out of memory all the same goes on."""

import logging
from dataclasses import replace

import pytest
import torch

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.model import memory
from lora_utils.model.transformer import predict_velocity
from lora_utils.training import loop, loss
from lora_utils.training.loss import flow_matching_loss
from lora_utils.training.recompute import plan_recompute
from tests.helpers import make_state

CONFIG = TrainConfig(steps=6, rank=4, learning_rate=1e-3, batch_size=3, resolution="64", seed=0)
KEPT = memory.kept_widths(constants.LORA_TARGETS["attention"], "lora")
QWEN = memory.StepSize(3072, 4096 + 128, (KEPT,) * 60, 2, 94_000_000)  # 1024x1024, batch 1, rank 32


def test_without_recomputing_the_real_model_needs_what_the_table_in_the_readme_says():
    assert QWEN.activation_bytes(0) / 1e9 == pytest.approx(21.2, abs=0.5)
    assert QWEN.activation_bytes(60) / 1e9 == pytest.approx(2.5, abs=0.5)
    assert QWEN.optimizer_bytes / 1e9 == pytest.approx(1.1, abs=0.1)


def test_the_plan_is_the_fewest_blocks_that_fit():
    for free in (6e9, 10e9, 16e9, 22e9):
        count = memory.blocks_to_checkpoint(QWEN, free)
        assert QWEN.needed_bytes(count) + memory.SPARE_BYTES <= free
        assert count == 0 or QWEN.needed_bytes(count - 1) + memory.SPARE_BYTES > free
    assert memory.blocks_to_checkpoint(QWEN, 30e9) == 0
    assert memory.blocks_to_checkpoint(QWEN, 1e9) == 60, "nothing fits: as little as can be"


def test_a_larger_batch_or_image_checkpoints_more():
    plans = [memory.blocks_to_checkpoint(replace(QWEN, tokens=scale * QWEN.tokens), 24e9) for scale in (1, 2, 4)]
    assert plans[0] < plans[1] < plans[2]


def test_stepping_down_reaches_every_block_and_stops_there():
    plan, seen = 0, []
    while plan < 60:
        plan = memory.more_blocks(plan, 60)
        seen.append(plan)
    assert seen == [10, 20, 30, 40, 50, 60]
    assert memory.more_blocks(1, 2) == 2


@pytest.fixture
def crowded(dataset, random_model, monkeypatch):
    """A run on a GPU that has room for a step only while at least `count` blocks are checkpointed."""

    def make(count, steps=6):
        run = make_state(replace(CONFIG, steps=steps), dataset, random_model)
        predict = predict_velocity

        def predict_in_little_memory(*given):
            out = predict(*given)
            if run.plan.checkpointed_blocks < count:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return out

        monkeypatch.setattr("lora_utils.training.loss.predict_velocity", predict_in_little_memory)
        return run

    return make


def test_out_of_memory_steps_down_and_the_run_is_the_same(crowded, dataset, random_model):
    run = make_state(CONFIG, dataset, random_model)
    expected = [report.loss for report in loop.train(run)]
    run = crowded(2)
    assert [report.loss for report in loop.train(run)] == pytest.approx(expected, rel=1e-5)
    assert run.plan.checkpointed_blocks == 2


def test_out_of_memory_within_a_step_redoes_all_its_micro_batches(dataset, random_model, monkeypatch):
    config = replace(CONFIG, gradient_accumulation=3, steps=2)
    curves = []
    for fails_at in (None, 3):  # the probe is call 1; the first step's micro-batches are calls 2 to 4
        run = make_state(config, dataset, random_model)
        loss_of, calls = flow_matching_loss, []

        def failing(*given, loss_of=loss_of, calls=calls, fails_at=fails_at):
            calls.append(given)
            if len(calls) == fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss_of(*given)

        with monkeypatch.context() as patch:
            patch.setattr(loss, "flow_matching_loss", failing)
            curves.append([report.loss for report in loop.train(run)])
    assert run.plan.checkpointed_blocks == 1
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_room_for_the_optimizer_is_tried_out_before_the_first_step(dataset, random_model, monkeypatch):
    """Its moments come into being at its first step, when the activations are gone but the gradients are there."""
    planned, crowded = (make_state(CONFIG, dataset, random_model) for _ in range(2))
    step, calls = crowded.optimizers.lora.step, []

    def failing():
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step()

    monkeypatch.setattr(crowded.optimizers.lora, "step", failing)
    curve = [report.loss for report in loop.train(crowded)]
    assert crowded.plan.checkpointed_blocks == 1
    monkeypatch.setattr(memory, "blocks_to_checkpoint", lambda *_: 1)
    assert curve == [report.loss for report in loop.train(planned)]
    assert crowded.flops == planned.flops, "the step that failed isn't counted"


def test_a_step_that_never_fits_is_refused_with_what_to_change(crowded):
    with pytest.raises(UserError, match=r"3 images of 64x64 doesn't fit into memory.*lower resolution"):
        list(loop.train(crowded(3)))


def test_the_plan_is_printed_and_tried_out_before_the_first_step(dataset, random_model, caplog):
    caplog.set_level(logging.INFO, "lora_utils")
    run = make_state(CONFIG, dataset, random_model)
    before = [weight.clone() for weight in run.lora]
    plan_recompute(run)
    assert "0 of 2 blocks are activation-checkpointed" in caplog.text
    assert run.seconds["probe"] > 0
    assert all(torch.equal(weight, old) and weight.grad is None for weight, old in zip(run.lora, before, strict=True))
