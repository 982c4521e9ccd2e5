"""Keys of LoRA files: from the name that any tool gives a tensor to the layer and the part of it that it is.

This module owns names alone: prefixes, adapter names, flat names, other methods' marks, and what other models' layers
are called. It doesn't read tensors.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lora_utils import constants

# What tools put in front of a layer's name, or wrap around one inside it. None of them is a name of the model's own, so
# they are dropped wherever they stand: peft, diffusers, ComfyUI, DiffSynth, DataParallel, torch.compile, FSDP.
_TOOLS = {"base_model", "model", "transformer", "diffusion_model", "pipe", "dit", "module", "unet"}
_WRAPPERS = _TOOLS | {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_FLAT_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_")  # kohya's, LyCORIS's, OneTrainer's
_IN_BLOCKS = (*constants.ATTENTION_TARGETS, *constants.MLP_TARGETS, *constants.MODULATION_TARGETS)
_FLAT_IN_BLOCKS = {name.replace(".", "_"): name for name in _IN_BLOCKS}
_FLAT_OUTSIDE = {name.replace(".", "_"): name for name in constants.OUTER_TARGETS}
_FLAT_BLOCK = re.compile(r"transformer_blocks_(\d+)_(\w+)")
_FLAT_WRAPPERS = re.compile(r"((base_model_model|model|diffusion_model|transformer|_orig_mod|module)_(?!blocks_))+")

# What a key may end in. peft puts an adapter's name of any kind behind a part.
_ADAPTER = r"(?P<adapter>(\.[^.]+)*?)"
_PARTS = [
    re.compile(rf"(?P<layer>.+)\.{part}")
    for part in (
        r"(?P<part>alpha|diff|diff_b)(?P<adapter>)",
        rf"lora_(?P<part>B{_ADAPTER}\.bias|up\.bias)",
        rf"lora[_.](?P<part>A|B|down|up){_ADAPTER}(\.weight)?",  # peft's, kohya's, and diffusers' old lora.down
        rf"(?P<part>lokr_w[12](_[ab])?|hada_w[12]_[ab]){_ADAPTER}(\.weight)?",  # LyCORIS's, and peft's too
        rf"(?P<part>dora_scale|lora_magnitude_vector|magnitude){_ADAPTER}(\.weight)?",  # LyCORIS, peft, ai-toolkit
    )
]
_OUR_NAMES = {"A": "down", "B": "up", "diff_b": "bias", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude"}

# Marks of methods that aren't read. Each is a complete ending of a key.
_METHODS = {
    r"(oft_\w+|oft_[\w.]+|boft_[\w.]+)": "OFT",
    r"(set_weight|[wb]_norm|reshape_weight)": "normalisation or replaced",
    r"(lora_mid\.weight|lokr_t2|hada_t[12])": "Tucker",
    r"(lora_A(\.[^.]+)*\.bias|lora_down\.bias)": "LoRA bias",
    r".*(weight_scale(_inv)?|scale_weight|scale_input|input_scale|comfy_quant|scaled_fp8|absmax|quant_map)": "scaled",
}
_METHOD = {re.compile(rf"(.+\.)?{ending}"): method for ending, method in _METHODS.items()}

# How other models' layers are called, dotted or flat.
_FOREIGN_LAYERS = {
    r"(img_mlp[._](gate_layer|proj|out)\b|(^|[._])modulation[._]1\b|txt_in[._](in|out)_layer)": "Qwen-Image-2.1",
    r"(single_transformer_blocks|single_blocks|double_blocks)": "FLUX",
    r"transformer_blocks[._]\d+[._](ff|ff_context|norm1|norm1_context)[._]": "FLUX or Stable Diffusion 3",
    r"((down|up)_blocks|mid_block|(input|output)_blocks|middle_block)[._]": "Stable Diffusion",
    r"joint_blocks[._]\d": "Stable Diffusion 3",
    r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn)": "Wan",
    r"(context_refiner|noise_refiner|(^|[._])layers[._]\d+[._](attention|feed_forward)[._])": "Z-Image",
    r"(^lora_te|text_encoder|language_model|text_model)": "a text encoder",
}

# What names of models, in headers and configs, are of another kind than Qwen-Image. They are compared without case,
# dots, dashes and spaces.
_FOREIGN_NAMES = {
    "qwenimagelayered": "Qwen-Image-Layered",
    "qwenimage21": "Qwen-Image-2.1",
    "flux": "FLUX",
    "stablediffusion": "Stable Diffusion",
    "sdxl": "Stable Diffusion",
    "hunyuan": "HunyuanVideo",
    "zimage": "Z-Image",
}


@dataclass(frozen=True, slots=True)
class LoraKey:
    """What a key stands for: a part of a layer's update, by the layer's dotted name in the transformer.

    A part is down, up, alpha, magnitude, diff, bias, up_bias, lokr_w1 to lokr_w2_b or hada_w1_a to hada_w2_b.
    """

    layer: str
    part: str
    adapter: str = ""  # the name that peft gave the adapter, if the key has one


def parse_key(key: str) -> LoraKey | None:
    """Return what a LoRA's key stands for; None for a key that belongs to no LoRA or names no layer.

    A dotted name that Qwen-Image hasn't is returned as it is: whether the model has it, the model knows.
    """
    found = next(filter(None, (part.fullmatch(key) for part in _PARTS)), None)
    layer = _layer_name(found["layer"]) if found else None
    if found is None or layer is None:
        return None
    part = "up_bias" if found["part"].endswith(".bias") else _OUR_NAMES.get(found["part"], found["part"])
    return LoraKey(layer, part, (found["adapter"] or "").strip("."))


def without_wrappers(name: str) -> str:
    """Return the model's own name of a tensor, without what tools put in front or wrap around."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _layer_name(name: str) -> str | None:
    """Return the dotted name of the layer behind a name without its LoRA ending; None for a flat one of no layer."""
    own = [part for part in name.split(".") if part not in _WRAPPERS]
    for prefix in _FLAT_PREFIXES if len(own) == 1 else ():
        if own[0].startswith(prefix):
            return _dotted(own[0].removeprefix(prefix))
    return ".".join(own) or None


