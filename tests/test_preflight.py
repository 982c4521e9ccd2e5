"""What a training would find, said before any model is loaded."""

from lora_utils import preflight
from lora_utils.config import TrainConfig
from tests.test_dataset import GRADIENT, save


def test_the_report_counts_buckets_and_names_what_was_left_out(tmp_path):
    save(GRADIENT.resize((130, 130)), tmp_path / "one.png")
    (tmp_path / "x.mp4").write_bytes(b"")
    config = TrainConfig(resolution="64,128", steps=40, seed=0)
    lines = "\n".join(preflight.describe(preflight.read_dataset(tmp_path, config, None), config, None))
    for part in ("1 pictures", "40 times", "bucket 64x64: 1", "bucket 128x128: 1", "no caption", "x.mp4"):
        assert part in lines


def test_the_report_alone_of_a_folder_or_an_archive(tmp_path, write_zip, capsys):
    save(GRADIENT, tmp_path / "set" / "one.png")
    (tmp_path / "set" / "one.txt").write_text("[trigger]")
    given = ["--resolution", "64", "--trigger_word", "ohwx"]
    assert preflight.main([str(tmp_path / "set"), *given]) == 0
    of_folder = capsys.readouterr().out
    assert "1 pictures, each seen about 1000 times" in of_folder
    archive = write_zip({"one.png": GRADIENT, "one.txt": "[trigger]"})
    assert preflight.main([str(archive), *given]) == 0
    assert capsys.readouterr().out == of_folder


def test_a_dataset_that_a_training_would_refuse_says_why(tmp_path, write_zip, capsys):
    assert preflight.main([str(write_zip({"one.png": GRADIENT, "one.txt": "[trigger]"}))]) == 1
    assert "set trigger_word" in capsys.readouterr().err
    assert preflight.main([str(tmp_path / "missing.zip")]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert preflight.main([str(tmp_path), "--resolution", "77"]) == 1
    assert "multiples of 16" in capsys.readouterr().err
