"""Compiled blocks: the same loss curve, one compilation for all blocks, and never a failure."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from lora_utils import blocks, fitting, flops, models, plan, preparation, training
from lora_utils.config import TrainConfig
from tests.test_plan import demand

CONFIG = TrainConfig(steps=20, rank=4, learning_rate=1e-3, batch_size=2, resolution="64,128", seed=0)


def losses(folder, dataset, compiled, steps=20, recomputed=None):
    run = preparation.prepare(replace(CONFIG, steps=steps), dataset, folder, models.default_place())
    run.compiled = compiled
    stream = training.train(run)
    if recomputed is not None:
        fitting.use_plan(run, recomputed)
    return [report.loss for report in stream], run


def test_real_rotation_is_the_complex_one():
    x, table = torch.randn(2, 5, 3, 8), torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    torch.testing.assert_close(blocks.rotate(x, torch.view_as_real(table)), blocks.rotate(x, table), atol=1e-6, rtol=0)


def test_the_loss_curve_is_that_of_the_plain_blocks(dataset, random_model):
    torch._dynamo.reset()
    counters.clear()
    compiled, run = losses(random_model, dataset, compiled=True)
    assert run.compiled, "it didn't fall back"
    # One for the first block, whose inputs have no gradient, one for the others; a short last batch may ask for more,
    # blocks and picture sizes may not.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    plain, _ = losses(random_model, dataset, compiled=False)
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_blocks_that_cannot_be_compiled_are_computed_plainly(fails_in, dataset, random_model, monkeypatch, caplog):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise TorchDynamoException("no compiler here\nand much more")

    def compute(*given):
        if fails_in == "forward":
            raise TorchDynamoException("no compiler here\nand much more")
        text, image = blocks.compute_block(*given)
        return text, Failing.apply(image)

    expected, _ = losses(random_model, dataset, compiled=False, steps=4)
    monkeypatch.setattr(blocks, "compiled_block", lambda: compute)
    got, run = losses(random_model, dataset, compiled=True, steps=4)
    assert got == pytest.approx(expected, rel=1e-6)
    assert not run.compiled
    assert "can't be compiled here (no compiler here); going on without" in caplog.text


def steps_done_and_compiled(folder, dataset):
    got, run = losses(folder, dataset, compiled=True, steps=2)
    return len(got), run.compiled


def test_without_a_compiler_a_run_goes_on(dataset, random_model, monkeypatch, tmp_path):
    """In a process of its own: torch remembers for good which compilers it found."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(steps_done_and_compiled, random_model, dataset).result() == (2, False)


def test_whether_a_run_is_compiled_does_not_hang_on_how_busy_the_machine_is(dataset, random_model, monkeypatch):
    """Or a run that goes on, or the same run again, would round otherwise now and then."""
    monkeypatch.setattr(flops, "measured_peak", lambda *_, **__: pytest.fail("measured"))
    run = preparation.prepare(CONFIG, dataset, random_model, models.default_place())
    assert not run.compiled


def test_only_a_run_long_enough_to_win_it_back_is_compiled():
    def compiled(**given):
        return plan.choose("auto", demand(80e9), live_text=False, **given).compiled

    assert not compiled(run_s=plan.COMPILE_S)
    assert compiled(run_s=1.01 * plan.COMPILE_S / plan.COMPILED_GAIN)
    assert not plan.choose("nf4", demand(80e9), live_text=False, run_s=1e6).compiled
