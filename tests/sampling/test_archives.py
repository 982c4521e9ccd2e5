"""What prediction makes of an archive whose parts were lost or changed, of older ones and of other files."""

import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_utils.errors import UserError
from lora_utils.lora.weights_zip import LORA_MEMBER, META_MEMBER
from tests.sampling.calls import TOKEN_PROMPT, one, same


def altered(archives, tmp_path, change):
    """token.zip with its tensors changed: as a package that forgets or loses the row would write it."""
    with zipfile.ZipFile(archives / "token.zip") as packed:
        packed.extractall(tmp_path)
    tensors = load_file(tmp_path / LORA_MEMBER)
    save_file(change(tensors), tmp_path / LORA_MEMBER)
    with zipfile.ZipFile(tmp_path / "altered.zip", "w") as packed:
        packed.write(tmp_path / LORA_MEMBER, LORA_MEMBER)
        packed.write(tmp_path / META_MEMBER, META_MEMBER)
    return tmp_path / "altered.zip"


ROW = "bundle_emb.<zwx>.lora.qwen25_7b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != ROW}, r"meta\.json speaks of <zwx>, the LoRA file holds none"),
        (lambda t: {**t, ROW: torch.zeros_like(t[ROW])}, "isn't the one that meta.json describes"),
        (lambda t: {**t, ROW: t[ROW] * torch.nan}, "not finite"),
        (lambda t: {**t, ROW: t[ROW].flip(-1)}, r"isn't the one that meta\.json describes"),
        (lambda t: {**t, ROW: torch.ones(1, 64)}, r"has the shape \(1, 64\), the model takes \(1, 128\)"),
    ],
)
def test_an_embedding_that_was_lost_or_changed_is_an_error(change, message, predictor, archives, tmp_path):
    with pytest.raises(UserError, match=message):
        one(predictor, TOKEN_PROMPT, replicate_weights=altered(archives, tmp_path, change))


def test_the_embedding_is_part_of_the_image(predictor, archives, tmp_path):
    """Another row under the same LoRA, as a bare file that no meta vouches for, gives another image."""
    with zipfile.ZipFile(archives / "token.zip") as packed:
        packed.extractall(tmp_path)
    tensors = load_file(tmp_path / LORA_MEMBER)
    save_file({**tensors, ROW: torch.randn(1, 128)}, tmp_path / "swapped.safetensors")
    with_row = one(predictor, TOKEN_PROMPT, replicate_weights=tmp_path / LORA_MEMBER)
    swapped = one(predictor, TOKEN_PROMPT, replicate_weights=tmp_path / "swapped.safetensors")
    assert np.abs(with_row.astype(int) - swapped).max() > 3


def test_older_archives_without_a_meta_or_with_few_fields_load(predictor, archives, tmp_path):
    with zipfile.ZipFile(archives / "baseline.zip") as packed:
        packed.extractall(tmp_path)
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as packed:
        packed.write(tmp_path / LORA_MEMBER, LORA_MEMBER)
        packed.writestr(META_MEMBER, '{"base_model": "Qwen/Qwen-Image", "rank": 2}')
    expected = one(predictor, replicate_weights=archives / "baseline.zip")
    assert same(one(predictor, replicate_weights=tmp_path / "old.zip"), expected)


def test_what_is_no_lora_or_another_models_is_refused(predictor, tmp_path):
    (tmp_path / "x.safetensors").write_text("hello")
    with pytest.raises(UserError, match=r"x\.safetensors is no safetensors file"):
        one(predictor, replicate_weights=tmp_path / "x.safetensors")
    flux = {f"transformer.single_transformer_blocks.0.proj_out.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}
    save_file(flux, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="holds layers of FLUX"):
        one(predictor, replicate_weights=tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="there is no weights file"):
        one(predictor, replicate_weights=tmp_path / "missing.zip")
