"""Qwen-Image's constants, each with its source. It holds facts of the model and imports nothing.

Sources: DIF is diffusers 0.42.1 (`pipeline_qwenimage.py`, `transformer_qwenimage.py`), HUB is the model's repository.
"""

# Text. The prompt stands between these two; the states of the prefix's tokens are dropped after encoding (DIF).
TEMPLATE_PREFIX = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE_PREFIX_TOKENS = 34  # DIF, `prompt_template_encode_start_idx`
TEMPLATE_SUFFIX_TOKENS = 5
# In front of a prompt that edits images, which the text encoder sees then (DIF, both editing pipelines).
EDIT_TEMPLATE_PREFIX = (
    "<|im_start|>system\n"
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n"
)
EDIT_PREFIX_TOKENS = 64
IMAGE_PAD = "<|image_pad|>"  # stands for an image's features, one for each
IMAGE_MARK = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
VISION_AREA_PX = 384 * 384  # DIF, `CONDITION_IMAGE_SIZE`
CONTROL_AREA_PX = 1024 * 1024  # DIF, `VAE_IMAGE_SIZE`: of an image to edit
MAX_PROMPT_TOKENS = 1024  # DIF, `tokenizer_max_length`: what the pipeline can be set to read
TRAINED_PROMPT_TOKENS = 512  # what the model saw in training; DIF, default of `max_sequence_length`

# Images.
VAE_SCALE = 8  # pixels per latent, a side
PATCH = 2  # latents per token, a side
PIXELS_PER_TOKEN = VAE_SCALE * PATCH  # 16: sizes are multiples of it
LATENT_CHANNELS = 16
PACKED_CHANNELS = LATENT_CHANNELS * PATCH * PATCH  # 64

# The official sizes, width x height in pixels (HUB, README).
OFFICIAL_SIZES_PX: dict[str, tuple[int, int]] = {
    "1:1": (1328, 1328),
    "16:9": (1664, 928),
    "9:16": (928, 1664),
    "4:3": (1472, 1104),
    "3:4": (1104, 1472),
    "3:2": (1584, 1056),
    "2:3": (1056, 1584),
}

# The noise schedule (HUB, scheduler/scheduler_config.json). The defaults of diffusers' `calculate_shift` are FLUX's.
BASE_IMAGE_TOKENS = 256
MAX_IMAGE_TOKENS = 8192
BASE_SHIFT = 0.5
MAX_SHIFT = 0.9
SHIFT_TERMINAL = 0.02
TRAIN_TIMESTEPS = 1000

# Linear layers of a transformer block that a LoRA may adapt. `img_mod` and `txt_mod` depend on the timestep alone, act
# on all of an image alike, and are left as they are.
ATTENTION_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
MLP_TARGETS = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
MODULATION_TARGETS = ("img_mod.1", "txt_mod.1")
OUTER_TARGETS = (  # the linear layers outside of the blocks
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION_TARGETS,
    "attention_mlp": ATTENTION_TARGETS + MLP_TARGETS,
}

# The zero-prior token. ComfyUI's reader of embeddings knows this prefix and suffix, though its tokenizer for Qwen-Image
# doesn't ask it yet. The infix `lora` lets diffusers accept the file, for it refuses any key without that substring.
PLACEHOLDER_KEY = "bundle_emb.{token}.lora.qwen25_7b"

DEFAULT_BASE_MODEL = "Qwen/Qwen-Image"
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
EDIT_COMPONENTS = (*COMPONENTS, "processor")  # of a model that edits: its images are cut into patches
# What model_index.json names. The text-to-image models' weights are the same, whichever of the three wrote the folder.
TEXT_PIPELINES = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
EDIT_PIPELINES = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
EDIT_MODEL = "Qwen/Qwen-Image-Edit-2511"  # the newest of those that edit

# What a repository's LoRA is called, in this order: ours, diffusers', peft's.
HUB_WEIGHT_NAMES = ("weights.zip", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft, `save_pretrained`
EMPTY_PROMPT = " "  # what a dropped caption becomes: the sampler's default negative prompt
