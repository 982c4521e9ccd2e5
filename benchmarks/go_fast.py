"""What go_fast's reuse of earlier steps wins and costs, on the small model: python -m benchmarks.go_fast

For each order of the polynomial that foretells, and each threshold: how many of the forwards stopped after the first
block, the speed against the full run, the speed that follows for 60 blocks, how far the images are from the full run's,
and what the exact scorer still finds right.
"""

import argparse
import time
from contextlib import nullcontext

import numpy as np
import torch

from examples import evaluate
from examples.demo import MODEL
from lora_utils.config import SampleRequest
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import encode_text
from lora_utils.model.vae import decode_images
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.sampling import first_block_cache, sampler
from lora_utils.sampling.options import REUSE_THRESHOLD
from lora_utils.sampling.sampler import Conditioning, SamplingJob

CHOICES = [(0, 0.1), (0, 0.15), (0, 0.2), (1, 0.05), (1, 0.07), (1, 0.1), (1, 0.15), (2, 0.05), (2, 0.1)]
BLOCKS = 60  # of Qwen-Image, whose share of a forward the first block is
SIZE = Size(64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    components = load_components(MODEL, default_placement())
    asked = evaluate.held_out_prompts(arguments.prompts)
    full: list[np.ndarray] = []
    print(
        "| order | threshold | stopped after a block | speed | with 60 blocks | mean difference, of 255 | all right |\n"
        "|---|---|---|---|---|---|---|"
    )
    full_s = 0.0
    for order, threshold in ((0, None), *CHOICES):
        images, skipped, forwards, began = [], 0, 0, time.monotonic()
        for index, question in enumerate(asked):
            request = SampleRequest(question.text, steps=arguments.steps, seed=index)
            job = SamplingJob(request, SIZE, no_placeholders())
            with torch.inference_mode():
                text, empty = (
                    encode_text(components.need_text_encoder(), components.tokenizer, [words], no_placeholders())
                    for words in (question.text, " ")
                )
                noise, reuse = sampler.initial_noise(SIZE, index), nullcontext(None)
                if threshold is not None:
                    reuse = first_block_cache.first_block_caching(components.transformer, threshold, 1, order)
                with reuse as state:
                    latents = sampler.denoise(components, job, noise, Conditioning(text, empty), lambda _step: None)
                if state is not None:
                    skipped, forwards = skipped + state.skipped, forwards + state.forwards
                images += decode_images(components.need_vae(), latents, SIZE)
        seconds = time.monotonic() - began
        pixels = [np.asarray(image, float) for image in images]
        score = evaluate.score(images, asked)
        if threshold is None:
            full, full_s = pixels, seconds
            print(f"| | full run | | 1.00 | 1.00 | | {score.all_three:.1%} |", flush=True)
            continue
        apart = np.mean([np.abs(one - other).mean() for one, other in zip(pixels, full, strict=True)])
        mark = " (go_fast)" if (order, threshold) == (first_block_cache.ORDER, REUSE_THRESHOLD) else ""
        share = skipped / forwards
        predicted = 1 / (1 - share + share / BLOCKS)
        print(
            f"| {order} | {threshold}{mark} | {share:.0%} | {full_s / seconds:.2f} | {predicted:.2f} | {apart:.2f} "
            f"| {score.all_three:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
