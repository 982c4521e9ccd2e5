"""A run that is stopped, saved and resumed, for the tests of checkpoints and of what a run starts from."""

from dataclasses import replace

import pytest

from lora_utils.config import TrainConfig
from tests.helpers import make_state, resume_state, train_archive

CONFIG = TrainConfig(
    steps=12,
    rank=4,
    learning_rate=1e-3,
    batch_size=3,
    gradient_accumulation=2,
    resolution="64",
    seed=0,
    lr_scheduler="cosine",
    warmup_steps=3,
    train_placeholder_token=True,
    class_word="square",
    preservation_weight=0.3,
)


@pytest.fixture
def new_run(dataset, random_model):
    def make(config=CONFIG, **job):
        return make_state(config, job.pop("dataset", dataset), random_model, **job)

    return make


@pytest.fixture
def resumed(dataset, random_model):
    def make(path, config=CONFIG, **job):
        return resume_state(config, dataset, random_model, path, **job)

    return make


@pytest.fixture
def no_model(random_model, monkeypatch):
    """The model is there, and mustn't be loaded: what is refused is refused before."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    for loader in ("setup.load_transformer", "encoding.load_text_encoder"):
        monkeypatch.setattr(f"lora_utils.training.{loader}", lambda *_, **__: pytest.fail("loaded"))


@pytest.fixture
def trained(archive, random_model, tmp_path, monkeypatch):
    """The weights of a short training."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    return train_archive(replace(CONFIG, steps=2, warmup_steps=1), archive, tmp_path / "trained.zip")
