"""A node for ComfyUI: encode a prompt that holds a placeholder token, like <zwx>, with the embedding that was trained.

Copy this file into ComfyUI/custom_nodes. It needs nothing that ComfyUI doesn't bring.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors.torch import load, load_file

EMBEDDING_KEY = re.compile(r"bundle_emb\.(<[^.]+>)\.lora\.qwen25_7b")
LORA_IN_ZIP = "lora/lora_weights.safetensors"
# Special tokens of Qwen2.5-VL's vocabulary that no prompt for images holds. The tokenizer splits the text at them, as
# it was split at the placeholder token in training, and gives each a number of its own, which is then replaced.
STAND_INS = {
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|box_start|>": 151648,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|quad_end|>": 151651,
}


def read_embeddings(path: str) -> dict[str, Any]:
    """Return the embeddings [1, D] by token of a weights.zip, of its LoRA, or of an .embeddings.safetensors file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            tensors = load(packed.read(LORA_IN_ZIP))
    else:
        tensors = load_file(path)
    found = {match[1]: tensor for key, tensor in tensors.items() if (match := EMBEDDING_KEY.fullmatch(key))}
    if not found:
        raise ValueError(f"{Path(path).name} holds no embedding of a placeholder token.")
    return found


def tokenize(clip: Any, text: str, embeddings: dict[str, Any]) -> dict[str, list[list[tuple[Any, float]]]]:
    """Tokenize a text with ComfyUI's own tokenizer, and put the embeddings where the text holds their tokens."""
    used = [token for token in embeddings if token in text]
    free = [stand_in for stand_in in STAND_INS if stand_in not in text]
    if len(used) > len(free):
        raise ValueError(f"the prompt holds {len(used)} placeholder tokens; {len(free)} are the most.")
    vectors = {}
    for token, stand_in in zip(used, free, strict=False):
        text = text.replace(token, stand_in)
        vectors[STAND_INS[stand_in]] = embeddings[token].view(-1)  # [D]

    def with_vector(pair: tuple[Any, ...]) -> tuple[Any, ...]:
        known = isinstance(pair[0], int) and pair[0] in vectors
        return (vectors[pair[0]], *pair[1:]) if known else pair

    batches = clip.tokenize(text)
    return {name: [[with_vector(pair) for pair in batch] for batch in own] for name, own in batches.items()}


class ZeroPriorTokenEncode:
    """CLIP Text Encode for a prompt with a placeholder token."""

    CATEGORY, FUNCTION, RETURN_TYPES = "conditioning", "encode", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "clip": ("CLIP",),
                "text": ("STRING", {"multiline": True, "dynamicPrompts": True, "default": "a photo of <zwx>"}),
                "weights": ("STRING", {"default": "weights.zip"}),
            }
        }

    def encode(self, clip: Any, text: str, weights: str) -> tuple[Any]:
        """Return the prompt's conditioning. `weights` is the path of the weights.zip or of its LoRA."""
        return (clip.encode_from_tokens_scheduled(tokenize(clip, text, read_embeddings(weights))),)


NODE_CLASS_MAPPINGS = {"ZeroPriorTokenEncode": ZeroPriorTokenEncode}
NODE_DISPLAY_NAME_MAPPINGS = {"ZeroPriorTokenEncode": "CLIP Text Encode (placeholder token)"}
