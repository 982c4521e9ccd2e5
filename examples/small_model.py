"""The parts of the small Qwen-Image, new: the true classes, small. This module owns their sizes.

pretrain.py makes them learn.
"""

import json
import math
from typing import Any, cast

import diffusers
import numpy as np
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples import edits, shapes
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


def edit_captions(rng: np.random.Generator, count: int) -> list[str]:
    """What the editing world says: instructions in all their wordings, and captions as above."""
    made = [edits.random_edit(rng, 1 + int(rng.random() < 0.2)) for _ in range(count)]
    labels = ["Picture 1: ", "Picture 2: ", "Picture 3: "]
    return [wording for edit in made for wording in edit.instruction.wordings()] + labels * count


def train_tokenizer(edit: bool = False) -> Qwen2Tokenizer:
    """Qwen2's rules; a byte-level BPE trained until each word of the world and of the template is one token.

    With `edit` the words of the editing world, and its template's, are among them.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text = (constants.TEMPLATE_PREFIX + constants.TEMPLATE_SUFFIX).replace("<|im_start|>", "").replace("<|im_end|>", "")
    corpus = world_captions(np.random.default_rng(0), 2000) + [text] * 2000
    if edit:
        text = constants.EDIT_TEMPLATE_PREFIX.replace("<|im_start|>", "").replace("<|im_end|>", "")
        corpus += edit_captions(np.random.default_rng(0), 2000) + [text] * 2000
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=cast(Any, [tuple(pair) for pair in model["merges"]]))
    tokenizer.add_tokens([cast(Any, AddedToken(token, special=True, normalized=False)) for token in ADDED_TOKENS])
    prefixes = {constants.TEMPLATE_PREFIX: constants.TEMPLATE_PREFIX_TOKENS}
    if edit:
        prefixes[constants.EDIT_TEMPLATE_PREFIX] = constants.EDIT_PREFIX_TOKENS
    for prefix, expected in prefixes.items():
        if (tokens := len(tokenizer(prefix).input_ids)) != expected:
            raise RuntimeError(f"the template's prefix has {tokens} tokens instead of {expected}")
    return tokenizer


VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
    "fullatt_block_indexes": [0],
}
EDIT_VISION = {**VISION, "depth": 2, "hidden_size": 64, "intermediate_size": 128, "fullatt_block_indexes": [0, 1]}


def new_text_encoder(tokenizer: Qwen2Tokenizer, vision: dict[str, Any] = VISION) -> Qwen2_5_VLForConditionalGeneration:
    """3 layers of 128; the vision tower is of the true class, and by default as small as it goes and ignorant."""
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
        vision_config=vision,
        image_token_id=special["image_pad"],
        video_token_id=special["video_pad"],
        vision_start_token_id=special["vision_start"],
        vision_end_token_id=special["vision_end"],
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def new_transformer(zero_cond_t: bool = False, blocks: int = 6) -> QwenImageTransformer2DModel:
    """Return blocks of width 128; `zero_cond_t` as Qwen-Image-Edit-2511 has it."""
    return QwenImageTransformer2DModel(
        num_layers=blocks,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        axes_dims_rope=(8, 12, 12),
        zero_cond_t=zero_cond_t,
    )


def new_processor() -> Qwen2VLImageProcessorPil:
    """Qwen2-VL's own settings, but for the size: it sees an image as 3 x 3 features."""
    return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84)


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


def edit_model_index(pipeline: str) -> str:
    """model_index.json of an editing model, as diffusers would write it for this pipeline."""
    parts = {
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    return json.dumps({"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **parts}, indent=2) + "\n"


def new_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=16, num_res_blocks=1, latents_mean=latents_mean or [0.0] * 16, latents_std=latents_std or [1.0] * 16
    )
