"""The shipped small model: a normal diffusers folder, small, and it has learned its world."""

import json

import numpy as np
import pytest
from diffusers import QwenImagePipeline
from transformers import AutoTokenizer

from examples import evaluate, scorer, shapes
from examples.pretrain_vae import psnr_db, to_tensor, world_image
from lora_utils import constants
from lora_utils.model.device import default_placement
from lora_utils.model.vae import load_vae


def test_the_folder_opens_with_the_true_classes_and_is_small(tiny_model):
    pipeline = QwenImagePipeline.from_pretrained(tiny_model)
    assert {name: type(part).__name__ for name, part in pipeline.components.items()} == {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": type(AutoTokenizer.from_pretrained(tiny_model / "tokenizer")).__name__,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    assert sum(file.stat().st_size for file in tiny_model.rglob("*.safetensors")) <= 20e6
    config = json.loads((tiny_model / "scheduler" / "scheduler_config.json").read_text())
    assert (config["max_image_seq_len"], config["max_shift"], config["shift_terminal"]) == (8192, 0.9, 0.02)
    tokenizer = pipeline.tokenizer
    assert len(tokenizer(constants.TEMPLATE_PREFIX).input_ids) == constants.TEMPLATE_PREFIX_TOKENS
    assert len(tokenizer(constants.TEMPLATE_SUFFIX).input_ids) == constants.TEMPLATE_SUFFIX_TOKENS
    assert pipeline.text_encoder.get_input_embeddings().weight.shape[0] >= len(tokenizer) + 32


def test_its_autoencoder_keeps_drawings_that_it_has_not_seen(tiny_model):
    vae, rng = load_vae(tiny_model, default_placement()), np.random.default_rng(123)
    assert psnr_db(vae, to_tensor([world_image(rng) for _ in range(48)])) >= 28


@pytest.fixture(scope="module")
def scores(tiny_model):
    return evaluate.evaluate_base(tiny_model, prompts=40)


def test_it_generates_held_out_prompts(scores):
    assert scores[0].all_three >= 0.9, str(scores[0])


def test_it_generates_the_prior_words_own_pattern(scores):
    assert scores[1].kind >= 0.95, str(scores[1])
    assert scores[1].background >= 0.95


@pytest.mark.parametrize("kind", shapes.TAUGHT)
def test_it_knows_no_taught_object(kind, tiny_model):
    asked = evaluate.object_prompts(shapes.Prompt(kind), 10)
    images = evaluate.sample_stock(tiny_model, [question.text for question in asked])
    assert not any(scorer.read(image).kind == kind for image in images)
