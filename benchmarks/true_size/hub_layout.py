"""A model folder as the hub's repository of Qwen-Image lays it out, with random weights, of the true size or smaller.

What differs from a folder that today's libraries would write: several weight files with an index, the text encoder's
key names and config from before transformers 4.52, a tokenizer without tokenizer.json, and a transformer's config with
a field that nothing reads. Facts: diffusers 0.42.1, and the repositories Qwen/Qwen-Image and Qwen-Image-Edit-2511.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.true_size.qwen_vocabulary import Vocabulary, qwen_vocabulary
from examples import small_model

SHARD_BYTES = 5 * 10**9  # of the repository's files
_NOISE = 1 << 24  # random numbers, of which every weight is a stretch


@dataclass(frozen=True, slots=True)
class HubModel:
    """The sizes of a model; by default Qwen-Image's own."""

    blocks: int = 60
    heads: int = 24
    head_width: int = 128
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    text_layers: int = 28
    text_width: int = 3584
    text_mlp: int = 18944
    text_heads: int = 28
    text_kv_heads: int = 4
    mrope: tuple[int, int, int] = (16, 24, 24)
    vision: dict[str, Any] = field(
        default_factory=lambda: {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "fullatt_block_indexes": [7, 15, 23, 31],
        }
    )
    vae: dict[str, Any] = field(default_factory=lambda: {"base_dim": 96, "num_res_blocks": 2})
    shard_bytes: int = SHARD_BYTES
    edits: bool = False  # as Qwen-Image-Edit-2511
    nested_text_config: bool = False  # as the repository has it since transformers 4.5x, beside the flat fields
    dtype: torch.dtype = torch.bfloat16


# The same layout at small widths, still with Qwen's own vocabulary.
SMALL = HubModel(
    blocks=2,
    heads=2,
    head_width=32,
    rope_axes=(8, 12, 12),
    text_layers=2,
    text_width=32,
    text_mlp=64,
    text_heads=2,
    text_kv_heads=1,
    mrope=(2, 3, 3),
    vision={"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [0]},
    vae={"base_dim": 16, "num_res_blocks": 1},
    shard_bytes=250_000,
)

# processor/preprocessor_config.json of Qwen2.5-VL.
PROCESSOR_CONFIG: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2VLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 2,
}


def transformer_config(model: HubModel) -> dict[str, Any]:
    """Return transformer/config.json."""
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "_diffusers_version": "0.34.0.dev0",
        "attention_head_dim": model.head_width,
        "axes_dims_rope": list(model.rope_axes),
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": model.text_width,
        "num_attention_heads": model.heads,
        "num_layers": model.blocks,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 768,  # nothing reads it
        **({"zero_cond_t": True} if model.edits else {}),
    }


def text_encoder_config(model: HubModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return text_encoder/config.json: the language model's fields flat, as before transformers 4.52, or nested too."""
    ids = {name: vocabulary.ids[f"<|{name}|>"] for name in small_model.SPECIAL_NAMES}
    language_model = {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": model.text_width,
        "initializer_range": 0.02,
        "intermediate_size": model.text_mlp,
        "max_position_embeddings": 128000,
        "max_window_layers": model.text_layers,
        "num_attention_heads": model.text_heads,
        "num_hidden_layers": model.text_layers,
        "num_key_value_heads": model.text_kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": list(model.mrope), "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    nested = {**language_model, "model_type": "qwen2_5_vl_text"}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "model_type": "qwen2_5_vl",
        **language_model,
        **({"text_config": nested} if model.nested_text_config else {}),
        "transformers_version": "4.53.1",
        "vision_config": {**model.vision, "model_type": "qwen2_5_vl", "out_hidden_size": model.text_width},
    }


def folder_bytes(model: HubModel) -> int:
    """Return how large the folder will be."""
    return sum(tensor.nbytes for part in _parts(model, qwen_vocabulary()) for tensor in part.tensors.values())


@dataclass(frozen=True, slots=True)
class _Part:
    folder: str
    weights: str  # the name of its weights, where it is one file
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # by the stored name; empty ones


def _parts(model: HubModel, vocabulary: Vocabulary) -> Iterator[_Part]:
    with init_empty_weights():
        config = transformer_config(model)
        transformer = cast(nn.Module, QwenImageTransformer2DModel.from_config(config))
        vae = cast(Any, AutoencoderKLQwenImage(**model.vae))
        text = text_encoder_config(model, vocabulary)
        text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(text))
    diffusers_name = "diffusion_pytorch_model"
    yield _Part("transformer", diffusers_name, config, _in_dtype(transformer, model.dtype))
    old = {_old_name(name): tensor for name, tensor in _in_dtype(text_encoder, model.dtype).items()}
    yield _Part("text_encoder", "model", text, old)
    yield _Part(
        "vae", diffusers_name, {**vae.config, "_class_name": "AutoencoderKLQwenImage"}, _in_dtype(vae, model.dtype)
    )


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: parameter.to(dtype) for name, parameter in module.named_parameters()}


