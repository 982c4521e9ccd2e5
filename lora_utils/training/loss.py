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
        learns = torch.is_grad_enabled() and any(row.requires_grad for row in used.rows)
        if learns and not encoded[0].requires_grad:
            raise RuntimeError(f"no gradient reaches {', '.join(used.tokens)}: the text encoder ran without grad mode")
        placed = (state.to(run.place.device) for state in encoded)  # from the host, where the card had no room for it
        states.update(zip(live, placed, strict=True))
    return models.join_text([states[caption] for caption in captions])


def picture_losses(run: Run, drawn: Drawn, accompany: bool = False) -> Tensor:
    """Flow-matching losses [B]: the mean squared error of the velocity, weighted by the masks, in fp32.

    Where the class is preserved, the target is the velocity that the base model predicts for the same noise.
    `accompany`: run the base model all the same, for other cards that need this one's part of it.
    """
    noisy = upload(drawn.noisy.to(run.place.dtype), run.place.device)
    text = batch_text(run, drawn.captions)
    sizes = models.shape_of(run.transformer), noisy.shape[1], text.states.shape[1]
    target = upload(drawn.target, run.place.device)
    if drawn.preserves or accompany:
        with torch.no_grad(), without_lora(run.transformer):
            base = models.predict_velocity(run.transformer, noisy, drawn.sigma, text, drawn.size).float()
        run.flops += len(noisy) * flops.forward_flops(*sizes)
        target = base if drawn.preserves else target
    velocity = models.predict_velocity(run.transformer, noisy, drawn.sigma, text, drawn.size)
    run.flops += len(noisy) * flops.training_flops(*sizes, run.recomputed)
    errors = (velocity.float() - target).square()  # [B, N, C]
    if drawn.weights is not None:
        errors = upload(drawn.weights, run.place.device) * errors
    return errors.mean(dim=(1, 2))


def forward_backward(run: Run, drawn: Sequence[Drawn], accompany: Sequence[bool] = ()) -> Tensor:
    """Losses of this process's micro-batches; their share of the step's gradients stays.

    `accompany` says for each what `picture_losses` is to do; not given, nothing.

    -> [len(drawn), batch_size]: a picture's each, NaN behind the last of a batch that is short.
    """
    losses = []
    for batch, along in zip(drawn, accompany or [False] * len(drawn), strict=True):
        each = picture_losses(run, batch, along)
        (each.mean() / (len(drawn) * run.ranks.count)).backward()
        losses.append(F.pad(each.detach(), (0, run.config.batch_size - len(each)), value=torch.nan))
    return torch.stack(losses)
