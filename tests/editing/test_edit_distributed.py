"""Pairs on several GPUs, with gloo on the CPU: a sharded base learns what one in each process does."""

import json
from dataclasses import asdict

import pytest

from lora_utils.config import TrainConfig
from lora_utils.io.archive import extract_archive
from lora_utils.training import launch
from tests.editing.material import write_pairs

# Of everything that could put processes out of step: dropped images, dropped captions, the class, a short last batch.
CONFIG = TrainConfig(
    steps=6,
    rank=4,
    learning_rate=1e-3,
    batch_size=2,
    resolution="64",
    control_resolution="auto",
    control_dropout=0.4,
    caption_dropout=0.3,
    seed=0,
    train_placeholder_token=True,
    class_word="square",
    preservation_weight=0.3,
    quantization="none",
)


@pytest.mark.slow
def test_a_sharded_editing_base_learns_the_same_from_pairs(edit_models, tmp_path, monkeypatch):
    extract_archive(write_pairs(tmp_path / "pairs.zip", count=5, caption="make it like <zwx>"), tmp_path / "images")

    def run(shard_base: str) -> list[dict]:
        said: list[str] = []
        environment = {"CUDA_VISIBLE_DEVICES": "", "CACHE_DIR": str(tmp_path / "cache")}
        worker = ["tests.training.distributed_worker", str(edit_models["2511"]), str(tmp_path / "images")]
        with monkeypatch.context() as patch:
            patch.setattr(launch.log, "info", said.append)
            launch.launch([*worker, json.dumps(asdict(CONFIG)), shard_base], 2, environment)
        lines = [line.partition("{") for line in said if '"rank"' in line]
        return [json.loads(brace + rest) for _, brace, rest in lines]

    alone, sharded = run("never"), run("always")
    assert len({each["digest"] for each in sharded}) == 1
    for one, other in zip(alone[0]["losses"], sharded[0]["losses"], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7, nan_ok=True)
    assert alone[0]["norm"] == pytest.approx(sharded[0]["norm"], rel=1e-5)
