"""What training one embedding costs at Qwen2.5-VL's true shape: spliced in, against the matrix with a gradient mask.

    python -m benchmarks.embedding_cost

The embedding matrix is 152064 x 3584; the text encoder has 2 of its 28 layers, with random weights. Every variant runs
in a process of its own, for the peak memory is the process's.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from lora_utils.placeholder.embedding import embedding_matrix, initial_embedding, spliced_embeddings
from lora_utils.placeholder.tokens import Placeholders

ROWS, WIDTH, SLOT = 152064, 3584, 151665
LAYERS = 2
TEXT_TOKENS = 34 + 30 + 5  # template, a caption of usual length, template
STEPS = 4  # the first one isn't counted


def new_text_encoder() -> Qwen2_5_VLTextModel:
    """Qwen2.5-VL-7B's language model but for the number of layers, in bf16."""
    config = Qwen2_5_VLTextConfig(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        intermediate_size=18944,
        num_hidden_layers=LAYERS,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    encoder: Qwen2_5_VLTextModel = cast(Any, Qwen2_5_VLTextModel)._from_config(config, dtype=torch.bfloat16)
    return encoder.eval().requires_grad_(False)


def caption_ids() -> Tensor:
    ids = torch.randint(151643, (1, TEXT_TOKENS), generator=torch.Generator().manual_seed(0))
    ids[0, 38] = SLOT
    return ids


def step_without(encoder: Qwen2_5_VLTextModel) -> Callable[[], None]:
    """Only reading the caption: what both pay."""

    @torch.no_grad()
    def step() -> None:
        encoder(input_ids=caption_ids(), use_cache=False)

    return step


def step_spliced(encoder: Qwen2_5_VLTextModel) -> Callable[[], None]:
    """As the package trains it."""
    embedding = initial_embedding(WIDTH, 1e-5, torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.AdamW([embedding], lr=5e-4, weight_decay=0.0)

    def step() -> None:
        with spliced_embeddings(encoder, Placeholders(("<zwx>",), (SLOT,), (embedding,))):
            states = encoder(input_ids=caption_ids(), use_cache=False).last_hidden_state
        states.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_masked(encoder: Qwen2_5_VLTextModel) -> Callable[[], None]:
    """The matrix trainable in fp32, as small updates need it, and all rows but one masked out of the gradient."""
    matrix = encoder.get_submodule("embed_tokens")
    matrix.weight = torch.nn.Parameter(embedding_matrix(encoder).float())
    matrix.register_forward_hook(lambda _module, _given, embedded: embedded.to(torch.bfloat16))
    mask = torch.zeros(ROWS, 1)
    mask[SLOT] = 1.0
    optimizer = torch.optim.AdamW([matrix.weight], lr=5e-4, weight_decay=0.0)

    def step() -> None:
        encoder(input_ids=caption_ids(), use_cache=False).last_hidden_state.float().square().mean().backward()
        assert isinstance(matrix.weight.grad, Tensor)
        matrix.weight.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()

    return step


VARIANTS = {"reading the caption only": step_without, "spliced embedding": step_spliced, "masked matrix": step_masked}


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(name: str) -> tuple[float, float]:
    """-> (median seconds of a step, GB of memory beyond the loaded encoder at the peak)"""
    encoder = new_text_encoder()
    before_gb = peak_gb()
    step, seconds = VARIANTS[name](encoder), []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]), peak_gb() - before_gb


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{ROWS} x {WIDTH}, {LAYERS} layers, bf16, torch {torch.__version__}, {platform.machine()}")
    print("| | seconds a step | GB beyond the encoder |\n|---|---|---|")
    for name in VARIANTS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory_gb = pool.apply(measure, (name,))
        print(f"| {name} | {seconds:.2f} | {memory_gb:.2f} |", flush=True)


if __name__ == "__main__":
    main()
