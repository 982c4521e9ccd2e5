"""The few shared fixtures: a random model of the true classes, the small trained one, and a zip of images."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: no test may need a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that a second thread only waits
os.environ["SOURCE_DATE_EPOCH"] = "0"  # files that were written on two days are compared byte by byte

import diffusers  # noqa: F401 (with all that it finds installed, for the stock pipelines in these tests)

from lora_utils.io.libraries import configure_libraries
from lora_utils.io.logging import log_to_stdout

configure_libraries()  # as the entry points do

import gc
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image

from examples import demo, small_model
from examples.shapes import Prompt
from lora_utils.config import RunOptions, TrainConfig
from lora_utils.dataset import Dataset, load
from lora_utils.io.archive import extract_archive
from lora_utils.model.components import Components, load_components
from lora_utils.model.device import default_placement
from tests.helpers import SHORT_RUN, train_archive

torch.set_num_threads(1)
log_to_stdout()
logging.getLogger("lora_utils").propagate = True  # pytest's caplog listens at the root


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what is encoded for later tests, as a user's trainings do: it is most of a short run's time."""
    os.environ["CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def _no_garbage_in_what_is_imported() -> None:
    """Spare the run's collections of garbage the million objects of imports: each took 0.3 s for these."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights: two blocks, everything else as the small model has it."""
    torch.manual_seed(0)
    tokenizer = small_model.train_tokenizer()
    transformer = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=128, axes_dims_rope=(8, 12, 12)
    )
    for parameter in transformer.parameters():  # away from the tame initialisation, so that differences show
        torch.nn.init.normal_(parameter, std=0.08) if parameter.ndim > 1 else None
    vae = small_model.new_vae(
        latents_mean=[0.1 * i - 0.8 for i in range(16)], latents_std=[0.5 + 0.1 * i for i in range(16)]
    )
    pipeline = QwenImagePipeline(
        small_model.new_scheduler(), vae, small_model.new_text_encoder(tokenizer), tokenizer, transformer
    )
    folder = tmp_path_factory.mktemp("random_model")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(random_model: Path) -> QwenImagePipeline:
    """The stock pipeline on the random model: what ours is compared with."""
    stock = QwenImagePipeline.from_pretrained(random_model)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="session")
def components(random_model: Path) -> Components:
    """Our parts of the random model. Tests leave them as they found them: that is what the package promises."""
    return load_components(random_model, default_placement())


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return demo.MODEL


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of a taught object, with captions of unequal length that hold `<zwx>`, as a user sends them."""
    path = tmp_path_factory.mktemp("archive") / "dataset.zip"
    demo.write_dataset(path, "mushroom", Prompt("<zwx>"), count=10)
    return path


@pytest.fixture(scope="session")
def dataset(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The dataset of `archive`, extracted and checked."""
    folder = tmp_path_factory.mktemp("dataset") / "images"
    extract_archive(archive, folder)
    return load(folder, TrainConfig(resolution="64", seed=0))


@pytest.fixture
def write_zip(tmp_path: Path) -> Callable[..., Path]:
    """Write a zip: names with images (PNG), bytes or texts."""

    def write_members(members: dict[str, Image.Image | bytes | str], name: str = "dataset.zip") -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as packed:
            for member, content in members.items():
                if isinstance(content, Image.Image):
                    with packed.open(member, "w") as file:
                        content.save(file, Path(member).suffix[1:].replace("jpg", "jpeg"))
                else:
                    packed.writestr(member, content)
        return path

    return write_members


@pytest.fixture
def train_run(
    archive: Path, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, Path]]:
    """Train with a run_dir of its own. -> weights.zip and that folder"""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)

    def run(
        name: str = "run", config: TrainConfig = SHORT_RUN, stopped: Callable[[], bool] = lambda: False, **given: Any
    ) -> tuple[Path, Path]:
        options = RunOptions(run_dir=str(tmp_path / name), **given)
        return train_archive(config, archive, tmp_path / f"{name}.zip", options, stopped=stopped), tmp_path / name

    return run
