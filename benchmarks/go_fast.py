"""What go_fast's reuse of earlier steps wins and costs, on the small model: python -m benchmarks.go_fast

For each threshold: how many of the forwards stopped after the first block, the speed against the full run, how far the
pictures are from its pictures, and what the exact scorer still finds right.
"""

import argparse
import time
from contextlib import nullcontext

import numpy as np
import torch

from examples import evaluate
from examples.demo import MODEL
from lora_utils import first_block, models, sampling
from lora_utils.config import SampleRequest
from lora_utils.placeholder import no_placeholders
from lora_utils.sizes import Size
from lora_utils.ways import REUSE_THRESHOLD

THRESHOLDS = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
SIZE = Size(64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    components = models.load_components(MODEL, models.default_place())
    asked = evaluate.held_out_prompts(arguments.prompts)
    full: list[np.ndarray] = []
    print(
        "| threshold | stopped after one block | speed | mean difference, of 255 | all right |\n|---|---|---|---|---|"
    )
    full_s = 0.0
    for threshold in (None, *THRESHOLDS):
        pictures, skipped, forwards, began = [], 0, 0, time.monotonic()
        for index, question in enumerate(asked):
            request = SampleRequest(question.text, steps=arguments.steps, seed=index)
            with torch.inference_mode():
                text, empty = (
                    models.encode_text(components.text_encoder, components.tokenizer, [words], no_placeholders())
                    for words in (question.text, " ")
                )
                noise, reuse = sampling.initial_noise(SIZE, index), nullcontext(None)
                if threshold is not None:
                    reuse = first_block.reused(components.transformer, threshold, branches=1)
                with reuse as state:
                    latents = sampling.denoise(components, noise, SIZE, text, empty, request, lambda _step: None)
                if state is not None:
                    skipped, forwards = skipped + state.skipped, forwards + state.forwards
                pictures += models.decode_pictures(components.vae, latents, SIZE)
        seconds = time.monotonic() - began
        pixels = [np.asarray(picture, float) for picture in pictures]
        score = evaluate.score(pictures, asked)
        if threshold is None:
            full, full_s = pixels, seconds
            print(f"| full run | | 1.00 | | {score.all_three:.1%} |", flush=True)
            continue
        apart = np.mean([np.abs(one - other).mean() for one, other in zip(pixels, full, strict=True)])
        mark = " (go_fast)" if threshold == REUSE_THRESHOLD else ""
        print(
            f"| {threshold}{mark} | {skipped / forwards:.0%} | {full_s / seconds:.2f} | {apart:.2f} "
            f"| {score.all_three:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
