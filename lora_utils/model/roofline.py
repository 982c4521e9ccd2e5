"""How long a training step takes at least on a GPU, by its data sheet: what the memory plan weighs its choices with.

The formula follows the traces of `benchmarks.trace` to 3 % (tests/model/test_roofline.py): products and attention at
the speed that large ones reach, or at the memory's where they are small, and all other passes at the memory's speed.
A real step takes longer, by launches and by what kernels lose.

Legend: N image tokens, T text tokens, S = T + N, D width.
"""

from dataclasses import dataclass

import torch

from lora_utils.model.flops import Shape
from lora_utils.model.quantization import WEIGHT_BYTES

REACHED = 0.8  # of a data sheet's peak that large products reach: 790 of the H200's 989 TFLOP/s were measured


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its data sheet: dense bf16 operations a second with fp32 sums, and bytes a second of its memory."""

    name: str
    peak: float
    bandwidth: float

    @property
    def reached(self) -> float:
        """The operations a second that large matrix products reach."""
        return REACHED * self.peak


# NVIDIA's data sheets (H200, H100 SXM, A100 80GB SXM, L40S, A10 for the A10G) and its Ada whitepaper (RTX 4090).
GPUS = (
    Gpu("H200", 989e12, 4.8e12),
    Gpu("H100", 989e12, 3.35e12),
    Gpu("A100", 312e12, 2.04e12),
    Gpu("L40S", 362e12, 0.864e12),
    Gpu("RTX 4090", 165e12, 1.008e12),
    Gpu("A10G", 70e12, 0.6e12),
)
_BYTES = 2  # of a bf16 number

# What a block's other kernels read and write, in widths D for each token, with a LoRA of rank 32, and what they do once
# more where it is checkpointed. Counted by `benchmarks.trace`.
OTHER_WIDTHS = {"attention": 99.5, "attention_mlp": 155.0}
COMPILED_WIDTHS = {"attention": 91.0, "attention_mlp": 136.0}
AGAIN_WIDTHS = {"attention": 36.5, "attention_mlp": 53.5}
OPTIMIZER_BYTES = 40.0  # for each weight of the LoRA: clipping reads and writes its gradient, AdamW seven numbers


@dataclass(frozen=True, slots=True)
class Step:
    """What a training step's time follows from, beside the GPU: the model, one image and its caption, and the plan."""

    shape: Shape
    image_tokens: int
    text_tokens: int
    targets: str = "attention"
    lora_parameters: int = 0
    checkpointed: int = 0  # blocks
    quantization: str = "none"
    compiled: bool = False

    def seconds(self, gpu: Gpu) -> float:
        """Return how long the step takes at least."""
        shape, again = self.shape, self.checkpointed
        width, tokens = shape.width, self.image_tokens + self.text_tokens

        # Products: a block's two streams forward and backward, less what no gradient needs, and once more where
        # checkpointed. Attention is two products of [S, D] with [D, S], and five on the way back.
        streams = [self._stream(gpu, count) for count in (self.image_tokens, self.text_tokens)]
        first = 3 * sum(_linear(gpu, count, width, width) for count in (self.image_tokens, self.text_tokens))
        last = streams[1] - 3 * _linear(gpu, self.text_tokens, width, width)
        products = (2 * shape.blocks + again) * sum(streams) - first - last
        attention = (14 * shape.blocks + 4 * again) * tokens**2 * width / gpu.reached

        # All else, at the memory's speed.
        others = (COMPILED_WIDTHS if self.compiled else OTHER_WIDTHS)[self.targets]
        passes = (shape.blocks * others + again * AGAIN_WIDTHS[self.targets]) * tokens * width * _BYTES
        moved = passes + OPTIMIZER_BYTES * self.lora_parameters
        if self.quantization != "none":
            moved += (2 * shape.blocks + again) * dense_bytes(width, self.quantization)
        return products + attention + moved / gpu.bandwidth

    def _stream(self, gpu: Gpu, tokens: int) -> float:
        """Return the seconds of one stream's products in a block: four of D x D, and the MLP's two of D x 4 D."""
        width = self.shape.width
        mlp = _linear(gpu, tokens, width, 4 * width) + _linear(gpu, tokens, 4 * width, width)
        return 4 * _linear(gpu, tokens, width, width) + mlp


def _linear(gpu: Gpu, tokens: int, inner: int, outer: int) -> float:
    """Return the seconds of a layer on [tokens, inner]: its product's, or its bytes' if they take longer."""
    moved = _BYTES * (inner * outer + tokens * (inner + outer))
    return max(2 * tokens * inner * outer / gpu.reached, moved / gpu.bandwidth)


def dense_bytes(width: int, scheme: str) -> float:
    """Return what making a block's quantised weights dense moves: it reads them, and writes them in bf16.

    They are 20 D^2: attention's eight layers, the image MLP's first layer and both of the text's (12 D^2).
    """
    return 20 * width**2 * (WEIGHT_BYTES[scheme] + _BYTES)


def find_gpu(device: torch.device) -> Gpu | None:
    """Return the data sheet of a GPU; None for one that isn't listed, and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu for gpu in GPUS if gpu.name.removeprefix("RTX ") in name), None)
