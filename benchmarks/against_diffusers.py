"""This package against diffusers' own example script: the same model, images, captions and steps.

    python -m benchmarks.against_diffusers --script train_dreambooth_lora_qwen_image.py --python PYTHON --seeds 3

against_diffusers.md says where the script is from, what it needs, and what came out. Each training is a process of its
own, whose seconds and largest memory are what the operating system says of it. Both LoRAs are sampled by this package.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiment import markdown_table, mean_and_error
from benchmarks.recipes.peers import IMAGE_ATTENTION
from benchmarks.recipes.run import RARE_WORD
from examples import demo, evaluate, shapes
from lora_utils.lora.weights import load_weights
from lora_utils.model.components import Components, load_components
from lora_utils.model.device import default_placement

KIND, STEPS, PROMPTS = "house", 600, 40
LAYERS = "to_q,to_k,to_v,to_out.0"  # the script's default: the image stream's attention, which IMAGE_ATTENTION names
# A training's settings, as the script's options and as inputs of `train.py`.
SETTINGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "the same for both": (
        "--rank 16 --lora_alpha 16 --learning_rate 4e-4 --train_batch_size 4 --cache_latents",
        {
            "rank": 16,
            "lora_alpha": 16.0,
            "learning_rate": 4e-4,
            "batch_size": 4,
            "lora_targets": IMAGE_ATTENTION,
            "timestep_sampling": "uniform",
            "caption_dropout": 0.0,
        },
    ),
    "each one's own": (  # README_qwen.md's command, and this package's defaults
        "--learning_rate 2e-4 --train_batch_size 1 --gradient_accumulation_steps 4 --cache_latents",
        {"gradient_accumulation": 4},
    ),
}
# What a child process runs to train by this package: `train.py:train` with inputs from its command line.
CHILD = (
    "import json, shutil, sys; from examples.demo import call; from train import train; "
    "made = call(train, **json.loads(sys.argv[1])); shutil.copy(made.weights, sys.argv[2])"
)


def write_images(folder: Path, seed: int) -> None:
    """Write the dataset twice: `dataset.zip` for this package, and `images/` as the `datasets` library reads it."""
    demo.write_dataset(folder / "dataset.zip", KIND, shapes.Prompt(RARE_WORD), seed=seed)
    images = folder / "images"
    images.mkdir()
    lines = []
    with zipfile.ZipFile(folder / "dataset.zip") as packed:
        for name in packed.namelist():
            if name.endswith(".png"):
                (images / Path(name).name).write_bytes(packed.read(name))
                text = packed.read(name.replace(".png", ".txt")).decode()
                lines.append(json.dumps({"file_name": Path(name).name, "text": text}))
    (images / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def run_timed(command: Sequence[str], log: Path) -> tuple[float, float]:
    """Run a command and return its seconds and the largest memory that it held, in GB. Raises where it fails."""
    began = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as written:
        child = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{command[0]} ended with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - began, usage.ru_maxrss * 1024 / 1e9


def measure(components: Components, weights: Path) -> dict[str, float]:
    """Sample with a LoRA. -> shares of images: the object is there; other prompts have all that they ask for"""
    loaded = load_weights(weights, components)
    asked, plain = evaluate.object_prompts(shapes.Prompt(RARE_WORD), PROMPTS), evaluate.held_out_prompts(PROMPTS)
    texts = [item.text for item in (*asked, *plain)]
    images = evaluate.sample_with(components, texts, loaded)
    right = evaluate.score(images[:PROMPTS], asked, KIND).kind
    return {"fidelity": right, "others": evaluate.score(images[PROMPTS:], plain).all_three}


def compare(script: Path, python: str, seed: int, components: Components) -> list[dict[str, Any]]:
    """Train by both, in each of the settings, with one seed."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, seed)
        for setting, (options, inputs) in SETTINGS.items():
            theirs, ours = folder / "theirs", folder / "ours.zip"
            commands = {
                "diffusers' script": [
                    python, str(script), "--pretrained_model_name_or_path", str(demo.MODEL),
                    "--dataset_name", str(folder / "images"), "--caption_column", "text",
                    "--instance_prompt", RARE_WORD, "--output_dir", str(theirs), "--resolution", str(shapes.SIDE_PX),
                    "--max_train_steps", str(STEPS), "--lora_layers", LAYERS, "--seed", str(seed), *options.split(),
                ],
                "this package": [
                    sys.executable, "-c", CHILD,
                    json.dumps({
                        "dataset": str(folder / "dataset.zip"), "steps": STEPS, "seed": seed,
                        "resolution": str(shapes.SIDE_PX), **inputs,
                    }),
                    str(ours),
                ],
            }  # fmt: skip
            for who, command in commands.items():
                seconds, memory_gb = run_timed(command, folder / "log.txt")
                made = ours if who == "this package" else theirs / "pytorch_lora_weights.safetensors"
                own = {"seconds": seconds, "memory_gb": memory_gb, **measure(components, made)}
                found.append({"setting": setting, "who": who, "seed": seed, **own})
                print(found[-1], flush=True)
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the means over the seeds."""
    rows = []
    for setting in SETTINGS:
        for who in ("diffusers' script", "this package"):
            own = [each for each in found if (each["setting"], each["who"]) == (setting, who)]
            cells = [mean_and_error([each[name] for each in own]) for name in ("seconds", "memory_gb")]
            shares = [f"{np.mean([each[name] for each in own]):.1%}" for name in ("fidelity", "others")]
            rows.append([setting, who, *cells, *shares, str(len(own))])
    header = ["settings", "", "seconds", "memory, GB", "object right", "other prompts right", "runs"]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="diffusers' train_dreambooth_lora_qwen_image.py")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has what the script imports")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    os.environ["BASE_MODEL"] = str(demo.MODEL)
    components = load_components(demo.MODEL, default_placement())
    found = [run for seed in range(given.seeds) for run in compare(given.script, given.python, seed, components)]
    print(table(found))


if __name__ == "__main__":
    main()
