"""The first stage of pretraining: the small model's autoencoder. Also owns what both stages share.

Half the images are the world's, half are random drawings, for users' objects must survive it too.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn
from torch.nn.utils import parametrize

from examples import shapes, small_model, things
from lora_utils.model.vae import decode_frame, encode_frame, fold_temporal_convolutions

WORK = Path("build/pretrain")


@dataclass(frozen=True, slots=True)
class VaeSettings:
    steps: int = 3000
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    random_share: float = 0.5  # of the images are random drawings
    edge_weight: float = 0.5
    kl_weight: float = 1e-4  # per latent element, against a mean absolute error per pixel channel


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def to_tensor(images: list[shapes.Pixels]) -> Tensor:
    """-> [B, 3, H, W] in -1 to 1."""
    stacked = torch.from_numpy(np.stack(images)).float() / 127.5 - 1.0
    return stacked.permute(0, 3, 1, 2).contiguous()


def world_image(rng: np.random.Generator) -> shapes.Pixels:
    return shapes.draw(shapes.scene_of(shapes.random_prompt(rng), rng))


def random_or_world_image(rng: np.random.Generator, random_share: float) -> shapes.Pixels:
    return things.random_drawing(rng) if rng.random() < random_share else world_image(rng)


def anneal(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then half a cosine to zero: the factor on the learning rate."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def save_checkpoint(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def set_rates(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def update(optimizers: list[torch.optim.Optimizer], loss: Tensor, network: nn.Module) -> None:
    """One step down the gradient of `loss`, clipped at a norm of 1."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


class Stage(Protocol):
    """What the settings of a stage with an averaged network say."""

    @property
    def steps(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def ema_decay(self) -> float: ...


def train_averaged(
    name: str,
    network: nn.Module,
    settings: Stage,
    rate_factor: Callable[[int], float],
    new_loss: Callable[[int], Callable[[], Tensor]],
    save_every: int,
) -> Path:
    """Train a network and keep its moving average; resumes where it was stopped. -> the checkpoint

    `new_loss(start)` returns what computes the loss of each step from step `start` on. A checkpoint is written every
    `save_every` steps, and after the last one.
    """
    checkpoint = WORK / f"{name}.pt"
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizers, start = muon_and_adamw(network.named_parameters(), settings.learning_rate), 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        start = state["step"]
        log(f"{name}: resumed at step {start}")
    next_loss, began, losses = new_loss(start), time.monotonic(), []
    for step in range(start, settings.steps):
        set_rates(optimizers, settings.learning_rate * rate_factor(step))
        loss = next_loss()
        update(optimizers, loss, network)
        decay = min(settings.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            log(f"{name} step {step + 1}/{settings.steps} loss {np.mean(losses[-100:]):.4f} {seconds:.3f} s/step")
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            kept = [optimizer.state_dict() for optimizer in optimizers]
            state = {"network": network.state_dict(), "ema": ema.state_dict(), "optimizers": kept, "step": step + 1}
            save_checkpoint(checkpoint, state)
    return checkpoint


# --- the autoencoder ----------------------------------------------------------------------------------------------


def psnr_db(vae: AutoencoderKLQwenImage, images: Tensor) -> float:
    """Of images in -1 to 1, encoded and decoded."""
    with torch.no_grad():
        decoded = decode_frame(vae, encode_frame(vae, images)[0]).clamp(-1, 1)
    return float(10 * torch.log10(4.0 / (decoded - images).pow(2).mean()))


class _Flat(nn.Module):
    """A convolution's weight kept as a matrix [C_out, C_in * k * k]: what Muon takes."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape

    def forward(self, flat: Tensor) -> Tensor:
        return flat.view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)


def flatten_convolutions(vae: nn.Module) -> None:
    for module in list(vae.modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 4:
            parametrize.register_parametrization(module, "weight", _Flat(weight.shape), unsafe=True)


def muon_and_adamw(named: Iterable[tuple[str, nn.Parameter]], learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices named, AdamW for the rest; at width 128 Muon needs some half of AdamW's steps."""
    matrices, rest = [], []
    for name, parameter in named:
        inner = any(part in name for part in (".layers.", ".transformer_blocks.", ".parametrizations."))
        (matrices if inner and parameter.ndim == 2 else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))]


def vae_loss(vae: AutoencoderKLQwenImage, x: Tensor, settings: VaeSettings) -> Tensor:
    """Absolute and squared error, the error of edges, and a little KL, of images decoded from a draw of latents."""
    mean, log_variance = encode_frame(vae, x)
    y = decode_frame(vae, mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance))
    kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).mean()
    error = y - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.pow(2).mean() + settings.edge_weight * edges + settings.kl_weight * kl


def train_vae(settings: VaeSettings) -> Path:
    """On the world's images and on random drawings: users' objects must survive it too."""
    checkpoint = WORK / "vae.pt"
    torch.manual_seed(0)
    vae = fold_temporal_convolutions(small_model.new_vae())
    flatten_convolutions(vae)
    optimizers = muon_and_adamw(vae.named_parameters(), settings.learning_rate)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        vae.load_state_dict(state["vae"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        start = state["step"]
        log(f"vae: resumed at step {start}")
    rng = np.random.default_rng(start + 1)
    held_out = np.random.default_rng(0)
    test_world = to_tensor([world_image(held_out) for _ in range(96)])
    test_random = to_tensor([things.random_drawing(held_out) for _ in range(48)])
    compiled_loss = torch.compile(vae_loss)  # a third faster on two cores
    began = time.monotonic()
    for step in range(start, settings.steps):
        batch = [random_or_world_image(rng, settings.random_share) for _ in range(settings.batch_size)]
        loss = compiled_loss(vae, to_tensor(batch), settings)
        set_rates(optimizers, settings.learning_rate * anneal(step, settings.steps, settings.warmup_steps))
        update(optimizers, loss, vae)
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            psnr = f"psnr world {psnr_db(vae, test_world):.2f} random {psnr_db(vae, test_random):.2f}"
            log(f"vae step {step + 1}/{settings.steps} loss {loss.item():.4f} {psnr} {seconds:.2f} s/step")
        if (step + 1) % 200 == 0 or step + 1 == settings.steps:
            kept = [optimizer.state_dict() for optimizer in optimizers]
            save_checkpoint(checkpoint, {"vae": vae.state_dict(), "optimizers": kept, "step": step + 1})
    return checkpoint


def trained_vae() -> AutoencoderKLQwenImage:
    """The folded VAE of the finished first stage, its convolutions plain again."""
    vae = fold_temporal_convolutions(small_model.new_vae())
    flatten_convolutions(vae)
    vae.load_state_dict(torch.load(WORK / "vae.pt")["vae"])
    for module in list(vae.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return vae
