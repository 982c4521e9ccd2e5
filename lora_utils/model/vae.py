"""The video VAE for a single frame: owns the folding of its temporal convolutions, and encoding and decoding with it.

`AutoencoderKLQwenImage` is causal in time: for the first frame, the earlier taps of each temporal kernel only ever
see zeros. A picture is one frame, so keeping the last tap is exact, and a third of the multiplications remain.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn


class _LastTap(nn.Module):
    """A causal 3-D convolution applied to one frame [B, C, 1, H, W], as the 2-D convolution by its last tap."""

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

    The resamplers' `time_conv` never runs on the first frame and stays as it is. Not for a VAE that is to be saved:
    see `unfolded_state`.
    """
    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QwenImageCausalConv3d) and name != "time_conv":
                setattr(parent, name, _LastTap(child))
    return vae


def unfolded_state(vae: AutoencoderKLQwenImage) -> dict[str, Tensor]:
    """The state dict of the 3-D VAE that folds to this one: the earlier taps, which a picture never uses, are zero."""
    state = vae.state_dict()
    for name, module in vae.named_modules():
        if isinstance(module, _LastTap):
            taps = 3 if module.weight.shape[-1] == 3 else 1  # kernels are 3x3x3 or 1x1x1
            last = state[f"{name}.weight"]
            earlier = torch.zeros_like(last).unsqueeze(2).repeat(1, 1, taps - 1, 1, 1)
            state[f"{name}.weight"] = torch.cat([earlier, last.unsqueeze(2)], dim=2)
    return state


def encode_frame(vae: AutoencoderKLQwenImage, frame: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, H, W] in -1 to 1 -> mean and log-variance of the latents, [B, 16, H/8, W/8] each.

    Straight through the encoder: the caches of `vae.encode` carry frames over, and there is no other frame.
    """
    moments = vae.quant_conv(vae.encoder(frame.unsqueeze(2)))[:, :, 0]
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)  # the bounds of diffusers' DiagonalGaussianDistribution


def decode_frame(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """[B, 16, H/8, W/8] -> [B, 3, H, W], about -1 to 1; not clamped."""
    return vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)))[:, :, 0]
