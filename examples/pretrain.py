"""Make `tiny_qwen_image`, the small model of the drawn world, from nothing: a tokenizer, a VAE, then the rest.

    python -m examples.pretrain                 # all stages; resumes where it was stopped
    python -m examples.pretrain --stage vae     # one stage

Each stage logs to standard output and keeps its checkpoints in `build/pretrain/`; the finished folder is written by
the last one.
"""

import argparse
import copy
import json
import math
import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from examples import shapes
from lora_utils import flow, qwen, sizes
from lora_utils.single_frame import decode_frame, encode_frame, fold_temporal_convolutions, unfolded_state

WORK = Path("build/pretrain")
OUT = Path(__file__).parent / "tiny_qwen_image"


@dataclass(frozen=True, slots=True)
class VaeSettings:
    steps: int = 2300
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    random_share: float = 0.5  # of the pictures are random drawings
    edge_weight: float = 0.5
    kl_weight: float = 1e-4  # per latent element, against a mean absolute error per pixel channel


@dataclass(frozen=True, slots=True)
class ModelSettings:
    steps: int = 7500
    captions: int = 32  # a batch: so many captions, each with its picture ...
    draws: int = 3  # ... at so many draws of noise and sigma; the text encoder runs once for all of them
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    pictures: int = 24576


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def to_tensor(pictures: list[shapes.Pixels]) -> Tensor:
    """-> [B, 3, H, W] in -1 to 1."""
    stacked = torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1.0
    return stacked.permute(0, 3, 1, 2).contiguous()


def world_picture(rng: np.random.Generator) -> shapes.Pixels:
    return shapes.draw(shapes.scene_of(shapes.random_prompt(rng), rng))


def random_or_world_picture(rng: np.random.Generator, random_share: float) -> shapes.Pixels:
    return shapes.random_drawing(rng) if rng.random() < random_share else world_picture(rng)


def anneal(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then half a cosine to zero: the factor on the learning rate."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def save_checkpoint(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def set_rates(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def update(optimizers: list[torch.optim.Optimizer], loss: Tensor, network: nn.Module) -> None:
    """One step down the gradient of `loss`, clipped at a norm of 1."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


# --- the autoencoder ----------------------------------------------------------------------------------------------


def new_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=16, num_res_blocks=1, latents_mean=latents_mean or [0.0] * 16, latents_std=latents_std or [1.0] * 16
    )


def psnr_db(vae: AutoencoderKLQwenImage, pictures: Tensor) -> float:
    """Of pictures in -1 to 1, encoded and decoded."""
    with torch.no_grad():
        decoded = decode_frame(vae, encode_frame(vae, pictures)[0]).clamp(-1, 1)
    return float(10 * torch.log10(4.0 / (decoded - pictures).pow(2).mean()))


class _Flat(nn.Module):
    """A convolution's weight kept as a matrix [C_out, C_in * k * k]: what Muon takes."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape

    def forward(self, flat: Tensor) -> Tensor:
        return flat.view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)


def flatten_convolutions(vae: nn.Module) -> None:
    for module in list(vae.modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 4:
            parametrize.register_parametrization(module, "weight", _Flat(weight.shape), unsafe=True)


def muon_and_adamw(named: Iterable[tuple[str, nn.Parameter]], learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices named, AdamW for the rest; at width 128 Muon needs some half of AdamW's steps."""
    matrices, rest = [], []
    for name, parameter in named:
        inner = any(part in name for part in (".layers.", ".transformer_blocks.", ".parametrizations."))
        (matrices if inner and parameter.ndim == 2 else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))]


def vae_loss(vae: AutoencoderKLQwenImage, x: Tensor, settings: VaeSettings) -> Tensor:
    """Absolute and squared error, the error of edges, and a little KL, of pictures decoded from a draw of latents."""
    mean, log_variance = encode_frame(vae, x)
    y = decode_frame(vae, mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance))
    kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).mean()
    error = y - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.pow(2).mean() + settings.edge_weight * edges + settings.kl_weight * kl


