"""The small model's pretraining can go on from the shipped model, on its own VAE."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples import pretrain, pretrain_vae, shapes
from examples.edit_pairs import CPU
from examples.evaluate import MODEL
from lora_utils.model.vae import encode_images, load_vae

SETTINGS = replace(pretrain.ModelSettings(), steps=2, images=64, captions=4)


@pytest.fixture
def work(tmp_path, monkeypatch):
    for module in (pretrain, pretrain_vae):
        monkeypatch.setattr(module, "WORK", tmp_path / "work")
    (tmp_path / "work").mkdir()
    return tmp_path


def test_a_model_that_goes_on_sees_latents_as_its_own_vae_has_them(work):
    world = pretrain.world_of(SETTINGS, MODEL)
    rng, drawn = np.random.default_rng(8), []
    while len(drawn) < 3:
        prompt = shapes.random_prompt(rng)
        if not shapes.is_held_out(prompt):
            drawn.append(shapes.draw(shapes.scene_of(prompt, rng)))
    expected = encode_images(load_vae(MODEL, CPU), pretrain_vae.to_tensor(drawn))
    torch.testing.assert_close(world.latents[:3], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_it_moves_text_encoder_and_transformer_a_little_and_leaves_the_rest(work):
    of_another_run = work / "work" / "model.pt"
    of_another_run.write_bytes(b"a checkpoint of the first pretraining")
    pretrain.train_model(SETTINGS, MODEL)
    pretrain.write_model(work / "longer", SETTINGS, MODEL)
    for part in ("text_encoder", "transformer", "vae"):
        (name,) = (path.name for path in (MODEL / part).glob("*.safetensors"))
        before, after = (load_file(folder / part / name) for folder in (MODEL, work / "longer"))
        assert before.keys() == after.keys()
        moved = max(float((after[key].float() - before[key].float()).abs().max()) for key in before)
        assert moved == 0 if part == "vae" else 0 < moved < 0.05, part
    assert of_another_run.read_bytes() == b"a checkpoint of the first pretraining", "neither resumed nor replaced"
