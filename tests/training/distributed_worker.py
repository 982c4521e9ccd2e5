"""One of several processes of a run, for test_cards.py: trains, and prints its losses and its LoRA's hash.

python -m tests.card_worker MODEL PICTURES CONFIG_AS_JSON SHARD_BASE
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.model.device import Placement
from lora_utils.training import distributed, loop
from lora_utils.training.setup import setup


def main(model: Path, pictures: Path, given: str, shard_base: str) -> None:
    torch.set_num_threads(1)
    ranks = distributed.init_processes()
    config = TrainConfig(**json.loads(given))
    run = setup(
        config, load(pictures, config), model, Placement(torch.device("cpu"), torch.float32), ranks=ranks,
        shard_base=shard_base,
    )  # fmt: skip
    frozen = [
        weight for weight in run.components.transformer.transformer_blocks.parameters() if not weight.requires_grad
    ]
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in frozen]
    held = sum(part.untyped_storage().nbytes() for part in local)  # a view of the whole would keep all of it
    losses = [[float(loss) for loss in report.losses] for report in loop.train(run)]
    lora = final_lora(run)
    tensors = [part for layer in lora.layers.values() for part in (layer.down, layer.up)] + list(
        lora.embeddings.values()
    )
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    norm = float(sum(tensor.double().norm() for tensor in tensors))
    print(json.dumps({"rank": ranks.rank, "losses": losses, "digest": digest, "norm": norm, "held": held}), flush=True)
    distributed.destroy_processes(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
