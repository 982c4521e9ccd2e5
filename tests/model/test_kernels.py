"""The kernel for norms, RoPE and joining: it computes what the steps do, and where it can't run the steps do.

There is no GPU here. So the kernel runs in Triton's interpreter, and is compiled for GPUs without running it there.
"""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from lora_utils.model import kernels
from lora_utils.model.blocks import forwards_of
from lora_utils.model.transformer import load_transformer
from tests.helpers import ROOT
from tests.model.test_loading import PLACE

CPU = torch.device("cpu")


def run_with_triton(code, interpreted):
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


INTERPRETED = """
    import torch
    from lora_utils.model import kernels

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            ctx.given = given
            return kernels.norm_rope._init_fn(*given)

        @staticmethod
        def backward(ctx, gradient):
            return (*kernels.norm_rope_backward._init_fn(gradient, *ctx.given), None, None, None, None)

    for dtype in (torch.float32, torch.bfloat16):
        print(kernels.largest_difference(Fused.apply, torch.device("cpu"), dtype))
"""


def test_the_kernel_gives_what_the_steps_give_forward_and_backward():
    """In bf16 to the last digit of numbers up to 4, which is 0.03: it rounds fewer times on the way back."""
    exact, rounded = map(float, run_with_triton(INTERPRETED, interpreted=True))
    assert exact < 2e-6
    assert rounded <= 0.03125


COMPILED = """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from lora_utils.model import triton_kernels

    text_and_image = ["text", "image", "text_weight", "image_weight"]
    pointers = {
        "forward": [*text_and_image, "out"], "backward": ["gradient", *text_and_image, "text_out", "image_out"],
    }
    for capability in (80, 86, 89, 90, 100, 120):
        for name, tensors in pointers.items():
            signature = dict.fromkeys(tensors, "*bf16") | {"table": "*fp32", "eps": "fp32"}
            signature |= dict.fromkeys(("text_programs", "batch", "text_tokens", "image_tokens"), "i32")
            signature |= dict.fromkeys("HER", "constexpr")
            source = ASTSource(getattr(triton_kernels, name), signature, {"H": 24, "E": 128, "R": 32})
            made = compile(source, target=GPUTarget("cuda", capability, 32))
            print(capability, name, len(made.asm["cubin"]))
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_each_generation_of_gpus():
    made = run_with_triton(COMPILED, interpreted=False)
    assert len(made) == 12
    assert all(int(line.split()[2]) > 1000 for line in made)


def test_the_operation_that_the_compiler_knows_has_the_right_shapes_and_gradients():
    text, image = (torch.randn(2, tokens, 3, 8, requires_grad=True) for tokens in (3, 5))
    angles = torch.randn(8, 4)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    given = (text, image, torch.rand(8), torch.rand(8), table, 1e-6)
    torch.library.opcheck(kernels.norm_rope, given)
    assert kernels.largest_difference(kernels.norm_rope, CPU, torch.float32) < 2e-6


def test_on_a_cpu_the_steps_are_taken(random_model):
    joins = {forward.join for forward in forwards_of(load_transformer(random_model, PLACE))}
    assert joins == {kernels.join_in_steps}


@pytest.fixture
def fresh_choice():
    kernels.kernel_works.cache_clear()
    yield
    kernels.kernel_works.cache_clear()


def wrong(*given):
    return kernels.join_in_steps(*given) * 1.01


def broken(*_given):
    raise RuntimeError("ptxas: no such file\nand more")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [(wrong, "the kernel for RoPE is off by"), (broken, r"can't be used here \(ptxas: no such file\)")],
    ids=["wrong numbers", "no compiler"],
)
def test_a_kernel_that_fails_is_replaced_and_that_is_said_once(kernel, said, fresh_choice, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "norm_rope", kernel)
    assert not kernels.kernel_works(CPU, torch.float32)
    assert not kernels.kernel_works(CPU, torch.float32)
    (record,) = caplog.records
    assert re.search(said, record.message)


def test_a_kernel_that_works_is_chosen_for_a_gpu_whose_heads_fit(fresh_choice, monkeypatch):
    monkeypatch.setattr(kernels, "kernel_works", lambda _device, _dtype: True)
    gpu = torch.device("cuda")
    assert kernels.choose_join(gpu, torch.bfloat16, 128) is kernels.norm_rope
    assert kernels.choose_join(gpu, torch.bfloat16, 96) is kernels.join_in_steps
    assert kernels.choose_join(CPU, torch.bfloat16, 128) is kernels.join_in_steps
