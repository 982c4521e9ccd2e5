"""What a step minimises: flow matching on the pictures, and now and then the class as the base model has it.

Owns the loss and its gradients; must not know optimizers or memory plans.

Legend: B batch, N image tokens, C packed channels (64), T text tokens, D the text encoder's width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_utils import flops, models
from lora_utils.adapters import without_lora
from lora_utils.draws import Drawn
from lora_utils.preparation import Run
from lora_utils.streaming import upload


def batch_text(run: Run, captions: Sequence[str]) -> models.Text:
    """The captions' states: fixed ones from the cache, those with the token encoded under gradient."""
    live = list(dict.fromkeys(caption for caption in captions if caption not in run.texts))
    states = {caption: upload(run.texts[caption], run.place.device) for caption in captions if caption in run.texts}
    if live and run.text_encoder is not None:
        used = run.placeholders.used_in(live)
        encoded = models.encode_states(run.text_encoder, run.tokenizer, live, used)
        if any(row.requires_grad for row in used.rows) and not encoded[0].requires_grad:
            raise RuntimeError(f"no gradient reaches {', '.join(used.tokens)}: the text encoder ran without grad mode")
        placed = (state.to(run.place.device) for state in encoded)  # from the host, where the card had no room for it
        states.update(zip(live, placed, strict=True))
    return models.join_text([states[caption] for caption in captions])


def batch_loss(run: Run, drawn: Drawn) -> Tensor:
    """Flow-matching loss of one micro-batch: the mean squared error of the velocity, weighted by the masks, in fp32.

    Where the class is preserved, the target is the velocity that the base model predicts for the same noise.
    """
    noisy = upload(drawn.noisy.to(run.place.dtype), run.place.device)
    text = batch_text(run, drawn.captions)
    sizes = models.shape_of(run.transformer), noisy.shape[1], text.states.shape[1]
    if drawn.preserves:
        with torch.no_grad(), without_lora(run.transformer):
            target = models.predict_velocity(run.transformer, noisy, drawn.sigma, text, drawn.size).float()
        run.flops += len(noisy) * flops.forward_flops(*sizes)
    else:
        target = upload(drawn.target, run.place.device)
    velocity = models.predict_velocity(run.transformer, noisy, drawn.sigma, text, drawn.size)
    run.flops += len(noisy) * flops.training_flops(*sizes, run.recomputed)
    if drawn.weights is None:
        return F.mse_loss(velocity.float(), target)
    return (upload(drawn.weights, run.place.device) * (velocity.float() - target).square()).mean()


def forward_backward(run: Run, drawn: Sequence[Drawn]) -> Tensor:
    """Losses of this process's micro-batches [len(drawn)]; their share of the step's gradients stays."""
    losses = []
    for batch in drawn:
        loss = batch_loss(run, batch)
        (loss / (len(drawn) * run.ranks.count)).backward()
        losses.append(loss.detach())
    return torch.stack(losses)
