"""A run that is lengthened: by a constant schedule it is the run that was asked for so many steps from the start."""

from dataclasses import replace

import pytest

from lora_utils.errors import UserError
from lora_utils.model import modulation
from lora_utils.training.checkpoint import save_checkpoint
from tests.helpers import SHORT_RUN, losses, make_state, resume_state, same_result

LONG = replace(SHORT_RUN, steps=12, class_word="square", ema_decay=0.9, warmup_steps=2)


@pytest.mark.parametrize(("at", "table"), [(6, True), (4, True), (6, False)])
def test_a_lengthened_run_is_the_longer_run_bit_for_bit(
    at, table, dataset, random_model, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(modulation, "pays", lambda *_: table)
    whole = make_state(LONG, dataset, random_model)
    assert modulation.has_table(whole.components.transformer) == table
    expected = losses(whole)
    short = make_state(replace(LONG, steps=6), dataset, random_model)
    before = losses(short, at)
    longer = resume_state(LONG, dataset, random_model, save_checkpoint(short, tmp_path, keep=1))
    assert before + losses(longer) == expected
    assert same_result(whole, longer)
    assert "lengthened from 6 to 12 steps" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def lengthened(dataset, model, folder, **given):
    config = replace(SHORT_RUN, **given)
    short = make_state(replace(config, steps=6), dataset, model)
    losses(short)
    return resume_state(config, dataset, model, save_checkpoint(short, folder, keep=1))


def test_another_schedule_goes_on_along_its_new_length_and_says_so(dataset, random_model, tmp_path, caplog):
    run = lengthened(dataset, random_model, tmp_path, steps=12, lr_scheduler="cosine")
    assert "lr_scheduler cosine goes on along the new length" in caplog.text
    losses(run, 1)
    assert 0.3 < run.optimizers.rate / run.config.learning_rate < 0.7, "half of it is over"


def test_a_run_that_outgrows_its_table_says_so(dataset, random_model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(modulation, "pays", lambda count, _width: count <= 16)
    lengthened(dataset, random_model, tmp_path, steps=12)
    assert "have no modulation table any more" in caplog.text


def test_a_run_is_not_shortened(dataset, random_model, tmp_path):
    with pytest.raises(UserError, match="steps: 6 there, 5 here"):
        lengthened(dataset, random_model, tmp_path, steps=5)
