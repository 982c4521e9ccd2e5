"""The loss: flow matching on the images, and on some batches the class as the base model has it.

Legend: B batch, N image tokens, C packed channels (64), T text tokens, D the text encoder's width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_utils.lora.adapter import without_lora
from lora_utils.model.controls import Controls, text_key
from lora_utils.model.device import to_device
from lora_utils.model.text_encoder import Prompt, TextEmbeddings, encode_prompts, pad_embeddings
from lora_utils.model.transformer import predict_velocity
from lora_utils.training.batches import Batch
from lora_utils.training.state import TrainState


def batch_text(state: TrainState, captions: Sequence[str], controls: Sequence[Controls] = ()) -> TextEmbeddings:
    """Return the captions' embeddings: fixed ones from the cache, those with a token encoded under gradient.

    With images to edit, what the vision tower made of them is fixed too: the language model alone runs at each step.
    """
    components, texts = state.components, state.data.texts
    device, text_encoder = components.placement.device, components.text_encoder
    given = {
        text_key(caption, own): Prompt(caption, own.seen if own else ())
        for caption, own in zip(captions, controls or [None] * len(captions), strict=True)
    }
    names = [text_key(*pair) for pair in zip(captions, controls or [None] * len(captions), strict=True)]
    live = [name for name in given if name not in texts]
    states = {name: to_device(texts[name], device) for name in given if name in texts}
    if live and text_encoder is not None:
        prompts = [given[name] for name in live]
        used = state.placeholders.used_in([prompt.text for prompt in prompts])
        encoded = encode_prompts(text_encoder, components.tokenizer, prompts, used, components.variant)
        learns = torch.is_grad_enabled() and any(embedding.requires_grad for embedding in used.embeddings)
        if learns and not encoded[0].requires_grad:
            raise RuntimeError(f"no gradient reaches {', '.join(used.tokens)}: the text encoder ran without grad mode")
        moved = (each.to(device) for each in encoded)  # from the CPU, where the GPU had no room for the text encoder
        states.update(zip(live, moved, strict=True))
    return pad_embeddings([states[name] for name in names])


HUBER_C = 0.1  # kohya-ss/sd-scripts' default


def velocity_errors(velocity: Tensor, target: Tensor, loss: str) -> Tensor:
    """Return each number's error [B, N, C]: its square, or for huber what grows like it and from c on linearly.

    That is 2 c (sqrt(e^2 + c^2) - c), the pseudo-Huber loss: near 0 it is e^2 too.
    """
    error = velocity - target
    if loss == "mse":
        return error.square()
    return 2 * HUBER_C * ((error.square() + HUBER_C**2).sqrt() - HUBER_C)


def flow_matching_loss(state: TrainState, batch: Batch, needs_base: bool = False, loss: str = "mse") -> Tensor:
    """Return the losses [B]: the mean error of the velocity as `loss` has it, weighted by the masks, in fp32.

    On a batch that holds the class, the target is the velocity that the base model predicts for the same noise; the
    caller says by `needs_base` that the base model has to run.
    """
    placement, transformer = state.components.placement, state.components.transformer
    noisy = to_device(batch.noisy.to(placement.dtype), placement.device)
    text = batch_text(state, batch.captions, batch.controls)
    target = to_device(batch.target, placement.device)
    given = noisy, batch.sigma, text, batch.size, [own.latents for own in batch.controls]
    if needs_base:
        with torch.no_grad(), without_lora(transformer):
            base = predict_velocity(transformer, *given).float()
        target = base if batch.is_prior else target
    velocity = predict_velocity(transformer, *given)
    errors = velocity_errors(velocity.float(), target, loss)  # [B, N, C]
    if batch.weights is not None:
        errors = to_device(batch.weights, placement.device) * errors
    return errors.mean(dim=(1, 2))


def forward_backward(state: TrainState, batches: Sequence[Batch], needs_base: Sequence[bool]) -> Tensor:
    """Compute this process's losses and leave their share of the step's gradients.

    -> [len(batches), batch_size]: an image's each, NaN behind the last of a batch that is short.
    """
    losses = []
    for batch, with_base in zip(batches, needs_base, strict=True):
        each = flow_matching_loss(state, batch, with_base, state.config.loss)
        weighted = each if batch.image_weights is None else each * to_device(batch.image_weights, each.device)
        (weighted.mean() / (len(batches) * state.ranks.world_size)).backward()
        losses.append(F.pad(each.detach(), (0, state.config.batch_size - len(each)), value=torch.nan))
    return torch.stack(losses)
