"""What a choice of inputs makes of the small model: python -m benchmarks.choices optimizers

A house is taught on twelve drawings with each of the choices: optimizers, adapters, or levels of noise and losses. How
often is it drawn right, and how often are other prompts still right? Means over seeds.
"""

import argparse
import time

import numpy as np
import torch

from benchmarks.teaching import KIND, images_of, sampled, train
from examples import evaluate, shapes
from examples.demo import MODEL, TOKEN, TRAINING
from lora_utils.lora.updates import tensors_of
from lora_utils.model.components import Components, load_components
from lora_utils.model.device import default_placement

SEEDS, PROMPTS = 2, 60
RATE = float(str(TRAINING["learning_rate"]))
OPTIMIZERS: dict[str, dict[str, object]] = {
    **{
        f"{name}, rate {rate:g}": {"optimizer": name, "learning_rate": rate}
        for name in ("adamw", "adafactor")
        for rate in (RATE, 2 * RATE)
    },
    # bitsandbytes keeps 32 bits of a matrix with fewer than 4096 weights: at rank 64 these have as many
    **{f"{name}, rank 64": {"optimizer": name, "rank": 64, "lora_alpha": 64.0} for name in ("adamw", "adamw8bit")},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    f"adamw, rate {RATE:g} all along": {"lr_scheduler": "constant"},
    f"adamw, rate {RATE:g} all along, ema_decay 0.99": {"lr_scheduler": "constant", "ema_decay": 0.99},
}
ADAPTERS: dict[str, dict[str, object]] = {
    **{
        f"{method}, rate {rate:g}": {"adapter": method, "learning_rate": rate}
        for method, rates in {"lora": (1, 2), "dora": (1, 2), "lokr": (1, 2, 4)}.items()
        for rate in (RATE * factor for factor in rates)
    },
    "lora, lora_alpha 2 x rank": {"lora_alpha": 2.0 * int(str(TRAINING["rank"]))},
}
NOISE: dict[str, dict[str, object]] = {
    **{name: {"timestep_sampling": name} for name in ("resolution", "logit_normal", "uniform", "content", "style")},
    "resolution, timestep_shift 3": {"timestep_shift": 3.0},
    "resolution, loss huber": {"loss": "huber"},
}
TABLES = {"optimizers": OPTIMIZERS, "adapters": ADAPTERS, "noise": NOISE}


def measure(components: Components, seed: int, given: dict[str, object]) -> tuple[float, float, float, float]:
    """-> the share of houses that are right, of other prompts that are, seconds of training, and trained weights."""
    naming, began = shapes.Prompt(TOKEN), time.monotonic()
    lora, placeholders = train(images_of(naming, seed), seed, given)
    took, taught = time.monotonic() - began, evaluate.object_prompts(naming, PROMPTS)
    others = evaluate.held_out_prompts(PROMPTS)
    houses, rest = (
        evaluate.score(sampled(components, lora, placeholders, [item.text for item in asked]), asked, kind)
        for asked, kind in ((taught, KIND), (others, None))
    )
    weights = sum(part.numel() for layer in lora.layers.values() for part in tensors_of(layer))
    return houses.kind, rest.all_three, took, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", default="", help="the lines whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second one only waits on so small a model, and disturbs what else runs
    components = load_components(MODEL, default_placement())
    print("| | weights | house right | other prompts right | s |\n| --- | --- | --- | --- | --- |", flush=True)
    for name, given in TABLES[arguments.table].items():
        if arguments.only not in name:
            continue
        runs = [measure(components, seed, given) for seed in range(arguments.seeds)]
        house, others, seconds, weights = (float(np.mean(values)) for values in zip(*runs, strict=True))
        print(f"| {name} | {weights:.0f} | {house:.1%} | {others:.1%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