def train_vae(settings: VaeSettings) -> Path:
    """On the world's pictures and on random drawings: users' objects must survive it too."""
    checkpoint = WORK / "vae.pt"
    torch.manual_seed(0)
    vae = fold_temporal_convolutions(new_vae())
    flatten_convolutions(vae)
    optimizers = muon_and_adamw(vae.named_parameters(), settings.learning_rate)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        vae.load_state_dict(state["vae"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        start = state["step"]
        log(f"vae: resumed at step {start}")
    rng = np.random.default_rng(start + 1)
    held_out = np.random.default_rng(0)
    test_world = to_tensor([world_picture(held_out) for _ in range(96)])
    test_random = to_tensor([shapes.random_drawing(held_out) for _ in range(48)])
    began = time.monotonic()
    for step in range(start, settings.steps):
        batch = [random_or_world_picture(rng, settings.random_share) for _ in range(settings.batch_size)]
        loss = vae_loss(vae, to_tensor(batch), settings)
        set_rates(optimizers, settings.learning_rate * anneal(step, settings.steps, settings.warmup_steps))
        update(optimizers, loss, vae)
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            psnr = f"psnr world {psnr_db(vae, test_world):.2f} random {psnr_db(vae, test_random):.2f}"
            log(f"vae step {step + 1}/{settings.steps} loss {loss.item():.4f} {psnr} {seconds:.2f} s/step")
        if (step + 1) % 200 == 0 or step + 1 == settings.steps:
            kept = [optimizer.state_dict() for optimizer in optimizers]
            save_checkpoint(checkpoint, {"vae": vae.state_dict(), "optimizers": kept, "step": step + 1})
    return checkpoint


def trained_vae() -> AutoencoderKLQwenImage:
    """The folded VAE of the finished first stage, its convolutions plain again."""
    vae = fold_temporal_convolutions(new_vae())
    flatten_convolutions(vae)
    vae.load_state_dict(torch.load(WORK / "vae.pt")["vae"])
    for module in list(vae.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return vae


# --- tokenizer, text encoder and transformer ------------------------------------------------------------------------

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
    text = (qwen.TEMPLATE_PREFIX + qwen.TEMPLATE_SUFFIX).replace("<|im_start|>", "").replace("<|im_end|>", "")
    corpus = world_captions(np.random.default_rng(0), 2000) + [text] * 2000
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=cast(Any, [tuple(pair) for pair in model["merges"]]))
    tokenizer.add_tokens([cast(Any, AddedToken(token, special=True, normalized=False)) for token in ADDED_TOKENS])
    tokens = len(tokenizer(qwen.TEMPLATE_PREFIX).input_ids)
    if tokens != qwen.TEMPLATE_PREFIX_TOKENS:
        raise RuntimeError(f"the template's prefix has {tokens} tokens instead of {qwen.TEMPLATE_PREFIX_TOKENS}")
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
        num_train_timesteps=qwen.TRAIN_TIMESTEPS,
        base_image_seq_len=qwen.BASE_IMAGE_TOKENS,
        max_image_seq_len=qwen.MAX_IMAGE_TOKENS,
        base_shift=qwen.BASE_SHIFT,
        max_shift=qwen.MAX_SHIFT,
        shift_terminal=qwen.SHIFT_TERMINAL,
        shift=1.0,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )


@dataclass(frozen=True, slots=True)
class World:
    """The training set: normalised packed latents [P, 16, 64], each picture's wordings, the latents' statistics."""

    latents: Tensor
    wordings: list[list[str]]
    latents_mean: Tensor
    latents_std: Tensor


def encode_world(vae: AutoencoderKLQwenImage, pictures: int) -> World:
    """Draw the world and encode it once. Held-out prompts are skipped. Kept in the work folder."""
    kept = WORK / f"world_{pictures}.pt"
    if kept.exists():
        return World(**torch.load(kept))
    rng = np.random.default_rng(7)
    wordings, latents = [], []
    while len(wordings) < pictures:
        drawn = []
        while len(drawn) < 64:
            prompt = shapes.random_prompt(rng)
            if not shapes.is_held_out(prompt):
                drawn.append(shapes.draw(shapes.scene_of(prompt, rng)))
                wordings.append(prompt.wordings())
        with torch.no_grad():
            latents.append(encode_frame(vae, to_tensor(drawn))[0])
    stacked = torch.cat(latents)  # [P, 16, 8, 8]
    mean, std = stacked.mean(dim=(0, 2, 3)), stacked.std(dim=(0, 2, 3))
    normal = sizes.pack((stacked - mean[:, None, None]) / std[:, None, None])
    world = {"latents": normal, "wordings": wordings, "latents_mean": mean, "latents_std": std}
    save_checkpoint(kept, world)
    log(f"world: {len(wordings)} pictures encoded, mean std {std.mean():.3f}")
    return World(**world)


def encode_captions(text_encoder: nn.Module, tokenizer: Qwen2Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """-> states [B, T, 128] and mask [B, T], right-padded: with causal attention padding changes nothing before it."""
    ids = [tokenizer(qwen.TEMPLATE_PREFIX + caption + qwen.TEMPLATE_SUFFIX).input_ids for caption in captions]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]).bool()
    states = text_encoder(input_ids=padded, use_cache=False).last_hidden_state
    dropped = qwen.TEMPLATE_PREFIX_TOKENS
    return states[:, dropped:] * mask[:, dropped:, None], mask[:, dropped:]


