"""Small integers in 16-bit words, as `int_matmul` multiplies them, and what they stand for.

Owns the layout: a run of 128 columns is 32 words of four nibbles or 64 words of two bytes. Nibble i
of word j is column j + 32 i of the run, byte i is column j + 64 i.
"""

from __future__ import annotations

import torch

RUN = 128  # columns: what a matrix is padded to
_QUARTER = 32  # columns that a factor is for


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers [N, C], 0 to 15 or -128 to 127, in words: int16 [N, C * bits / 16]."""
    parts = (q.to(torch.int32) & (2**bits - 1)).view(len(q), -1, 16 // bits, 8 * bits)
    words = parts[:, :, 0].clone()
    for index in range(1, 16 // bits):
        words |= parts[:, :, index] << bits * index
    packed: torch.Tensor = words.to(torch.int16)  # the low 16 bits, whatever their sign is
    return packed.view(len(q), -1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers in words: int32 [N, C]."""
    words = packed.view(len(packed), -1, 1, 8 * bits).to(torch.int32)
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=packed.device)
    q: torch.Tensor = words >> shifts[:, None] & (2**bits - 1)
    if bits == 8:
        q -= (q & 128) << 1
    return q.view(len(packed), -1)


def weights_of(
    packed: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(q - zero) * scale, rounded to `dtype`, as float32 [N, C]: without the scales of rows."""
    values = unpack(packed, bits).float()
    if zeros is not None:
        values -= _spread(zeros, group_size)
    elif bits == 4:
        values -= 8
    if scales is not None and scales.dtype == torch.uint8:
        factors = scales.transpose(0, 1).reshape(len(packed), -1)
        values *= factors.repeat_interleave(_QUARTER, 1)
    elif scales is not None:
        values = (values * _spread(scales.to(dtype).float(), group_size)).to(dtype).float()
    return values


def _spread(groups: torch.Tensor, group_size: int) -> torch.Tensor:
    """[G, N], a number a group, to [N, C]."""
    return groups.T.repeat_interleave(group_size or RUN, 1)
