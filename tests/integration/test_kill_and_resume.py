"""A training is killed or stopped as a user's is, and goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lora_utils.training.checkpoint import (
    list_checkpoints,
)
from tests.helpers import ROOT, lora_of

LONG = [
    "--steps",
    "24",
    "--rank",
    "4",
    "--batch_size",
    "2",
    "--resolution",
    "64",
    "--seed",
    "3",
    "--train_placeholder_token",
    "--learning_rate",
    "1e-3",
]


def start(archive, folder, model, *given):
    command = [sys.executable, "-m", "lora_utils", "train", str(archive), *LONG, *given]
    environment = {**os.environ, "BASE_MODEL": str(model), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(archive, random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(archive, folder, random_model)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    return lora_of(folder / "weights.zip")


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_and_resumed_writes_the_same_file(archive, random_model, tmp_path, undisturbed):
    """kill -9 twice: at most the steps since the last checkpoint are lost. `benchmarks.soak` kills more often."""
    keeping = ("--run_dir", str(tmp_path / "run"), "--save_every", "4", "--resume", "auto")
    for after_step in (8, 16):
        process = start(archive, tmp_path, random_model, *keeping)
        deadline = time.monotonic() + 60
        while _last(tmp_path / "run") < after_step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert not (tmp_path / "weights.zip").exists()
    process = start(archive, tmp_path, random_model, *keeping)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "resuming from" in said
    assert lora_of(tmp_path / "weights.zip") == undisturbed


def _last(folder):
    return max((int(path.name[5:11]) for path in list_checkpoints(folder)), default=0)


def test_a_stop_writes_a_checkpoint_and_usable_weights_and_says_where(archive, random_model, tmp_path, undisturbed):
    keeping = ("--run_dir", str(tmp_path / "run"), "--resume", "auto")
    process = start(archive, tmp_path, random_model, *keeping, "--output", "early.zip")
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "as asked" in said
    assert "checkpoint" in said
    assert "the weights are in early.zip" in said
    _, meta = lora_of(tmp_path / "early.zip")
    assert 0 < meta["training_steps"] < 24
    process = start(archive, tmp_path, random_model, *keeping)
    said = process.communicate(timeout=120)[0]
    assert f"after step {meta['training_steps']}" in said
    assert lora_of(tmp_path / "weights.zip") == undisturbed
