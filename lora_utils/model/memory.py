"""Memory by arithmetic: what a step keeps for its backward pass, and how many blocks must be checkpointed to fit."""

from dataclasses import dataclass

# What a block keeps per token, in widths D: the inputs of its two norms, of q/k/v's and of the output layer's LoRA, q
# and k before their norms, attention's q, k, v and output (10), and the GELU's input (4), less what two of them share.
# Counted on these blocks (tests/model/test_blocks.py); diffusers' own keep 20.3 and 25.6 under bf16 autocast.
KEPT_WIDTHS = {"attention": 13.1, "attention_mlp": 18.1}
BOUNDARY_WIDTHS = 1.0  # a checkpointed block's input
WORKING_WIDTHS = 8.0  # of one block on its way back: mostly the GELU's gradient, before and after it (8)
SAMPLING_WIDTHS = 12.0  # of one block on its way without a backward pass, and the image itself
# What decoding keeps at once, in images of the VAE's width: 7.03 in bf16 and 6.01 in fp32 counted on the folded VAE
# (tests/model/test_memory_estimate.py), and room for a convolution's own workspace. Measured in bf16 on a CPU, at the
# true size: 1.5 GB for 1024x1024 and 2.5 GB for 1328x1328, which is 7.5.
DECODE_WIDTHS = 7.5
_LORA_BYTES = 4  # of a LoRA's weight, fp32
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

    def activation_bytes(self, checkpointed: int) -> float:
        """Return what is kept for the backward pass while `checkpointed` blocks keep only their input."""
        token_bytes = self.tokens * self.width * self.element_bytes
        kept = (self.blocks - checkpointed) * KEPT_WIDTHS[self.targets] + checkpointed * BOUNDARY_WIDTHS
        working = WORKING_WIDTHS + (KEPT_WIDTHS[self.targets] if checkpointed == self.blocks else 0.0)
        return token_bytes * (kept + working) + self._cast_bytes(checkpointed)

    def _cast_bytes(self, checkpointed: int) -> float:
        """Return what the LoRA's weights take that were cast to a smaller dtype, and are kept for the backward pass."""
        if self.element_bytes >= _LORA_BYTES:
            return 0.0
        return self.element_bytes * self.lora_parameters * (1 - checkpointed / self.blocks)

    @property
    def optimizer_bytes(self) -> float:
        """The gradient and what the optimizer keeps of each weight."""
        return self.bytes_per_weight * self.lora_parameters

    def needed_bytes(self, checkpointed: int) -> float:
        """Return what a step needs beyond the model's weights."""
        return self.activation_bytes(checkpointed) + self.optimizer_bytes


def sampling_bytes(tokens: int, width: int, element_bytes: int) -> float:
    """Return what a forward without a backward pass needs for an image of so many tokens: one block on its way."""
    return float(tokens * width * element_bytes * SAMPLING_WIDTHS)


def decode_bytes(pixels: int, element_bytes: int, base_dim: int) -> float:
    """Return what a folded VAE of this width needs to decode an image: Qwen-Image's, of 96, 1.5 GB at 1024x1024."""
    return DECODE_WIDTHS * pixels * element_bytes * base_dim


def blocks_to_checkpoint(size: StepSize, free_bytes: float) -> int:
    """Return the fewest blocks that must be checkpointed for the step to fit; all of them where even that won't do."""
    usable = free_bytes - SPARE_BYTES
    return next((count for count in range(size.blocks) if size.needed_bytes(count) <= usable), size.blocks)


def more_blocks(checkpointed: int, blocks: int) -> int:
    """Return the next count after one that ran out of memory: a sixth of the blocks more."""
    return min(blocks, checkpointed + max(1, blocks // 6))
