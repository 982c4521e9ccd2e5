"""Make `tiny_qwen_image`, the small model of the drawn world, from nothing: a tokenizer, a VAE, then the rest.

    python -m examples.pretrain                 # all stages; resumes where it was stopped
    python -m examples.pretrain --stage vae     # one stage
    python -m examples.pretrain --edit          # `tiny_qwen_image_edit`, from the small model: see pretrain_edit.py
    python -m examples.pretrain --start examples/tiny_qwen_image --steps 4000 --out build/longer  # train it longer

Each stage logs to standard output and keeps its checkpoints in `build/pretrain/`; the finished folder is written by
the last one.

The shipped model was made by these settings on 2 cores of an AMD EPYC, without a GPU, on 2026-11-23: the VAE's 3000
steps took 14 minutes and end at 34.3 dB on 96 drawings of the world it hasn't seen (31.6 dB on random ones); encoding
the world's 32768 images took 3 minutes; the 5000 steps of text encoder and transformer took an hour, the first
2000 of them on one core at 0.9 s a step, then, resumed, 3000 on both at 0.6.
"""

import argparse
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from examples import pretrain_edit, shapes, small_model
from examples.edit_pairs import CPU
from examples.pretrain_vae import (
    WORK,
    VaeSettings,
    log,
    save_checkpoint,
    to_tensor,
    train_averaged,
    train_vae,
    trained_vae,
)
from lora_utils import constants
from lora_utils.model import flow
from lora_utils.model.latents import pack_latents
from lora_utils.model.vae import encode_frame, load_vae, unfolded_state

OUT = Path(__file__).parent / "tiny_qwen_image"


@dataclass(frozen=True, slots=True)
class ModelSettings:
    steps: int = 5000
    captions: int = 32  # a batch: so many captions, each with its image ...
    draws: int = 3  # ... at so many draws of noise and sigma; the text encoder runs once for all of them
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    images: int = 32768


@dataclass(frozen=True, slots=True)
class World:
    """The training set: normalised packed latents [P, 16, 64], each image's wordings, the latents' statistics."""

    latents: Tensor
    wordings: list[list[str]]
    latents_mean: Tensor
    latents_std: Tensor


def encode_world(vae: AutoencoderKLQwenImage, images: int, seed: int = 7) -> World:
    """Draw the world and encode it once. Held-out prompts are skipped. Kept in the work folder."""
    kept = WORK / f"world_{images}_{seed}.pt"
    if kept.exists():
        return World(**torch.load(kept))
    rng = np.random.default_rng(seed)
    wordings, latents = [], []
    while len(wordings) < images:
        drawn = []
        while len(drawn) < 64:
            prompt = shapes.random_prompt(rng)
            if not shapes.is_held_out(prompt):
                drawn.append(shapes.draw(shapes.scene_of(prompt, rng)))
                wordings.append(prompt.wordings())
        with torch.no_grad():
            latents.append(encode_frame(vae, to_tensor(drawn))[0])
    stacked = torch.cat(latents)  # [P, 16, 8, 8]
    mean, std = stacked.mean(dim=(0, 2, 3)), stacked.std(dim=(0, 2, 3))
    normal = pack_latents((stacked - mean[:, None, None]) / std[:, None, None])
    world = {"latents": normal, "wordings": wordings, "latents_mean": mean, "latents_std": std}
    save_checkpoint(kept, world)
    log(f"world: {len(wordings)} images encoded, mean std {std.mean():.3f}")
    return World(**world)


def encode_captions(text_encoder: nn.Module, tokenizer: Qwen2Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """-> states [B, T, 128] and mask [B, T], right-padded: with causal attention padding changes nothing before it."""
    ids = [tokenizer(constants.TEMPLATE_PREFIX + caption + constants.TEMPLATE_SUFFIX).input_ids for caption in captions]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]).bool()
    states = text_encoder(input_ids=padded, use_cache=False).last_hidden_state
    dropped = constants.TEMPLATE_PREFIX_TOKENS
    return states[:, dropped:] * mask[:, dropped:, None], mask[:, dropped:]


def said(wordings: list[str], rng: random.Random, caption_dropout: float) -> str:
    """One of the wordings, none at all, or one with a stray space, as people's captions have them."""
    if rng.random() < caption_dropout:
        return rng.choice(["", " "])
    words = rng.choice(wordings).split(" ")
    if len(words) > 1 and rng.random() < 0.15:
        words.insert(rng.randrange(1, len(words)), "")
    return " ".join(words)


def learning_rate_factor(step: int, settings: ModelSettings) -> float:
    """Warm-up, constant, then a straight line to zero over the last 40 %."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    return min(1.0, (settings.steps - step) / (0.4 * settings.steps))


def world_of(settings: ModelSettings, start: Path | None) -> World:
    """Return the training set: as a model that goes on sees it, other images, by its own VAE and statistics."""
    if start is None:
        return encode_world(trained_vae(), settings.images)
    vae = load_vae(start, CPU)
    world = encode_world(vae, settings.images, seed=8)
    config: Any = vae.config
    mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    # A token has the 2 x 2 positions of each channel side by side.
    packed_mean, packed_std = mean.repeat_interleave(4), std.repeat_interleave(4)
    raw = world.latents * world.latents_std.repeat_interleave(4) + world.latents_mean.repeat_interleave(4)
    return World((raw - packed_mean) / packed_std, world.wordings, mean, std)


def new_network(start: Path | None) -> tuple[Qwen2Tokenizer, Qwen2_5_VLForConditionalGeneration, nn.ModuleDict]:
    """Return the tokenizer, the text encoder and what learns of it and the transformer; with a start's weights."""
    torch.manual_seed(0)
    tokenizer = small_model.train_tokenizer()
    text_encoder, transformer = small_model.new_text_encoder(tokenizer), small_model.new_transformer()
    if start:
        text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(start / "text_encoder", dtype=torch.float32)
        transformer = QwenImageTransformer2DModel.from_pretrained(start / "transformer", torch_dtype=torch.float32)
    parts = {"text": text_encoder.model.language_model, "transformer": transformer}
    return tokenizer, text_encoder, nn.ModuleDict(parts)


def checkpoint_name(start: Path | None) -> str:
    """Return a name of its own for a run that goes on from a model, which must not resume the first one."""
    return "model" if start is None else "longer"


def train_model(settings: ModelSettings, start: Path | None = None) -> Path:
    """Text encoder and transformer together, by flow matching on the frozen VAE's latents."""
    world = world_of(settings, start)
    tokenizer, _, network = new_network(start)
    schedule, grid, checkpoint = flow.Schedule(), [(1, 4, 4)], checkpoint_name(start)

    def new_loss(start: int) -> Callable[[], Tensor]:
        rng, generator = random.Random(start + 1), torch.Generator().manual_seed(start + 1)

        def loss() -> Tensor:
            chosen = torch.randint(len(world.wordings), (settings.captions,), generator=generator)
            captions = [said(world.wordings[i], rng, settings.caption_dropout) for i in chosen]
            text, mask = encode_captions(network["text"], tokenizer, captions)
            rows = torch.arange(settings.captions).repeat(settings.draws)
            clean = world.latents[chosen][rows]
            noise = torch.randn(clean.shape, generator=generator)
            sigma = flow.sample_sigmas(len(rows), schedule.mu(clean.shape[1]), generator)
            velocity = network["transformer"](
                hidden_states=flow.add_noise(clean, noise, sigma),
                timestep=flow.model_time(sigma, torch.float32),
                encoder_hidden_states=text[rows],
                encoder_hidden_states_mask=mask[rows],
                img_shapes=[grid] * len(rows),
                return_dict=False,
            )[0]
            return F.mse_loss(velocity, flow.velocity_target(clean, noise))

        return loss

    return train_averaged(checkpoint, network, settings, lambda s: learning_rate_factor(s, settings), new_loss, 500)


def write_model(out: Path, settings: ModelSettings, start: Path | None = None) -> None:
    """The diffusers folder: EMA weights; transformer and VAE stored as fp16, which loads back as fp32."""
    if start:
        vae = AutoencoderKLQwenImage.from_pretrained(start / "vae")
    else:
        world = encode_world(trained_vae(), settings.images)
        vae = small_model.new_vae(world.latents_mean.tolist(), world.latents_std.tolist())
        vae.load_state_dict(unfolded_state(trained_vae()))
    tokenizer, text_encoder, network = new_network(start)
    network.load_state_dict(torch.load(WORK / f"{checkpoint_name(start)}.pt")["ema"])
    transformer = cast(QwenImageTransformer2DModel, network["transformer"])
    if out.exists():
        for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
            shutil.rmtree(out / part, ignore_errors=True)
    pipeline = QwenImagePipeline(small_model.new_scheduler(), vae.half(), text_encoder, tokenizer, transformer.half())
    pipeline.save_pretrained(out)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    log(f"wrote {out}: {size / 1e6:.1f} MB of safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["vae", "model", "write"], help="one stage alone; all of them if left out")
    parser.add_argument("--edit", action="store_true", help="make the editing model in place of all that")
    parser.add_argument("--start", type=Path, help="go on from this model, with --edit from this editing model")
    parser.add_argument("--steps", type=int, help="of the model's training, or of the editing model's")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.edit:
        editing = pretrain_edit.EditSettings()
        editing = replace(editing, steps=arguments.steps or editing.steps)
        pretrain_edit.train_edit(editing, arguments.start)
        pretrain_edit.write_edit(arguments.out or pretrain_edit.OUT)
        return
    settings = replace(ModelSettings(), steps=arguments.steps or ModelSettings().steps)
    if arguments.stage == "vae" or (arguments.stage is None and arguments.start is None):
        train_vae(VaeSettings())
    if arguments.stage in (None, "model"):
        train_model(settings, arguments.start)
    if arguments.stage in (None, "write"):
        write_model(arguments.out or OUT, settings, arguments.start)


if __name__ == "__main__":
    main()
