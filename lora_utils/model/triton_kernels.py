# pyright: reportGeneralTypeIssues=false, reportMissingImports=false
# (Triton's functions have no types.)
"""The kernels in Triton's language. `kernels` imports this module where it wants to run them: triton isn't everywhere.

Both take rows, the heads of all tokens: programs below `text_programs` take the text's, the others the image's. H and E
are the number and the width of the heads, R the rows of a program.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of(text_programs, batch, text_tokens, image_tokens, H: tl.constexpr, R: tl.constexpr):
    """Return the rows of this program within its part, which of them exist, and each one's token and joined row."""
    program = tl.program_id(0)
    is_text = program < text_programs
    tokens = tl.where(is_text, text_tokens, image_tokens)
    row = (program - tl.where(is_text, 0, text_programs)) * R + tl.arange(0, R)
    token = (row // H) % tokens + tl.where(is_text, 0, text_tokens)
    joined = ((row // H) // tokens * (text_tokens + image_tokens) + token) * H + row % H
    return is_text, row, row < batch * tokens * H, token, joined


@triton.jit
def load_part(is_text, text, image, text_weight, image_weight, cell, column, inside):
    """Load the cells [R, E] of the part that a program has, and the weight [E] of its norm."""
    if is_text:
        x = tl.load(text + cell, mask=inside, other=0.0)
        weight = tl.load(text_weight + column)
    else:
        x = tl.load(image + cell, mask=inside, other=0.0)
        weight = tl.load(image_weight + column)
    return x, weight.to(tl.float32)


@triton.jit
def load_angles(table, token, inside, E: tl.constexpr):
    """Load the real and imaginary parts [R, E / 2] of the tokens' rotations."""
    angle = table + (token[:, None] * (E // 2) + tl.arange(0, E // 2)[None, :]) * 2
    return tl.load(angle, mask=inside, other=0.0), tl.load(angle + 1, mask=inside, other=0.0)


@triton.jit
def forward(
    text, image, text_weight, image_weight, table, out, eps, text_programs, batch, text_tokens, image_tokens,
    H: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    is_text, row, exists, token, joined = rows_of(text_programs, batch, text_tokens, image_tokens, H, R)
    column, inside = tl.arange(0, E), exists[:, None]
    cell = row[:, None] * E + column[None, :]
    x, weight = load_part(is_text, text, image, text_weight, image_weight, cell, column, inside)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / E + eps)
    normed = (wide * rstd[:, None] * weight[None, :]).to(x.dtype).to(tl.float32)  # rounded as the norm's output is
    a, b = tl.split(tl.reshape(normed, (R, E // 2, 2)))
    c, d = load_angles(table, token, inside, E)
    turned = tl.reshape(tl.join(a * c - b * d, a * d + b * c), (R, E))
    tl.store(out + joined[:, None] * E + column[None, :], turned.to(x.dtype), mask=inside)


@triton.jit
def backward(
    gradient, text, image, text_weight, image_weight, table, text_out, image_out, eps, text_programs, batch,
    text_tokens, image_tokens, H: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The gradient is turned back, then goes through the norm, whose statistics are made again."""
    is_text, row, exists, token, joined = rows_of(text_programs, batch, text_tokens, image_tokens, H, R)
    column, inside = tl.arange(0, E), exists[:, None]
    cell = row[:, None] * E + column[None, :]
    x, weight = load_part(is_text, text, image, text_weight, image_weight, cell, column, inside)
    given = tl.load(gradient + joined[:, None] * E + column[None, :], mask=inside, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(given, (R, E // 2, 2)))
    c, d = load_angles(table, token, inside, E)
    turned = tl.reshape(tl.join(a * c + b * d, b * c - a * d), (R, E))
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / E + eps)
    scaled = turned * weight[None, :]
    share = tl.sum(scaled * wide, axis=1) / E * rstd * rstd
    result = (rstd[:, None] * (scaled - wide * share[:, None])).to(x.dtype)
    if is_text:
        tl.store(text_out + cell, result, mask=inside)
    else:
        tl.store(image_out + cell, result, mask=inside)
