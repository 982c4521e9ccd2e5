"""LoRA fine-tuning and sampling of Qwen-Image. The rooms and their floors: README, "How it is built"."""

import logging
import warnings

# Told at every import of diffusers, of kernels for other cards than this one; they would head each run's log.
for _library in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers"):
    logging.getLogger(_library).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # it can't merge; nothing here does
