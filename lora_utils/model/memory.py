"""Memory by arithmetic: what a step keeps for its backward pass, and how many blocks must be checkpointed to fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# What a block keeps per token, in widths D, counted on these blocks (tests/model/test_blocks.py): the inputs of its two
# norms, q and k before their norms, attention's q, k, v and output, and the GELU's input (4), less what two of them
# share. diffusers' own keep 20.3 with LoRAs on attention, and 25.6 with more on the MLPs, under bf16 autocast.
FROZEN_WIDTHS = 12.1
# What an adapter adds, by the layers of both streams that share it: their input, and for DoRA and LoKr their output
# once more. The output layer's input is attention's output, which is kept anyway.
_QKV, _OUT = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"), ("to_out.0", "to_add_out")
_INPUT_WIDTHS = {_QKV: 1.0, _OUT: 0.0, ("net.0.proj",): 1.0, ("net.2",): 4.0}
_OUTPUT_WIDTHS = {
    ("to_q", "add_q_proj"): 1.0,
    ("to_k", "add_k_proj"): 1.0,
    ("to_v", "add_v_proj"): 1.0,
    _OUT: 1.0,
    ("net.0.proj",): 4.0,
    ("net.2",): 1.0,
}
BOUNDARY_WIDTHS = 1.0  # a checkpointed block's input
WORKING_WIDTHS = 8.0  # of one block on its way back: mostly the GELU's gradient, before and after it (8)
SAMPLING_WIDTHS = 12.0  # of one block on its way without a backward pass, and the image itself
# What decoding keeps at once, in images of the VAE's width: 7.03 in bf16 and 6.01 in fp32 counted on the folded VAE
# (tests/model/test_memory_estimate.py), and room for a convolution's own workspace. Measured in bf16 on a CPU, at the
# true size: 1.5 GB for 1024x1024 and 2.5 GB for 1328x1328, which is 7.5.
DECODE_WIDTHS = 7.5
_LORA_BYTES = 4  # of a LoRA's weight, fp32
SPARE_BYTES = 1.5e9  # the driver's, the libraries' workspaces, fragments


def kept_widths(layers: Iterable[str], adapter: str) -> float:
    """Return what a block keeps per token, in widths D, with an adapter on these of its layers, by their names in it.

    A layer of one stream counts for both: text is short beside an image.
    """
    names = list(layers)

    def added(widths: Mapping[tuple[str, ...], float]) -> float:
        return sum(width for ends, width in widths.items() if any(name.endswith(ends) for name in names))

    return FROZEN_WIDTHS + added(_INPUT_WIDTHS) + (0.0 if adapter == "lora" else added(_OUTPUT_WIDTHS))


@dataclass(frozen=True, slots=True)
class StepSize:
    """What the memory of a step follows from."""

    width: int
    tokens: int  # text and image of the largest batch
    kept: tuple[float, ...]  # by block, what `kept_widths` says
    element_bytes: int
    lora_parameters: int
    bytes_per_weight: float = 12.0  # of the LoRA, what gradient and optimizer hold: AdamW's

    @property
    def blocks(self) -> int:
        """The number of transformer blocks."""
        return len(self.kept)

    def activation_bytes(self, checkpointed: int) -> float:
        """Return what is kept for the backward pass while `checkpointed` blocks keep only their input."""
        token_bytes = self.tokens * self.width * self.element_bytes
        kept = sum(self.kept[checkpointed:]) + checkpointed * BOUNDARY_WIDTHS
        working = WORKING_WIDTHS + (max(self.kept) if checkpointed == self.blocks else 0.0)
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
