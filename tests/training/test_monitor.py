"""What a run says of its pace: the probe and the compiler aren't steps, and large images take longer than small."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from lora_utils.config import RunOptions, TrainConfig
from lora_utils.dataset import load
from lora_utils.io import logging as io_logging
from lora_utils.model import blocks
from lora_utils.training import loop
from lora_utils.training.batch_plans import plan_batches
from lora_utils.training.monitor import TrainMonitor
from lora_utils.training.recompute import change_plan, plan_recompute
from tests.helpers import make_state

CONFIG = TrainConfig(steps=40, rank=4, batch_size=2, resolution="64", seed=0, quantization="none")


def seconds_of(text):
    minutes, seconds = text.rsplit(":", 1)
    return 60 * int(minutes) + int(seconds)


def pace_after(state, plans, seconds, monkeypatch, looked_s=0.0):
    """Return (seconds per step, ETA) after steps on these batches, which took so long."""
    clock = [0.0]
    monkeypatch.setattr(io_logging.time, "monotonic", lambda: clock[0])
    monitor = TrainMonitor(state, RunOptions(), [])
    monitor.progress.began, monitor.looked_s = 0.0, looked_s
    clock[0] = seconds
    state.flops = sum(loop.batch_flops(state, each.examples[0].size, each.captions, each.is_prior) for each in plans)
    said = re.fullmatch(r"([\d.]+) s/step, ETA (.*)", monitor._pace(len(plans)))
    assert said
    return float(said.group(1)), seconds_of(said.group(2))


def plans_of(state, count):
    stream = plan_batches(state.config, state.data.examples, state.data.preserved)
    return [next(stream) for _ in range(count)]


def test_the_probe_and_the_compiler_are_no_part_of_the_pace(dataset, random_model, monkeypatch):
    state = make_state(CONFIG, dataset, random_model)
    state.seconds |= {"probe": 94.0, "compile": 60.0}
    pace, eta = pace_after(state, plans_of(state, 1), 94.0 + 60.0 + 25.0, monkeypatch)
    assert pace == 25.0
    assert eta == pytest.approx(39 * 25, rel=0.1)


def test_what_is_looked_at_between_steps_is_time_that_is_left_too(dataset, random_model, monkeypatch):
    state = make_state(CONFIG, dataset, random_model)
    pace, eta = pace_after(state, plans_of(state, 10), 10.0 + 30.0, monkeypatch, looked_s=30.0)
    assert pace == 1.0
    assert eta == pytest.approx(30 * (1 + 3), rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_eta_is_right_though_images_differ_in_size(seed, random_model, tmp_path, monkeypatch):
    """Sides of 64 and 256 pixels: a batch of the larger ones takes many times the other's operations."""
    for index, side in enumerate((64, 64, 64, 256, 256)):
        Image.new("RGB", (side, side), (50 * index, 0, 0)).save(tmp_path / f"{index}.png")
    config = replace(CONFIG, resolution="64,256", default_caption="a drawing", seed=seed)
    state = make_state(config, load(tmp_path, config), random_model)
    plans = plans_of(state, config.steps)
    costs = [loop.batch_flops(state, each.examples[0].size, each.captions, each.is_prior) for each in plans]
    assert max(costs) > 5 * min(costs)
    speed = 1e-3 * sum(costs)  # the run takes 1000 s
    _, eta = pace_after(state, plans[:1], costs[0] / speed, monkeypatch)
    assert sum(costs[1:]) / speed / 1.5 < eta < 1.5 * sum(costs[1:]) / speed


@pytest.mark.slow
def test_the_compiler_is_timed_apart_from_the_probe(dataset, random_model, monkeypatch):
    # The blocks are traced, and no code is made of them.
    monkeypatch.setattr(blocks, "compiled_block", partial(blocks.compiled_block, "eager"))
    torch._dynamo.reset()  # another test may have had the same blocks traced
    state = make_state(CONFIG, dataset, random_model)
    plan_recompute(state)
    assert "compile" not in state.seconds
    compiled = make_state(CONFIG, dataset, random_model)
    change_plan(compiled, compiled=True)
    plan_recompute(compiled)
    assert compiled.plan.compiled
    assert compiled.seconds["compile"] > 0
    assert compiled.seconds["probe"] > 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in compiled.lora)


def test_the_last_lines_tell_held_memory_from_mapped(train_run, caplog):
    caplog.set_level("INFO", "lora_utils")
    train_run()
    (line,) = [each for each in caplog.messages if each.startswith("at most")]
    found = re.match(
        r"at most ([\d.]+) GB of memory, mapped files included; now ([\d.]+) GB are held and ([\d.]+) GB mapped; ", line
    )
    assert found
    peak, held, mapped = map(float, found.groups())
    assert 0 < held + mapped <= peak + 0.02
