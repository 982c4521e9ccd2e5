"""The video VAE for a single frame: the folding of its temporal convolutions, and encoding and decoding with it.

`AutoencoderKLQwenImage` is causal in time: for the first frame, the earlier taps of each temporal kernel only ever
see zeros. An image is one frame, so keeping the last tap is exact, and a third of the multiplications remain.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from PIL import Image
from torch import Tensor, nn

from lora_utils.errors import UserError
from lora_utils.model.device import Placement, freeze_on_device
from lora_utils.model.latents import Size, pack_latents, unpack_latents


def load_vae(folder: Path, placement: Placement) -> AutoencoderKLQwenImage:
    """Load the VAE of a model folder with its temporal convolutions folded, which is exact for images."""
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=placement.dtype)
    freeze_on_device(fold_temporal_convolutions(vae), placement)
    return vae


def _latent_statistics(vae: AutoencoderKLQwenImage, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and std per latent channel, [1, 16, 1, 1] each."""
    mean, std = (torch.tensor(values).to(like) for values in (vae.config["latents_mean"], vae.config["latents_std"]))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


@torch.no_grad()
def encode_images(vae: AutoencoderKLQwenImage, pixels: Tensor) -> Tensor:
    """Encode pixels [B, 3, H, W] in -1 to 1 as normalised packed latents [B, N, C] fp32: the mode, not a sample."""
    latents = encode_frame(vae, pixels.to(vae.device, vae.dtype))[0].float()  # [B, 16, H/8, W/8]
    mean, std = _latent_statistics(vae, latents)
    return pack_latents((latents - mean) / std)


@torch.no_grad()
def decode_latents(vae: AutoencoderKLQwenImage, latents: Tensor, size: Size) -> Tensor:
    """Decode normalised packed latents [B, N, C] into pixels [B, 3, H, W], mostly in -1 to 1."""
    grid = unpack_latents(latents, size).to(vae.device, vae.dtype)  # [B, 16, H/8, W/8]
    mean, std = _latent_statistics(vae, grid)
    return decode_frame(vae, grid * std + mean)


@torch.no_grad()
def decode_images(vae: AutoencoderKLQwenImage, latents: Tensor, size: Size) -> list[Image.Image]:
    """Decode normalised packed latents [B, N, C] into images. Raises UserError where they aren't finite."""
    if not torch.isfinite(latents).all():
        raise UserError("the image came out as NaN or infinity; lower lora_scale or guidance.")
    frames = decode_latents(vae, latents, size)  # [B, 3, H, W]
    pixels = ((frames.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(own) for own in pixels]


class _LastTap(nn.Module):
    """It applies a causal 3-D convolution to one frame [B, C, 1, H, W], as the 2-D convolution by its last tap."""

    def __init__(self, convolution: QwenImageCausalConv3d):
        super().__init__()
        self.weight = nn.Parameter(convolution.weight[:, :, -1].detach().clone())  # [C_out, C_in, k, k]
        self.bias = convolution.bias
        # (left, right, top, bottom, ...): the spatial part is symmetric.
        self.padding: tuple[int, int] = (int(convolution._padding[2]), int(convolution._padding[0]))

    def forward(self, frame: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if frame.shape[2] != 1:
            raise ValueError(f"a folded VAE takes one frame, got {frame.shape[2]}")
        return F.conv2d(frame[:, :, 0], self.weight, self.bias, padding=self.padding).unsqueeze(2)


def fold_temporal_convolutions(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Replace, in place, every temporal convolution that a single frame runs through. Exact for one frame.

    The resamplers' `time_conv` never runs on the first frame and stays as it is. A VAE that is to be saved needs
    `unfolded_state`.
    """
    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QwenImageCausalConv3d) and name != "time_conv":
                setattr(parent, name, _LastTap(child))
    return vae


def unfolded_state(vae: AutoencoderKLQwenImage) -> dict[str, Tensor]:
    """Return the state dict of the 3-D VAE that folds to this one. Earlier taps, which an image never uses, are 0."""
    state = vae.state_dict()
    for name, module in vae.named_modules():
        if isinstance(module, _LastTap):
            taps = 3 if module.weight.shape[-1] == 3 else 1  # kernels are 3x3x3 or 1x1x1
            last = state[f"{name}.weight"]
            earlier = torch.zeros_like(last).unsqueeze(2).repeat(1, 1, taps - 1, 1, 1)
            state[f"{name}.weight"] = torch.cat([earlier, last.unsqueeze(2)], dim=2)
    return state


def encode_frame(vae: AutoencoderKLQwenImage, frame: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and log-variance of the latents, [B, 16, H/8, W/8] each, of a frame [B, 3, H, W] in -1 to 1.

    It goes straight through the encoder: the caches of `vae.encode` carry frames over, and there is no other frame.
    """
    moments = vae.quant_conv(vae.encoder(frame.unsqueeze(2)))[:, :, 0]
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)  # the bounds of diffusers' DiagonalGaussianDistribution


def decode_frame(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Decode latents [B, 16, H/8, W/8] into a frame [B, 3, H, W], about -1 to 1 and not clamped."""
    return vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)))[:, :, 0]
