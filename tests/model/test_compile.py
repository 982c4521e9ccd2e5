"""Compiled blocks: the same loss curve, one compilation for all blocks, and never a failure."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from lora_utils.config import TrainConfig
from lora_utils.model import blocks, flops, kernels, memory_plan, roofline
from lora_utils.training import loop
from lora_utils.training.recompute import change_plan
from tests.helpers import make_state
from tests.model.test_memory_plan import demand, size_of

CONFIG = TrainConfig(steps=20, rank=4, learning_rate=1e-3, batch_size=2, resolution="64,128", seed=0)


def losses(folder, dataset, compiled, **changed):
    run = make_state(replace(CONFIG, **changed), dataset, folder)
    change_plan(run, compiled=compiled)
    return [report.loss for report in loop.train(run)], run


def test_real_rotation_is_the_complex_one():
    x, table = torch.randn(2, 5, 3, 8), torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    compiled = torch.compile(kernels.rotate, backend="aot_eager")  # which is told to do without complex numbers
    table = torch.view_as_real(table)
    torch.testing.assert_close(compiled(x, table), kernels.rotate(x, table), atol=1e-6, rtol=0)


# The first traces the blocks, the second their backward pass too; the last makes code and has images of two sizes.
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "resolution"), [("eager", "64"), ("aot_eager", "64"), ("inductor", "64,128")])
def test_the_loss_curve_is_that_of_the_plain_blocks(backend, resolution, dataset, random_model, monkeypatch):
    monkeypatch.setattr(blocks, "compiled_block", partial(blocks.compiled_block, backend))
    torch._dynamo.reset()
    counters.clear()
    compiled, run = losses(random_model, dataset, compiled=True, resolution=resolution)
    assert run.plan.compiled, "it didn't fall back"
    # One for the first block, whose inputs have no gradient, one for the others; a short last batch may ask for more,
    # blocks and image sizes may not.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    plain, _ = losses(random_model, dataset, compiled=False, resolution=resolution)
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
    assert not run.plan.compiled
    assert "can't be compiled here (no compiler here); continuing without" in caplog.text


def steps_done_and_compiled(folder, dataset):
    got, run = losses(folder, dataset, compiled=True, steps=2)
    return len(got), run.plan.compiled


@pytest.mark.slow
def test_without_a_compiler_a_run_is_resumed(dataset, random_model, monkeypatch, tmp_path):
    """In a process of its own: torch remembers for good which compilers it found."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(steps_done_and_compiled, random_model, dataset).result() == (2, False)


def test_on_a_cpu_no_run_is_compiled(dataset, random_model):
    """However long: one that goes on wouldn't be the one that was never stopped, bit for bit."""
    run = make_state(replace(CONFIG, steps=20000), dataset, random_model)
    assert not run.plan.compiled


def timing_of(images, gpu=roofline.GPUS[0]):
    shape = flops.Shape(60, 3072, 64, 3584)
    return memory_plan.Timing(
        gpu, roofline.Step(shape, 4096, 128, TrainConfig(seed=0).lora_targets), size_of(1024), images
    )


def test_on_a_known_gpu_a_run_is_compiled_that_is_long_enough_to_win_it_back():
    """By its data sheet an H200 wins 6.2 ms an image, and compiling takes a minute and a half."""

    def compiled(asked="auto", **given):
        return memory_plan.choose_training_plan(asked, demand(141e9), live_text=False, **given).compiled

    assert not compiled(timing=timing_of(1000))
    assert not compiled(timing=timing_of(12_000))
    assert compiled(timing=timing_of(20_000))
    assert not compiled("nf4", timing=timing_of(10**7)), "a quantised base isn't"
    assert not compiled(), "nor is a run on a GPU that isn't known"


def test_the_plan_says_how_long_a_step_takes_at_least():
    """Without a token the text encoder is gone by then, and its room is the step's."""
    for gb, live_text, expected in ((141, False, "0.25"), (141, True, "0.25"), (48, False, "0.3"), (48, True, "0.36")):
        estimate = demand(gb * 1e9)
        plan = memory_plan.choose_training_plan("auto", estimate, live_text, timing_of(1000))
        said = " ".join(memory_plan.describe_plan(plan, "auto", estimate))
        assert f"a step on the largest image takes at least {expected} s, by the GPU's data sheet" in said, (
            gb,
            live_text,
        )
    unknown = memory_plan.choose_training_plan("auto", demand(48e9), live_text=False)
    assert "data sheet" not in " ".join(memory_plan.describe_plan(unknown, "auto", demand(48e9)))


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True)  # torch's own limit
def test_every_kind_of_batch_is_compiled_to_the_end_of_a_run(dataset, random_model):
    """Past torch's own limit it would silently run uncompiled. The graphs are run as they are, which is quick."""
    torch._dynamo.reset()
    run = make_state(CONFIG, dataset, random_model)
    compute = blocks.compiled_block(backend="eager")
    block, project = run.components.transformer.transformer_blocks[0], blocks.project_each
    width, rope = run.components.transformer.inner_dim, run.components.transformer.pos_embed
    kinds = product((1, 2), (1, 2, 3), (False, True), ((False, False), (False, True), (True, True)))
    counters.clear()
    for batch, text_tokens, masked, (image_learns, text_learns) in kinds:
        image = torch.randn(batch, 16, width, requires_grad=image_learns)
        text = torch.randn(batch, text_tokens, width, requires_grad=text_learns)
        mask = torch.ones(batch, text_tokens, dtype=torch.bool) if masked else None
        table = rope([[(1, 4, 4)]] * batch, text_tokens, image.device).rope
        modulations = torch.randn(batch, 6 * width), torch.randn(batch, 6 * width)
        given = (block, project, kernels.join_in_steps, image, text, mask, *modulations, table)
        for one, other in zip(compute(*given), blocks.compute_block(*given), strict=True):
            torch.testing.assert_close(one, other)
    assert 8 < counters["stats"]["unique_graphs"] <= blocks._KINDS
