"""Memory plans: what a step keeps for its backward pass, and how many blocks must recompute so that it fits.

Owns the arithmetic and what is asked of the device; must not know how a step runs.
"""

import resource
from dataclasses import dataclass

import psutil
import torch

# What a block keeps per token, in widths D: the inputs of its two norms, of q/k/v's and of the output layer's LoRA, q
# and k before their norms, attention's q, k, v and output (10), and the GELU's input (4), less what two of them share.
# Counted on these blocks (tests/test_blocks.py); diffusers' own keep 20.3 and 25.6 under bf16 autocast.
KEPT_WIDTHS = {"attention": 13.2, "attention_mlp": 18.2}
BOUNDARY_WIDTHS = 1.0  # a recomputed block's input
WORKING_WIDTHS = 24.0  # of one block on its way: the MLP's 4 D and its gradient, and what comes and goes around them
SPARE_BYTES = 1.5e9  # the driver's, the libraries' workspaces, fragments


@dataclass(frozen=True, slots=True)
class StepSize:
    """What the memory of a step follows from."""

    blocks: int
    width: int
    tokens: int  # text and image of the largest batch
    targets: str
    element_bytes: int
    lora_parameters: int
    bytes_per_weight: float = 12.0  # of the LoRA, what gradient and optimizer hold: AdamW's

    def activation_bytes(self, recomputed: int) -> float:
        """What is kept for the backward pass while `recomputed` blocks keep their input alone."""
        token_bytes = self.tokens * self.width * self.element_bytes
        kept = (self.blocks - recomputed) * KEPT_WIDTHS[self.targets] + recomputed * BOUNDARY_WIDTHS
        working = WORKING_WIDTHS + (KEPT_WIDTHS[self.targets] if recomputed == self.blocks else 0.0)
        return token_bytes * (kept + working)

    @property
    def optimizer_bytes(self) -> float:
        """The gradient and what the optimizer keeps of each weight."""
        return self.bytes_per_weight * self.lora_parameters

    def needed_bytes(self, recomputed: int) -> float:
        return self.activation_bytes(recomputed) + self.optimizer_bytes


def sampling_bytes(tokens: int, width: int, element_bytes: int) -> float:
    """What a forward without a backward pass needs for a picture of so many tokens: one block on its way."""
    return float(tokens * width * element_bytes * WORKING_WIDTHS)


def decode_bytes(pixels: int, element_bytes: int, base_dim: int) -> float:
    """What a VAE of this width needs to decode a picture: Qwen-Image's, of 96, 5.3 GB for 1024x1024 in bf16."""
    return 5.3e9 / 1024**2 / 2 / 96 * pixels * element_bytes * base_dim


def blocks_to_recompute(size: StepSize, free_bytes: float) -> int:
    """The fewest blocks that must recompute for the step to fit; all of them where even that won't do."""
    usable = free_bytes - SPARE_BYTES
    return next((count for count in range(size.blocks) if size.needed_bytes(count) <= usable), size.blocks)


def more_blocks(recomputed: int, blocks: int) -> int:
    """The next plan after one that ran out of memory: a sixth of the blocks more."""
    return min(blocks, recomputed + max(1, blocks // 6))


def free_bytes(device: torch.device) -> float:
    """What a new tensor can have: the card's free memory with what torch holds in reserve, or the host's."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def forget_peak(device: torch.device) -> None:
    """Count the card's peak from here on; the host's is the process's and can't be counted anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> float:
    """The most that was held: on the card since `forget_peak`, or of the host's memory by this process ever."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux
