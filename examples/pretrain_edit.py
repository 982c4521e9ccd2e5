"""The editing model's pretraining: from the small text-to-image model, its VAE and its knowledge of the world.

It learns by flow matching on pairs of images with an instruction: the language model reads the instruction and what
the vision tower sees, the transformer has the images' latents beside the noise. `examples.pretrain --edit` runs it. The
shipped model was made by these settings; its README says how long that took, and how well it edits.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from examples import shapes, small_model
from examples.edit_pairs import CPU, SEEN_PX, TEXT_TO_IMAGE, EditWorld, encode_pairs
from examples.pretrain_vae import WORK, log, to_tensor, train_averaged
from lora_utils import constants
from lora_utils.model import flow
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import image_id, load_tokenizer, pad_embeddings
from lora_utils.model.vae import decode_latents, encode_images, load_vae
from lora_utils.model.variant import EDIT_PLUS
from lora_utils.model.vision import VisionFeatures, features, positions

OUT = Path(__file__).parent / "tiny_qwen_image_edit"
GRID = (1, 4, 4)  # of an image's tokens


@dataclass(frozen=True, slots=True)
class EditSettings:
    steps: int = 6000
    captions: int = 32  # a batch: so many edits ...
    draws: int = 3  # ... at so many draws of noise and sigma; the text encoder runs once for all of them
    learning_rate: float = 1.2e-3
    warmup_steps: int = 100
    caption_dropout: float = 0.1
    # Batches in which image tokens have a text's positions, as diffusers 0.42 gives them with transformers 5 (its issue
    # 14194). So the model reads both, and the stock pipeline samples with it whatever its age.
    plain_positions: float = 0.25
    two_images: float = 0.25  # of the pairs, and of the batches
    # Edits for which the transformer has black images and the vision tower the true ones. Without them the transformer
    # learns to go by its latents alone, and the tower is of no use.
    latents_hidden: float = 0.25
    # The loss weighs an error by how far the decoder shows it, and this share of it evenly. Without that the VAE's
    # latents make a small model spend itself on directions that no one sees: see `visibility`.
    evenly: float = 0.15
    ema_decay: float = 0.999
    pairs: int = 64000


@dataclass(frozen=True, slots=True)
class Known:
    """What the loss has of the VAE: the latents [16, 64] of a black image, and the weights [64, 64] of an error."""

    black: Tensor
    weights: Tensor


def patches(seen: Tensor) -> Tensor:
    """Return the patches [36 I, 1176] of what is seen, [I, 84, 84, 3] uint8, as the processor lays them out."""
    processor = small_model.new_processor()
    mean, std = (torch.tensor(values) for values in (processor.image_mean, processor.image_std))
    pixels = ((seen.float() / 255 - mean) / std).permute(0, 3, 1, 2)  # [I, 3, 84, 84]
    cut = pixels.reshape(-1, 3, 3, 2, 14, 3, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)  # [I, 3, 3, 2, 2, 3, 14, 14]
    return cut.unsqueeze(6).expand(*cut.shape[:6], 2, 14, 14).reshape(-1, 3 * 2 * 14 * 14)


def encode_instructions(
    model: Any, tokenizer: Qwen2Tokenizer, texts: list[str], seen: Tensor, plain_positions: bool
) -> tuple[Tensor, Tensor | None]:
    """-> states [B, T, 128] and mask. Each text has the same number of images, `seen` [B * images, 84, 84, 3]."""
    grids = torch.tensor([[1, SEEN_PX // 14, SEEN_PX // 14]] * len(seen))
    shown = features(model.visual, patches(seen), grids)
    count, mark = len(seen) // len(texts), image_id(tokenizer)
    ids = [tokenizer(EDIT_PLUS.prompt(text, count)).input_ids for text in texts]
    ids = [[token for token in own for _ in range(9 if token == mark else 1)] for own in ids]
    longest = max(map(len, ids))
    padded = torch.tensor([own + [0] * (longest - len(own)) for own in ids])
    embedded = model.language_model.embed_tokens(padded)
    embedded = embedded.masked_scatter((padded == mark).unsqueeze(-1), torch.cat([image.states for image in shown]))
    places = None if plain_positions else _places(ids, longest, mark, shown, count)
    states = model.language_model(inputs_embeds=embedded, position_ids=places, use_cache=False).last_hidden_state
    dropped = constants.EDIT_PREFIX_TOKENS
    text = pad_embeddings([state[dropped : len(own)] for state, own in zip(states, ids, strict=True)])
    return text.states, text.mask


def _places(ids: list[list[int]], longest: int, mark: int, shown: list[VisionFeatures], count: int) -> Tensor:
    places = torch.zeros(3, len(ids), longest, dtype=torch.long)
    for index, own in enumerate(ids):
        places[:, index, : len(own)] = positions(own, mark, shown[index * count : (index + 1) * count])
    return places


def from_text_to_image(tokenizer: Qwen2Tokenizer) -> tuple[Qwen2_5_VLForConditionalGeneration, nn.Module]:
    """Return the text encoder and the transformer with all that the text-to-image model knows."""
    torch.manual_seed(0)
    text_encoder = small_model.new_text_encoder(tokenizer, small_model.EDIT_VISION)
    known = Qwen2_5_VLForConditionalGeneration.from_pretrained(TEXT_TO_IMAGE / "text_encoder").model.language_model
    state = known.state_dict()
    old, words = state.pop("embed_tokens.weight"), load_tokenizer(TEXT_TO_IMAGE).get_vocab()
    language_model = text_encoder.model.language_model
    language_model.load_state_dict(state, strict=False)
    with torch.no_grad():
        matrix = language_model.embed_tokens.weight
        matrix.normal_(std=float(old.std()))
        for word, row in tokenizer.get_vocab().items():
            if word in words:
                matrix[row] = old[words[word]]
    transformer = small_model.new_transformer(zero_cond_t=True)
    trained = QwenImageTransformer2DModel.from_pretrained(TEXT_TO_IMAGE / "transformer", torch_dtype=torch.float32)
    transformer.load_state_dict(trained.state_dict())
    return text_encoder, transformer


def from_editing_model(folder: Path) -> tuple[Qwen2_5_VLForConditionalGeneration, nn.Module]:
    """Return text encoder and transformer of an editing model that this module has written."""
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    return text_encoder, transformer


def _network(
    tokenizer: Qwen2Tokenizer, start: Path | None = None
) -> tuple[nn.ModuleDict, Qwen2_5_VLForConditionalGeneration]:
    text_encoder, transformer = from_editing_model(start) if start else from_text_to_image(tokenizer)
    parts = {"text": text_encoder.model, "transformer": transformer}
    return nn.ModuleDict(parts), text_encoder


def learning_rate_factor(step: int, settings: EditSettings) -> float:
    """Warm-up, constant, then a straight line to zero over the last half."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    return min(1.0, (settings.steps - step) / (0.5 * settings.steps))


def train_edit(settings: EditSettings, start: Path | None = None) -> Path:
    """Train text encoder, vision tower and transformer together, from an editing model or the text-to-image one."""
    world, tokenizer = encode_pairs(settings.pairs, settings.two_images), small_model.train_tokenizer(edit=True)
    vae = load_vae(TEXT_TO_IMAGE, CPU)
    visible = visibility(vae, world.targets[:: settings.pairs // 24].float())
    weights = (1 - settings.evenly) * visible + settings.evenly * torch.eye(len(visible))
    known = Known(black_latents(vae), weights)
    network, _ = _network(tokenizer, start)
    groups = [[i for i, given in enumerate(world.images) if len(given) == count] for count in (1, 2)]

    def new_loss(start: int) -> Callable[[], Tensor]:
        rng, generator = random.Random(start + 1), torch.Generator().manual_seed(start + 1)

        def loss() -> Tensor:
            pairs = rng.sample(groups[rng.random() < settings.two_images], settings.captions)
            return _loss(network, tokenizer, world, known, pairs, settings, rng, generator)

        return loss

    return train_averaged("edit", network, settings, lambda s: learning_rate_factor(s, settings), new_loss, 250)


def black_latents(vae: AutoencoderKLQwenImage) -> Tensor:
    """Return the latents [16, 64] of an image that shows nothing."""
    black = Image.new("RGB", (shapes.SIDE_PX, shapes.SIDE_PX))
    return encode_images(vae, to_tensor([np.asarray(black, float)]))[0]


@torch.no_grad()
def visibility(vae: AutoencoderKLQwenImage, clean: Tensor, step: float = 0.2) -> Tensor:
    """Return how far the decoder shows an error of a token: M [64, 64], of trace 64; e M e is like its square in RGB.

    M is the mean of J^T J over latents [I, 16, 64], and J the decoder's differences over `step`. Every second token is
    moved at a time, so that neighbours don't add up. The largest eigenvalue is 10, and half of them are below 0.3. Flow
    matching has the same minimum under any such weights, for it is the mean velocity.
    """
    size = Size(shapes.SIDE_PX, shapes.SIDE_PX)
    rows, columns = torch.arange(GRID[1] * GRID[2]) // GRID[2], torch.arange(GRID[1] * GRID[2]) % GRID[2]
    total = torch.zeros(clean.shape[2], clean.shape[2])
    for own in clean:
        before = decode_latents(vae, own[None], size)
        for parity in (0, 1):
            moved = ((rows + columns) % 2 == parity).float()[:, None]  # [16, 1]
            after = decode_latents(
                vae, own + step * torch.eye(clean.shape[2])[:, None, :] * moved, size
            )  # [64, 3, H, W]
            seen = ((after - before) / step).flatten(1)
            total += seen @ seen.T
    return total * clean.shape[2] / total.trace()


def _loss(
    network: nn.ModuleDict,
    tokenizer: Qwen2Tokenizer,
    world: EditWorld,
    known: Known,
    pairs: list[int],
    settings: EditSettings,
    rng: random.Random,
    generator: torch.Generator,
) -> Tensor:
    """Flow matching's loss on the targets' tokens, of these pairs at several draws of noise each."""
    texts = [" " if rng.random() < settings.caption_dropout else rng.choice(world.wordings[i]) for i in pairs]
    rows = torch.tensor([world.images[i] for i in pairs])  # [B, images]
    plain = rng.random() < settings.plain_positions
    text, mask = encode_instructions(network["text"], tokenizer, texts, world.seen[rows.flatten()], plain)
    repeated = torch.arange(len(pairs)).repeat(settings.draws)
    clean = world.targets[pairs].float()[repeated]
    hidden = torch.rand(len(pairs), generator=generator) < settings.latents_hidden
    controls = torch.where(hidden[:, None, None, None], known.black, world.controls[rows].float())
    controls = controls.flatten(1, 2)[repeated]  # [B, images * 16, 64]
    noise = torch.randn(clean.shape, generator=generator)
    sigma = flow.sample_sigmas(len(repeated), flow.Schedule().mu(clean.shape[1]), generator)
    velocity = network["transformer"](
        hidden_states=torch.cat([flow.add_noise(clean, noise, sigma), controls], dim=1),
        timestep=flow.model_time(sigma, torch.float32),
        encoder_hidden_states=text[repeated],
        encoder_hidden_states_mask=None if mask is None else mask[repeated],
        img_shapes=[[GRID] * (1 + rows.shape[1])] * len(repeated),
        return_dict=False,
    )[0]
    error = velocity[:, : clean.shape[1]] - flow.velocity_target(clean, noise)
    return (error @ known.weights * error).mean()


def write_edit(out: Path) -> None:
    """Write the diffusers folder: EMA weights; the transformer stored as fp16, the VAE and scheduler as they are."""
    tokenizer = small_model.train_tokenizer(edit=True)
    network, text_encoder = _network(tokenizer)
    network.load_state_dict(torch.load(WORK / "edit.pt")["ema"])
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "processor", "scheduler"):
        shutil.rmtree(out / part, ignore_errors=True)
    for part in ("vae", "scheduler"):
        shutil.copytree(TEXT_TO_IMAGE / part, out / part)
    tokenizer.save_pretrained(out / "tokenizer")
    tokenizer.save_pretrained(out / "processor")
    small_model.new_processor().save_pretrained(out / "processor")
    text_encoder.half().save_pretrained(out / "text_encoder")
    transformer = cast(QwenImageTransformer2DModel, network["transformer"])
    transformer.half().save_pretrained(out / "transformer")
    (out / "model_index.json").write_text(small_model.edit_model_index(EDIT_PLUS.pipeline))
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    log(f"wrote {out}: {size / 1e6:.1f} MB of safetensors")
