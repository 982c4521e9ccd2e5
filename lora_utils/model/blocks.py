"""The transformer's blocks: diffusers' arithmetic on diffusers' modules, in fewer passes over memory.

This module owns a block's forward and the RoPE tables. It doesn't know of LoRAs, timesteps or how weights are stored:
every linear layer is called as the module that it is. Against diffusers 0.42.1 it saves the fp32 copies that its
RMSNorm keeps for the backward pass, a pass over memory per modulation and per gated residual, the making of the RoPE
table at every step and, on a GPU, most passes between the projections and attention.

Legend: B batch, N image tokens, T text tokens, S = T + N, H heads, E width of a head, D = H * E.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_utils.model import kernels

Project = Callable[[Sequence[nn.Module], Tensor], list[Tensor]]  # several linear layers of one input


def project_each(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Call each layer on x [..., D_in]."""
    return [layer(x) for layer in layers]


class Layout(NamedTuple):
    """Where tokens are: the RoPE table [S, E / 2, 2] of text and images, and how many image tokens are generated.

    `generated` is None where all are. The others, behind them, are of images to edit, which are given without noise.
    """

    rope: Tensor
    generated: int | None


class JointRope(nn.Module):
    """It replaces `pos_embed`: one table [S, E / 2, 2] for text and images, kept for the shapes last seen.

    It holds the rotations' real and imaginary parts.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = original
        self.table = lru_cache(maxsize=64)(self._table)

    def _table(self, shapes: tuple[tuple[int, int, int], ...], text_tokens: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # a table made while sampling must serve training too
            image, text = self.original([list(shapes)], max_txt_seq_len=text_tokens, device=device)
            return torch.view_as_real(torch.cat([text, image]))

    def forward(self, img_shapes: list[Any], max_txt_seq_len: int, device: torch.device) -> Layout:
        shapes = tuple(img_shapes[0])  # the same in all examples; the first is what is generated
        generated = math.prod(shapes[0]) if len(shapes) > 1 else None
        return Layout(self.table(shapes, max_txt_seq_len, device), generated)


def modulate(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm, then * (1 + scale) + shift. x [B, N, D], shift and scale [B, D].

    For one image the modulation is the norm's own affine part and costs no pass of its own.
    """
    if len(x) == 1:
        return F.layer_norm(x, norm.normalized_shape, 1 + scale[0], shift[0], norm.eps)
    return torch.addcmul(shift[:, None], F.layer_norm(x, norm.normalized_shape, eps=norm.eps), 1 + scale[:, None])


def modulate_parts(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor, generated: int | None) -> Tensor:
    """Modulate tokens [B, N, D]. With `generated`, shift and scale are [2 B, D]: the second half is the others'."""
    if generated is None:
        return modulate(x, norm, shift, scale)
    parts = zip(_parts(x, generated), shift.chunk(2), scale.chunk(2), strict=True)
    return torch.cat([modulate(tokens, norm, *modulation) for tokens, *modulation in parts], dim=1)


def add_gated(x: Tensor, gate: Tensor, change: Tensor, generated: int | None) -> Tensor:
    """Return x + gate * change, [B, N, D]. With `generated`, the gate is [2 B, D]: the second half is the others'."""
    if generated is None:
        return torch.addcmul(x, gate[:, None], change)
    parts = zip(_parts(x, generated), gate.chunk(2), _parts(change, generated), strict=True)
    return torch.cat([torch.addcmul(own, rows[:, None], added) for own, rows, added in parts], dim=1)


def _parts(x: Tensor, generated: int) -> tuple[Tensor, ...]:
    """Split tokens [B, N, D] into what is generated and the others. The gradients of both are joined in one pass."""
    return x.split([generated, x.shape[1] - generated], dim=1)


def attend(
    attn: Any, image: Tensor, text: Tensor, mask: Tensor | None, rope: Tensor, project: Project, join: kernels.Join
) -> tuple[Tensor, Tensor]:
    """Attend jointly over image [B, N, D] and text [B, T, D], text first. -> both, before their output layers.

    torch chooses the fastest kernel for the shape; most refuse a mask, so there is none where no text is padded.
    """

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1))

    q, k, v = map(heads, project((attn.to_q, attn.to_k, attn.to_v), image))  # [B, N, H, E]
    text_q, text_k, text_v = map(heads, project((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), text))
    q = join(text_q, q, attn.norm_added_q.weight, attn.norm_q.weight, rope, attn.norm_q.eps)  # [B, S, H, E]
    k = join(text_k, k, attn.norm_added_k.weight, attn.norm_k.weight, rope, attn.norm_k.eps)
    v = torch.cat([text_v, v], dim=1)
    seen = None if mask is None else F.pad(mask, (0, image.shape[1]), value=True)[:, None, None]  # [B, 1, 1, S]
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)  # [B, S, D]
    mixed_text, mixed_image = mixed.split([text.shape[1], image.shape[1]], dim=1)
    return mixed_image, mixed_text


