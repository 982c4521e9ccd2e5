"""What several tests share: a run that is set up, its losses, and what an archive holds."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lora_utils.config import RunOptions, SampleRequest, TrainConfig, TrainFiles, TrainInputs
from lora_utils.dataset import Dataset
from lora_utils.lora.layers import DoraLinear, LoraLinear
from lora_utils.lora.updates import tensors_of
from lora_utils.lora.weights_zip import LORA_MEMBER, META_MEMBER
from lora_utils.model.device import default_placement
from lora_utils.model.latents import Size
from lora_utils.model.memory_estimate import read_shapes
from lora_utils.model.text_encoder import load_tokenizer
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.sampling.options import SamplingOptions
from lora_utils.sampling.sampler import SamplingJob
from lora_utils.training import loop
from lora_utils.training.checkpoint import read_checkpoint, restore_checkpoint
from lora_utils.training.run import train_in_process
from lora_utils.training.setup import TrainJob, setup
from lora_utils.training.state import TrainState, final_lora

ROOT = Path(__file__).parent.parent
SHORT_RUN = TrainConfig(
    steps=8,
    rank=4,
    learning_rate=1e-3,
    batch_size=2,
    resolution="64",
    seed=3,
    train_placeholder_token=True,
    quantization="none",
)
PREVIEW_PROMPTS = "a photo of <zwx> on a cyan background\na red circle"


def make_state(config: TrainConfig, dataset: Dataset, model: Path, **job: Any) -> TrainState:
    """Set a run up, on the CPU unless `placement` says otherwise."""
    given = {"placement": default_placement(), "tokenizer": load_tokenizer(model), "shapes": read_shapes(model), **job}
    return setup(TrainJob(config, dataset, model, **given))


def resume_state(config: TrainConfig, dataset: Dataset, model: Path, checkpoint: Path, **job: Any) -> TrainState:
    """Set a run up as a checkpoint has left it, with the plan that it keeps."""
    found = read_checkpoint(checkpoint)
    state = make_state(config, dataset, model, plan=found.plan, **job)
    restore_checkpoint(state, found)
    return state


def use_pefts_layers(transformer: nn.Module) -> None:
    """Put peft's LoRA layers in place of ours, with the same parameters."""
    own = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLinear | DoraLinear)}
    for name, layer in own.items():
        transformer.set_submodule(name, layer.base_layer)
    first = next(iter(own.values()))
    config = LoraConfig(
        r=len(first.down), lora_alpha=first.alpha, target_modules=list(own), use_dora=isinstance(first, DoraLinear)
    )
    inject_adapter_in_model(config, transformer)
    for name, layer in own.items():
        theirs = transformer.get_submodule(name)
        theirs.lora_A["default"].weight, theirs.lora_B["default"].weight = layer.down, layer.up
        if isinstance(layer, DoraLinear):
            theirs.lora_magnitude_vector["default"].weight = layer.magnitude


def losses(state: TrainState, count: int | None = None) -> list[float]:
    """Take so many steps, or all that are left. -> the loss of each"""
    found = []
    for report in loop.train(state):
        found.append(report.loss)
        if len(found) == count:
            break
    return found


def same_result(one: TrainState, other: TrainState) -> bool:
    """Return whether two runs have learned the same, bit for bit."""
    a, b = final_lora(one), final_lora(other)
    layers = all(
        torch.equal(mine, other)
        for name in a.layers
        for mine, other in zip(tensors_of(a.layers[name]), tensors_of(b.layers[name]), strict=True)
    )
    return layers and all(torch.equal(a.embeddings[token], b.embeddings[token]) for token in a.embeddings)


def inputs(
    config: TrainConfig,
    dataset: Path,
    options: RunOptions | None = None,
    init_weights: Path | None = None,
    hub_token: str | None = None,
) -> TrainInputs:
    """Return a training's inputs from parts that are validated already."""
    return TrainInputs(config, options or RunOptions(), TrainFiles(dataset, init_weights, hub_token))


def train_archive(
    config: TrainConfig, dataset: Path, target: Path, options: RunOptions | None = None, **given: Any
) -> Path:
    """Train in this process, from an archive to weights.zip."""
    stopped = {"stopped": given.pop("stopped")} if "stopped" in given else {}
    return train_in_process(inputs(config, dataset, options, **given), target, **stopped)


def lora_of(weights: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the LoRA file's bytes, and all that meta.json says but when it was written."""
    with zipfile.ZipFile(weights) as packed:
        meta = json.loads(packed.read(META_MEMBER))
        return packed.read(LORA_MEMBER), {name: value for name, value in meta.items() if name != "created"}


def without_thumbnail(lora: bytes) -> tuple[dict[str, str], bytes]:
    """Return a LoRA file's header but for its thumbnail, which previews leave there, and all of its tensors' bytes."""
    (length,) = struct.unpack("<Q", lora[:8])
    header = json.loads(lora[8 : 8 + length])["__metadata__"]
    return {name: value for name, value in header.items() if name != "modelspec.thumbnail"}, lora[8 + length :]


def job_of(request: SampleRequest, size: Size, **options: Any) -> SamplingJob:
    """Return a sampling job without a token."""
    return SamplingJob(request, size, no_placeholders(), SamplingOptions(**options))
