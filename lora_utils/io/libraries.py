"""Other libraries, set up once for an entry point: what it imports of them, what they log, and what Pillow opens."""

import gc
import importlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_utils.io.deferred_imports import defer_compiler, defer_packages

# What a training and a server use of them.
_USED = (
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2.tokenization_qwen2",
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
)
# Packages whose own module lists, or imports, every model that there is.
_FACES = ("transformers.models", "diffusers.models.transformers", "diffusers.models.autoencoders")
# What diffusers and transformers import where it is installed, for what nothing here asks of them: they would quantise,
# or take peft's adapters. Their own users in this package import them when they are needed.
_OPTIONAL = ("bitsandbytes", "torchao", "peft")

# Other libraries' remarks on the base model's own files, which are right as they are: Qwen-Image's text encoder has its
# rotary settings twice in its config, and its transformer a field that nothing reads. Each is a logger with how its
# text begins, so that a remark on anything else is shown. docs/troubleshooting.md names them.
_NOISE = {
    "transformers.configuration_utils": r"Qwen2_5_VLConfig got `key=rope_scaling` in kwargs",
    "transformers.modeling_rope_utils": r"Unrecognized keys in `rope_parameters` for .*: \{'mrope_section'\}$",
    "diffusers.configuration_utils": r"The config attributes \{'pooled_projection_dim': \d+\} were passed",
}


def import_libraries() -> None:
    """Import of diffusers and transformers what this package uses, leave the rest until it is asked for, and configure.

    Their modules import torch's compiler, sympy, quantizers, peft and a list of all models: two thirds of a small
    run's seconds before its first step, and 200 MB. Afterwards diffusers' own LoRA loader and quantizers don't work in
    this process. Where diffusers or transformers is imported already, libraries are only configured.
    """
    if {"diffusers", "transformers"}.isdisjoint(sys.modules):
        import torch  # noqa: F401, PLC0415 (the compiler is a part of it)

        defer_compiler()
        with _seemingly_missing(_OPTIONAL), _one_process():
            defer_packages(*_FACES)
            for name in _USED:
                importlib.import_module(name)
        gc.freeze()  # what is imported stays: no collection needs to look at it again
    configure_libraries()


@contextmanager
def _seemingly_missing(packages: tuple[str, ...]) -> Iterator[None]:
    """Let packages that aren't imported yet seem not to be installed within it."""
    hidden = [name for name in packages if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))  # None: Python's sign for a module that can't be imported
    try:
        import diffusers.utils  # noqa: F401, PLC0415 (it looks which of them there are)

        yield
    finally:
        for name in hidden:
            del modules[name]


@contextmanager
def _one_process() -> Iterator[None]:
    """Let transformers leave its own ways to shard a model alone within it: they import sympy, and nobody asks."""
    import transformers.utils as face  # noqa: PLC0415
    from transformers.utils import import_utils  # noqa: PLC0415

    real = import_utils.is_torch_distributed_available
    face.is_torch_distributed_available = import_utils.is_torch_distributed_available = lambda: False
    try:
        yield
    finally:
        face.is_torch_distributed_available = import_utils.is_torch_distributed_available = real


def configure_libraries() -> None:
    """Set what other libraries log and open in this process.

    diffusers speaks of kernels for other GPUs at its import, and progress bars of carriage returns are noise in a
    server's log. Pillow learns to open heic, and refuses what is too large for `open_image`.
    """
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # it can't merge; nothing here does
    # Nothing here computes in place on what a sharded transformer returns, which is what this warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for name, pattern in _NOISE.items():
        logging.getLogger(name).addFilter(_WithoutNoise(pattern))

    from diffusers.utils.logging import disable_progress_bar  # noqa: PLC0415 (heavy, and only here)
    from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415
    from pillow_heif import register_heif_opener  # noqa: PLC0415
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    from lora_utils.io.images import MAX_PIXELS  # noqa: PLC0415

    disable_progress_bar()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    register_heif_opener()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class _WithoutNoise(logging.Filter):
    """A filter that drops the records whose text begins as a pattern says."""

    def __init__(self, pattern: str):
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())
