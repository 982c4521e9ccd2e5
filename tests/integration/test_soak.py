"""The soak in short: a training that is killed every few seconds, watched all the while, against one that isn't."""

import re

import pytest

from benchmarks import soak


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_makes_what_an_undisturbed_one_makes(capsys):
    failed = soak.main(["--minutes=0.2", "--save_every=3", "--kill_every_s=6", "--seed=9"])
    output = capsys.readouterr().out
    assert not failed, output
    assert int(re.search(r"60 steps, killed (\d+) times", output)[1]) >= 1, output
    assert "compared 8 files, apart: none" in output
