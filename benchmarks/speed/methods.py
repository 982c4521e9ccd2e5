"""The ways in which a step is computed: ours, ours with a placeholder token, and the straightforward one."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from benchmarks.speed.jobs import SOURCE, Job, weights_of
from examples import demo
from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.lora.adapter import AdapterSettings, attach_adapter
from lora_utils.model import flow
from lora_utils.model.components import Components
from lora_utils.model.controls import Controls
from lora_utils.model.latents import ControlLatents
from lora_utils.model.loading import fill_parameters
from lora_utils.model.memory_plan import MemoryPlan
from lora_utils.model.text_encoder import load_tokenizer
from lora_utils.model.transformer import Storage, build_transformer
from lora_utils.placeholder.embedding import initial_embedding
from lora_utils.placeholder.tokens import Placeholders, no_placeholders
from lora_utils.training import loop
from lora_utils.training.batches import Batch, LargestBatch
from lora_utils.training.distributed import SINGLE_PROCESS
from lora_utils.training.optimizers import new_optimizers
from lora_utils.training.preserved import NOTHING
from lora_utils.training.recompute import change_plan
from lora_utils.training.state import TrainData, TrainState

SIGMA = 0.5


def batch_of(job: Job) -> tuple[Batch, Tensor]:
    """One batch and its caption's states [T, D], on the CPU."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, job.batch, job.size.tokens, constants.PACKED_CHANNELS, generator=generator)
    text = torch.randn(job.text_tokens, job.shape.text_width, generator=generator).to(job.placement.dtype)
    sigma, controls = torch.full((job.batch,), SIGMA), ()
    if job.edit:
        shown = ControlLatents(torch.randn(*latents.shape[2:], generator=generator), (job.size,))
        controls = (Controls(shown, ()),) * job.batch
    captions = ("",) * job.batch
    return Batch(latents[0], latents[1], sigma, captions, job.size, captions, controls=controls), text


def new_run(job: Job, table: bool = True) -> TrainState:
    """Return a run as `setup` does, with an empty caption's text at hand; with a table of the modulations or not."""
    times = flow.model_time(torch.tensor([SIGMA]), job.placement.dtype) if table else None
    stream, storage = weights_of(job.config, job.placement), Storage(job.quantization, times)
    transformer = build_transformer(job.config, stream, SOURCE, job.placement, storage)
    config = TrainConfig(rank=job.rank, batch_size=job.batch, lora_targets=job.lora_targets, seed=0)
    lora = attach_adapter(transformer, AdapterSettings(config.lora_targets, job.rank), torch.Generator().manual_seed(0))
    plan = MemoryPlan(job.quantization, True, job.compiled, checkpointed_blocks=job.checkpointed)
    tokens, unused = job.text_tokens, cast(Any, None)
    run = TrainState(
        config=config,
        ranks=SINGLE_PROCESS,
        base_model="",
        init_weights="",
        data=TrainData([], [], [], NOTHING, {"": batch_of(job)[1]}, {"": tokens}),
        largest=LargestBatch(job.size, "", tokens, unused),
        components=Components(unused, flow.Schedule(), None, None, transformer, job.placement, SOURCE),
        plan=plan,
        lora=lora,
        placeholders=no_placeholders(),
        initial_embeddings=(),
        optimizers=new_optimizers(config, lora, (), 0.0),
        stream=unused,
    )
    change_plan(run, compiled=job.compiled)
    return run


def ours(job: Job) -> Callable[[], float]:
    """The package's own step, as `train` runs it."""
    run, batch = new_run(job), [batch_of(job)[0]]
    return lambda: loop.take_step(run, batch, 0).loss


def token(job: Job) -> Callable[[], float]:
    """The same with a new token in the caption: the text encoder reads it at every step, and its embedding learns."""
    run, batch = with_token(job, new_run(job))
    return lambda: loop.take_step(run, [batch], 0).loss


def with_token(job: Job, run: TrainState) -> tuple[TrainState, Batch]:
    """Let a run train a token. -> the run and a batch whose caption holds it"""
    batch = batch_of(job)[0]
    run.components.tokenizer = load_tokenizer(demo.MODEL)  # its ids are in any vocabulary
    with torch.device(job.placement.device):
        encoder: Any = cast(Any, Qwen2_5_VLTextModel)._from_config(
            Qwen2_5_VLTextConfig(**job.preset.text_encoder), dtype=job.placement.dtype
        )
    run.components.text_encoder = encoder.eval().requires_grad_(False)
    row = (
        initial_embedding(job.shape.text_width, 1e-5, torch.Generator().manual_seed(0))
        .to(job.placement.device)
        .requires_grad_()
    )
    run.placeholders = Placeholders((demo.TOKEN,), (len(run.components.tokenizer),), (row,))
    run.optimizers = new_optimizers(run.config, run.lora, run.placeholders.embeddings, 5e-4)
    caption = demo.TOKEN * (job.text_tokens - constants.TEMPLATE_SUFFIX_TOKENS)  # as long as the other methods' text
    run.data = replace(run.data, text_tokens={caption: job.text_tokens})
    return run, replace(batch, captions=(caption,) * job.batch)


def plain(job: Job) -> Callable[[], float]:
    """diffusers' train_dreambooth_lora_qwen_image.py, its step on one cached batch."""
    transformer, loss_of = plain_loss(job)
    weights = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def plain_loss(job: Job) -> tuple[nn.Module, Callable[[], Tensor]]:
    """-> the transformer as that example adapts it, and what computes its loss"""
    with init_empty_weights():
        transformer = cast(QwenImageTransformer2DModel, QwenImageTransformer2DModel.from_config(job.config))
    fill_parameters(transformer, weights_of(job.config, job.placement)(lambda name: name), SOURCE)
    cast(nn.Module, transformer).to(job.placement.device).requires_grad_(False)
    targets = [layer.removeprefix("attn.") for layer in constants.ATTENTION_TARGETS]
    transformer.add_adapter(
        LoraConfig(r=job.rank, lora_alpha=job.rank, init_lora_weights="gaussian", target_modules=targets)
    )
    if job.checkpointed:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    batch, text = batch_of(job)
    mixed = job.placement.dtype != torch.float32

    shown = [own.latents.tokens for own in batch.controls]
    given = torch.cat([batch.noisy, torch.stack(shown)], dim=1) if shown else batch.noisy
    shapes = [(1, *job.size.grid)] * (2 if shown else 1)

    def loss_of() -> Tensor:
        with torch.autocast(job.placement.device.type, job.placement.dtype) if mixed else contextlib.nullcontext():
            velocity = transformer(
                hidden_states=given.to(job.placement.device, job.placement.dtype),
                encoder_hidden_states=text.to(job.placement.device).expand(job.batch, -1, -1),
                encoder_hidden_states_mask=None,
                timestep=batch.sigma.to(job.placement.device),
                img_shapes=[shapes] * job.batch,
                return_dict=False,
            )[0][:, : job.size.tokens]
        return F.mse_loss(velocity.float(), batch.target.to(job.placement.device))

    return cast(nn.Module, transformer), loss_of


METHODS: dict[str, Callable[[Job], Callable[[], float]]] = {"ours": ours, "plain": plain, "token": token}
