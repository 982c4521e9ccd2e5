"""A Predictor on the random model, and archives that trainings of it have written."""

from pathlib import Path

import pytest

from examples.demo import call
from examples.shapes import Prompt
from predict import Predictor
from train import train


@pytest.fixture(autouse=True)
def _base_model(random_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.setenv("ALLOW_LOCAL_PATHS", "1")  # of extra_lora, as the operator of a server may
    monkeypatch.delenv("COG_WEIGHTS", raising=False)


@pytest.fixture(scope="module")
def archives(tmp_path_factory, random_model):
    """Archives of a training with the token, another one with it, and one without."""
    from examples import demo  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("archives")
    demo.write_dataset(folder / "d.zip", "mushroom", Prompt("<zwx>"), count=10)
    settings = {"steps": 3, "rank": 2, "learning_rate": 0.05, "batch_size": 2, "resolution": "64"}
    runs = {"token": {"seed": 1}, "other": {"seed": 2}, "baseline": {"seed": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(random_model))
        for name, given in runs.items():
            output = call(
                train, dataset=folder / "d.zip", train_placeholder_token=name != "baseline", **settings, **given
            )
            Path(str(output.weights)).rename(folder / f"{name}.zip")
    return folder


@pytest.fixture(scope="module")
def predictor(random_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(random_model))
        patch.delenv("COG_WEIGHTS", raising=False)
        ready = Predictor()

        ready.setup()
    return ready