def _dotted(flat: str) -> str | None:
    """Return `transformer_blocks.0.attn.to_out.0` of `transformer_blocks_0_attn_to_out_0`."""
    bare = _FLAT_WRAPPERS.sub("", flat, count=1) if _FLAT_WRAPPERS.match(flat) else flat
    block = _FLAT_BLOCK.fullmatch(bare)
    if block:
        inside = _FLAT_IN_BLOCKS.get(block[2])
        return f"transformer_blocks.{block[1]}.{inside}" if inside else None
    return _FLAT_OUTSIDE.get(bare)


def other_method(key: str) -> str | None:
    """Return which method that isn't read a key is of, if it is."""
    return next((method for ending, method in _METHOD.items() if ending.fullmatch(key)), None)


def foreign_layers(keys: Iterable[str]) -> str | None:
    """Return which other model has layers of these names, if one is known to."""
    text = "\n".join(keys)
    for pattern, model in _FOREIGN_LAYERS.items():
        if re.search(pattern, text, re.MULTILINE):
            return model
    return None


def foreign_name(name: str) -> str | None:
    """Return which other model a name or path is of: None for Qwen-Image's own, and for names that tell nothing."""
    return next((model for mark, model in _FOREIGN_NAMES.items() if mark in _plain_name(name)), None)


def names_editing_model(name: str) -> bool:
    """Return whether a name or path is that of a Qwen-Image which edits images."""
    return "qwenimageedit" in _plain_name(name)


def _plain_name(name: str) -> str:
    last = name.replace("\\", "/").rstrip("/").removesuffix("/lora").rpartition("/")[2]
    return re.sub(r"[\s._-]", "", last.casefold())
