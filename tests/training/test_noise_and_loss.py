"""What is trained of the noise, and how errors count: each choice does what its name says."""

import math
from dataclasses import replace

import pytest
import torch

from lora_utils.config import TrainConfig
from lora_utils.model import flow
from lora_utils.training.batch_plans import generator_for
from lora_utils.training.batches import run_timesteps, step_sigmas
from lora_utils.training.loss import HUBER_C, flow_matching_loss, velocity_errors
from tests.helpers import SHORT_RUN, losses, make_state

COUNT = 20_000


def sigmas(dataset, **given):
    config = TrainConfig(seed=0, **given)
    batch = [dataset.examples[0]] * COUNT
    return step_sigmas(config, flow.Schedule(), batch, generator_for(0, "sigma"))


def quantiles(values):
    return torch.quantile(values, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist()


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


NORMAL = (-1.6449, -0.6745, 0.0, 0.6745, 1.6449)  # its quantiles at 5, 25, 50, 75 and 95 %
EXPECTED = {
    "logit_normal": [1 / (1 + math.exp(-z)) for z in NORMAL],
    "uniform": [0.05, 0.25, 0.5, 0.75, 0.95],
    "resolution": [1 / (1 + math.exp(-z)) for z in NORMAL],
    "content": [1 / (1 + math.exp(-z * flow.BELL_STD)) for z in NORMAL],
    "style": [math.sin(u * math.pi / 2) ** 2 for u in (0.05, 0.25, 0.5, 0.75, 0.95)],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_levels_of_noise_follow_their_distribution_and_the_size_where_they_should(name, dataset):
    tokens = dataset.examples[0].size.tokens
    shift = 1.0 if name in ("logit_normal", "uniform") else math.exp(flow.Schedule().mu(tokens))
    got = quantiles(sigmas(dataset, timestep_sampling=name))
    assert got == pytest.approx([shifted(value, shift) for value in EXPECTED[name]], abs=0.015)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shift_by_hand_takes_the_place_of_the_sizes(name, dataset):
    got = quantiles(sigmas(dataset, timestep_sampling=name, timestep_shift=3.0))
    assert got == pytest.approx([shifted(value, 3.0) for value in EXPECTED[name]], abs=0.015)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_shows_the_levels_that_its_table_was_made_for(name, dataset, random_model):
    state = make_state(replace(SHORT_RUN, timestep_sampling=name, timestep_shift=2.0), dataset, random_model)
    known = run_timesteps(state.config, state.data.examples, state.components.schedule, torch.float32)
    shown = torch.cat([next(state.stream).sigma for _ in range(state.config.steps)])
    assert torch.isin(flow.model_time(shown, torch.float32), known).all()


def test_huber_is_the_square_of_small_errors_and_linear_in_large_ones():
    small, large = torch.tensor([1e-3]), torch.tensor([10.0])
    zero = torch.zeros(1)
    assert float(velocity_errors(small, zero, "huber")) == pytest.approx(1e-6, rel=0.1)
    assert float(velocity_errors(large, zero, "huber")) == pytest.approx(2 * HUBER_C * 10, rel=0.02)
    assert float(velocity_errors(large, zero, "mse")) == 100


def test_a_run_learns_by_the_loss_that_was_asked_for_and_is_measured_by_the_same(dataset, random_model):
    runs = {loss: make_state(replace(SHORT_RUN, loss=loss), dataset, random_model) for loss in ("mse", "huber")}
    batch = next(runs["huber"].stream)
    measured = [flow_matching_loss(run, batch) for run in runs.values()]
    assert torch.equal(*measured), "images held out are measured by the square in both"
    assert float(flow_matching_loss(runs["huber"], batch, loss="huber").mean()) < float(measured[0].mean())
    curves = {name: losses(make_state(run.config, dataset, random_model)) for name, run in runs.items()}
    assert max(curves["huber"]) < min(curves["mse"])
