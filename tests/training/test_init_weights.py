"""A run may start from the weights of another."""

import zipfile
from dataclasses import replace

import pytest
import torch

from lora_utils.errors import UserError
from lora_utils.lora.weights import read_init_weights
from lora_utils.lora.weights_zip import LORA_MEMBER
from tests.helpers import losses, train_archive
from tests.training.conftest import CONFIG


def test_a_run_that_starts_from_weights_starts_where_they_are(trained, new_run):
    fresh, start = new_run(), read_init_weights(trained, CONFIG)
    run, other = new_run(init_weights=start), new_run(init_weights=start)
    assert not all(torch.equal(weight, old) for weight, old in zip(run.lora, fresh.lora, strict=True))
    assert all(torch.equal(weight, same) for weight, same in zip(run.lora, other.lora, strict=True))
    assert torch.equal(run.placeholders.embeddings[0].detach(), start.embeddings["<zwx>"][0])
    with zipfile.ZipFile(trained) as packed:
        assert LORA_MEMBER in packed.namelist()
    assert len(losses(run)) == CONFIG.steps


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"train_placeholder_token": False, "class_word": ""}, "has learned <zwx>; set train_placeholder_token"),
        ({"placeholder_token": "<abc>"}, "has learned <zwx>; set train_placeholder_token"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_to_set(other, message, trained, no_model, archive, tmp_path):
    with pytest.raises(UserError, match=message):
        train_archive(replace(CONFIG, **other), archive, tmp_path / "weights.zip", init_weights=trained)


def test_weights_of_other_layers_are_refused_too(trained, new_run):
    config = replace(CONFIG, lora_targets="attention")
    message = r"init_weights has 24 layers and lora_targets adapts 16.*Choose the lora_targets it was trained with"
    with pytest.raises(UserError, match=message):
        new_run(config, init_weights=read_init_weights(trained, config))