def compute_block(
    block: Any,
    project: Project,
    join: kernels.Join,
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    image_mod: Tensor,
    text_mod: Tensor,
    rope: Tensor,
    generated: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a dual-stream block on image [B, N, D] and text [B, T, D], modulations [B, 6 D] -> text and image.

    With `generated`, only so many image tokens have the noise's level. The others are modulated by the second half of
    `image_mod`, [2 B, 6 D] then.
    """
    i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = image_mod.chunk(6, dim=-1)  # [B, D] each
    t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = text_mod.chunk(6, dim=-1)

    # Attention, over both streams together.
    mixed_image, mixed_text = attend(
        block.attn,
        modulate_parts(image, block.img_norm1, i_shift1, i_scale1, generated),
        modulate(text, block.txt_norm1, t_shift1, t_scale1),
        mask,
        rope,
        project,
        join,
    )
    image = add_gated(image, i_gate1, block.attn.to_out[0](mixed_image), generated)
    text = torch.addcmul(text, t_gate1[:, None], block.attn.to_add_out(mixed_text))

    # The MLP of each stream.
    modulated = modulate_parts(image, block.img_norm2, i_shift2, i_scale2, generated)
    image = add_gated(image, i_gate2, block.img_mlp(modulated), generated)
    text = torch.addcmul(text, t_gate2[:, None], block.txt_mlp(modulate(text, block.txt_norm2, t_shift2, t_scale2)))
    return text, image


Streams = tuple[Tensor, Tensor]  # text [B, T, D] and image [B, N, D]
Compute = Callable[..., Streams]  # what `compute_block` does
# The compiler makes code for each of: a size of 1 or equal to another, a mask or none, and which of the inputs have a
# gradient. Beyond torch's own limit of 8 the rest would run uncompiled, in the middle of a run.
_KINDS = 64


def compiled_block(backend: str = "inductor") -> Compute:
    """Return `compute_block`, compiled at its first calls in training, once for all blocks and for each kind of shape.

    Raises `compile_error()` when it can't be, there or in the first backward pass.
    """
    torch._dynamo.config.recompile_limit = max(_KINDS, torch._dynamo.config.recompile_limit)
    compiled = cast(Compute, torch.compile(compute_block, dynamic=True, backend=backend))

    def compute(*given: Any) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():  # a validation: too few forwards to compile more kinds for
            return compute_block(*given)
        return compiled(*given)

    return compute


def compile_error() -> type[Exception]:
    """Return what is raised for blocks that can't be compiled; it is part of torch's compiler, which is heavy."""
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415

    return TorchDynamoException


class BlockCache(Protocol):
    """What may stand between a block and its arithmetic, and spare some of it: see `sampling.first_block_cache`."""

    def __call__(self, forward: Callable[[], Streams], hidden_states: Tensor, encoder_hidden_states: Tensor) -> Streams:
        """Return the block's text and image, by calling `forward` or in its place."""
        ...


@dataclass(slots=True)
class BlockForward:
    """A block's `forward`, installed once. Its fields say how the block computes; whoever changes that sets a field.

    The LoRA sets `project`, the memory plan `compute` and `checkpointed`, the first-block cache `cache`.
    """

    block: Any
    join: kernels.Join
    project: Project = project_each
    compute: Compute = compute_block
    checkpointed: bool = False  # keep only the inputs for the backward pass, and run again in it
    cache: BlockCache | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Layout,
        joint_attention_kwargs: None = None,
        modulate_index: Tensor | None = None,  # which the layout says already
    ) -> Streams:
        """Compute the block on image [B, N, D] and text [B, T, D], by diffusers' names -> text and image."""
        given = (hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb)

        def forward() -> Streams:
            if not self.checkpointed:
                return self._forward(*given)
            # Nothing in a block is random, so there is no generator's state to keep.
            return cast(Streams, checkpoint(self._forward, *given, use_reentrant=False, preserve_rng_state=False))

        return forward() if self.cache is None else self.cache(forward, hidden_states, encoder_hidden_states)

    def _forward(self, image: Tensor, text: Tensor, mask: Tensor | None, temb: Tensor, layout: Layout) -> Streams:
        """Compute with the modulations of `temb`, maybe from a table: they stay out of what is compiled.

        Where the images to edit have a level of their own, `temb` is [2 B, D]: the noise's, then theirs, which is 0.
        """
        rope, generated = layout
        if not self.block.zero_cond_t:
            generated = None
        elif generated is None:
            temb = temb[: len(image)]
        given = self.block.img_mod(temb), self.block.txt_mod(temb[: len(image)]), rope
        if generated is None:
            return self.compute(self.block, self.project, self.join, image, text, mask, *given)
        return self.compute(self.block, self.project, self.join, image, text, mask, *given, generated)


def install_forwards(transformer: QwenImageTransformer2DModel) -> None:
    """Let the blocks compute this module's way, if they don't yet. Nothing about the weights changes."""
    if isinstance(transformer.pos_embed, JointRope):
        return
    transformer.pos_embed = cast(Any, JointRope(transformer.pos_embed))
    like = transformer.img_in.weight
    join = kernels.choose_join(like.device, like.dtype, transformer.config["attention_head_dim"])
    for block in transformer.transformer_blocks:
        cast(Any, block).forward = BlockForward(block, join)


def forwards_of(transformer: QwenImageTransformer2DModel) -> list[BlockForward]:
    """Return how each block computes, in the order of the blocks; its fields may be set."""
    return [cast(BlockForward, block.forward) for block in transformer.transformer_blocks]


def set_compute(transformer: QwenImageTransformer2DModel, compute: Compute) -> None:
    """Let all blocks compute by this function."""
    for forward in forwards_of(transformer):
        forward.compute = compute


def set_checkpointed(transformer: QwenImageTransformer2DModel, count: int) -> None:
    """Let the first `count` blocks, and no other, be activation-checkpointed.

    The first ones, because when their turn comes in the backward pass, what the later blocks kept is free again.
    """
    for index, forward in enumerate(forwards_of(transformer)):
        forward.checkpointed = index < count
