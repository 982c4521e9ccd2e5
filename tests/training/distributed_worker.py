"""One of several processes of a run, for test_distributed.py: trains, and prints its losses and its LoRA's hash.

python -m tests.training.distributed_worker MODEL IMAGES CONFIG_AS_JSON SHARD_BASE
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.lora.updates import tensors_of
from lora_utils.model.device import Placement
from lora_utils.model.memory_estimate import read_shapes
from lora_utils.model.text_encoder import load_tokenizer
from lora_utils.model.variant import read_variant
from lora_utils.training import distributed, loop
from lora_utils.training.setup import TrainJob, setup
from lora_utils.training.state import final_lora


def main(model: Path, images: Path, given: str, shard_base: str) -> None:
    torch.set_num_threads(1)
    ranks = distributed.init()
    config = TrainConfig(**json.loads(given))
    placement, variant = Placement(torch.device("cpu"), torch.float32), read_variant(model)
    run = setup(
        TrainJob(
            config,
            load(images, config, variant=variant),
            model,
            placement,
            load_tokenizer(model),
            read_shapes(model),
            ranks,
            shard_base=shard_base,
            variant=variant,
        )
    )
    frozen = [
        weight for weight in run.components.transformer.transformer_blocks.parameters() if not weight.requires_grad
    ]
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in frozen]
    held = sum(part.untyped_storage().nbytes() for part in local)  # a view of the whole would keep all of it
    losses = [[float(loss) for loss in report.losses] for report in loop.train(run)]
    lora = final_lora(run)
    tensors = [part for layer in lora.layers.values() for part in tensors_of(layer)] + list(lora.embeddings.values())
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    norm = float(sum(tensor.double().norm() for tensor in tensors))
    print(json.dumps({"rank": ranks.rank, "losses": losses, "digest": digest, "norm": norm, "held": held}), flush=True)
    distributed.destroy(ranks)
    distributed.end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