def _old_name(name: str) -> str:
    """Return the name of a text encoder's weight as it was before transformers 4.52."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_folder(folder: Path, model: HubModel) -> None:
    """Write the folder. At most two weight files' bytes are held on the way."""
    vocabulary = qwen_vocabulary()
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    for part in _parts(model, vocabulary):
        (folder / part.folder).mkdir(parents=True)
        (folder / part.folder / "config.json").write_text(json.dumps(part.config, indent=2))
        _write_weights(folder / part.folder, part, model, noise)
    _write_tokenizer(folder / "tokenizer", vocabulary)
    small_model.new_scheduler().save_pretrained(folder / "scheduler")
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    pipeline = "QwenImagePipeline"
    if model.edits:
        _write_tokenizer(folder / "processor", vocabulary)
        (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR_CONFIG, indent=2))
        pipeline, classes["processor"] = "QwenImageEditPlusPipeline", ["transformers", "Qwen2VLProcessor"]
    index = {"_class_name": pipeline, "_diffusers_version": "0.34.0.dev0", **classes}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _write_weights(folder: Path, part: _Part, model: HubModel, noise: Tensor) -> None:
    """Write a part's weights into as many files as they need, with an index where there are several."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in part.tensors.items():
        if held and held + tensor.nbytes > model.shard_bytes and part.folder != "vae":
            shards, held = [*shards, {}], 0
        shards[-1][name], held = tensor, held + tensor.nbytes
    files = [f"{part.weights}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{part.weights}.safetensors"]
    offset = 0
    for file, shard in zip(files, shards, strict=True):
        made = {}
        for name, tensor in shard.items():
            made[name] = _random(name, tensor, noise, offset)
            offset += 7919  # a prime: no two weights begin alike
        save_file(made, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in part.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{part.weights}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _random(name: str, empty: Tensor, noise: Tensor, offset: int) -> Tensor:
    """Return random numbers that keep the size of what flows through: 1 for norms, 1 / sqrt(D_in) for matrices."""
    count, offset = empty.numel(), offset % (len(noise) // 2)
    repeats = -(-(offset + count) // len(noise))
    numbers = (noise.repeat(repeats) if repeats > 1 else noise)[offset : offset + count].view(empty.shape)
    if empty.ndim == 1 and "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * numbers
    fan_in = max(1, empty[0].numel()) if empty.ndim > 1 else 100
    if "embed_tokens" in name:
        fan_in = 3584  # Qwen's embeddings have a norm of about 1
    return numbers * fan_in**-0.5


def _write_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    """Write the tokenizer's files as they were before tokenizer.json."""
    folder.mkdir()
    added = {token: vocabulary.ids[token] for token in small_model.ADDED_TOKENS}
    (folder / "vocab.json").write_text(json.dumps(vocabulary.ranks, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in vocabulary.merges))
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=2))
    described = {
        str(token_id): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.startswith("<|") and not token.startswith(("<|fim", "<|repo", "<|file")),
        }
        for token, token_id in added.items()
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": described,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2))


def resized(model: HubModel, blocks: int, text_layers: int) -> HubModel:
    """Return the same widths with so many transformer blocks and layers of the text encoder."""
    return replace(model, blocks=blocks, text_layers=text_layers)
