"""The parts of the small Qwen-Image, new: the true classes, small. This module owns their sizes.

pretrain.py makes them learn.
"""

import json
import math
from typing import Any, cast

import numpy as np
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from examples import shapes
from lora_utils import constants

# Qwen2.5's added tokens in their order (its tokenizer_config.json); they follow the byte-pair ranks.
ADDED_TOKENS = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
""".split()  # noqa: SIM905 (a list of quoted names reads worse)
SPECIAL_NAMES = ("endoftext", "im_end", "image_pad", "video_pad", "vision_start", "vision_end")
SPARE_ROWS = 64  # of the embedding matrix beyond the tokenizer: 399 in the real model


def world_captions(rng: np.random.Generator, count: int) -> list[str]:
    return [wording for _ in range(count) for wording in shapes.random_prompt(rng, tok_share=0.2).wordings()]


def train_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's rules; a byte-level BPE trained until each word of the world and of the template is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text = (constants.TEMPLATE_PREFIX + constants.TEMPLATE_SUFFIX).replace("<|im_start|>", "").replace("<|im_end|>", "")
    corpus = world_captions(np.random.default_rng(0), 2000) + [text] * 2000
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=cast(Any, [tuple(pair) for pair in model["merges"]]))
    tokenizer.add_tokens([cast(Any, AddedToken(token, special=True, normalized=False)) for token in ADDED_TOKENS])
    tokens = len(tokenizer(constants.TEMPLATE_PREFIX).input_ids)
    if tokens != constants.TEMPLATE_PREFIX_TOKENS:
        raise RuntimeError(f"the template's prefix has {tokens} tokens instead of {constants.TEMPLATE_PREFIX_TOKENS}")
    return tokenizer


def new_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """3 layers of 128; the vision tower is of the true class, as small as it goes, and knows nothing."""
    rows = math.ceil((len(tokenizer) + SPARE_ROWS) / 64) * 64
    special = {name: cast(int, tokenizer.convert_tokens_to_ids(f"<|{name}|>")) for name in SPECIAL_NAMES}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": rows,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": special["endoftext"],
            "eos_token_id": special["im_end"],
            "pad_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0],
        },
        image_token_id=special["image_pad"],
        video_token_id=special["video_pad"],
        vision_start_token_id=special["vision_start"],
        vision_end_token_id=special["vision_end"],
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def new_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        num_layers=6, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=128, axes_dims_rope=(8, 12, 12)
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's own scheduler_config.json."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=constants.TRAIN_TIMESTEPS,
        base_image_seq_len=constants.BASE_IMAGE_TOKENS,
        max_image_seq_len=constants.MAX_IMAGE_TOKENS,
        base_shift=constants.BASE_SHIFT,
        max_shift=constants.MAX_SHIFT,
        shift_terminal=constants.SHIFT_TERMINAL,
        shift=1.0,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )


def new_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=16, num_res_blocks=1, latents_mean=latents_mean or [0.0] * 16, latents_std=latents_std or [1.0] * 16
    )