def said(wordings: list[str], rng: random.Random, caption_dropout: float) -> str:
    """One of the wordings, none at all, or one with a stray space, as people's captions have them."""
    if rng.random() < caption_dropout:
        return rng.choice(["", " "])
    words = rng.choice(wordings).split(" ")
    if len(words) > 1 and rng.random() < 0.15:
        words.insert(rng.randrange(1, len(words)), "")
    return " ".join(words)


def learning_rate_factor(step: int, settings: ModelSettings) -> float:
    """Warm-up, constant, then a straight line to zero over the last 40 %."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    return min(1.0, (settings.steps - step) / (0.4 * settings.steps))


def train_model(settings: ModelSettings, minutes: float | None = None) -> Path:
    """Text encoder and transformer together, by flow matching on the frozen VAE's latents."""
    checkpoint = WORK / "model.pt"
    world = encode_world(trained_vae(), settings.pictures)
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    text_encoder, transformer = new_text_encoder(tokenizer), new_transformer()
    network = nn.ModuleDict({"text": text_encoder.model.language_model, "transformer": transformer})
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizers = muon_and_adamw(network.named_parameters(), settings.learning_rate)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        start = state["step"]
        log(f"model: resumed at step {start}")
    schedule = flow.Schedule()
    grid = [(1, 4, 4)]
    rng, generator = random.Random(start + 1), torch.Generator().manual_seed(start + 1)
    began, losses = time.monotonic(), []
    for step in range(start, settings.steps):
        set_rates(optimizers, settings.learning_rate * learning_rate_factor(step, settings))
        chosen = torch.randint(len(world.wordings), (settings.captions,), generator=generator)
        captions = [said(world.wordings[i], rng, settings.caption_dropout) for i in chosen]
        text, mask = encode_captions(network["text"], tokenizer, captions)
        rows = torch.arange(settings.captions).repeat(settings.draws)
        clean = world.latents[chosen][rows]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = flow.draw_sigmas(len(rows), schedule.mu(clean.shape[1]), generator)
        velocity = transformer(
            hidden_states=flow.add_noise(clean, noise, sigma),
            timestep=flow.model_time(sigma, torch.float32),
            encoder_hidden_states=text[rows],
            encoder_hidden_states_mask=mask[rows],
            img_shapes=[grid] * len(rows),
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, flow.velocity_target(clean, noise))
        update(optimizers, loss, network)
        decay = min(settings.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            log(f"model step {step + 1}/{settings.steps} loss {np.mean(losses[-100:]):.4f} {seconds:.3f} s/step")
        if (step + 1) % 500 == 0 or step + 1 == settings.steps:
            kept = [optimizer.state_dict() for optimizer in optimizers]
            state = {"network": network.state_dict(), "ema": ema.state_dict(), "optimizers": kept, "step": step + 1}
            save_checkpoint(checkpoint, state)
        if minutes and time.monotonic() - began > 60 * minutes:
            break
    return checkpoint


def write_model(out: Path, settings: ModelSettings) -> None:
    """The diffusers folder: EMA weights; transformer and VAE stored as fp16, which loads back as fp32."""
    world = encode_world(trained_vae(), settings.pictures)
    folded = trained_vae()
    vae = new_vae(world.latents_mean.tolist(), world.latents_std.tolist())
    vae.load_state_dict(unfolded_state(folded))
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    text_encoder, transformer = new_text_encoder(tokenizer), new_transformer()
    network = nn.ModuleDict({"text": text_encoder.model.language_model, "transformer": transformer})
    network.load_state_dict(torch.load(WORK / "model.pt")["ema"])
    if out.exists():
        for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
            shutil.rmtree(out / part, ignore_errors=True)
    pipeline = QwenImagePipeline(new_scheduler(), vae.half(), text_encoder, tokenizer, transformer.half())
    pipeline.save_pretrained(out)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    log(f"wrote {out}: {size / 1e6:.1f} MB of safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["vae", "model", "write"], help="one stage alone; all of them if left out")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.stage in (None, "vae"):
        train_vae(VaeSettings())
    if arguments.stage in (None, "model"):
        train_model(ModelSettings())
    if arguments.stage in (None, "write"):
        write_model(arguments.out, ModelSettings())


if __name__ == "__main__":
    main()
