"""Numbers of every type carried in float32 or float64 and back, bit for bit."""

import torch
from torch import Tensor

FLOATS = {
    dtype: bits
    for name, bits in {
        "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
        "float8_e4m3fnuz": 8, "float8_e5m2fnuz": 8,
    }.items()
    if (dtype := getattr(torch, name, None)) is not None
}  # fmt: skip
"""Floating-point types and their bits."""

INTEGERS = {
    dtype: None
    for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")
    if (dtype := getattr(torch, name, None)) is not None
}

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOATS, *INTEGERS)}

_SAME_BITS = {64: torch.int64, 32: torch.int32, 16: torch.int16, 8: torch.uint8}
_QUIET = {torch.float32: 0x7FC00000, torch.float64: 0x7FF8000000000000}
"""A NaN with an empty payload."""


def widen(tensor: Tensor, carrier: torch.dtype) -> Tensor:
    """Every number in the carrier's type; a NaN carries the bits that it had."""
    if tensor.dtype == carrier:
        return tensor.contiguous()
    wide = tensor.to(carrier)
    missing = wide.isnan()
    if bool(missing.any()):
        bits = FLOATS[tensor.dtype]
        raw = tensor.contiguous().view(_SAME_BITS[bits]).to(torch.int64) & ((1 << bits) - 1)
        wide = wide.clone()
        inside = wide.view(_SAME_BITS[FLOATS[carrier]])
        payload = raw[missing] if FLOATS[carrier] == 64 else raw[missing] & 0xFFFF
        inside[missing] = (payload | _QUIET[carrier]).to(inside.dtype)
    return wide


def narrow(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `widen`; other numbers are rounded to the nearest."""
    if wide.dtype == dtype:
        return wide
    found = wide.to(dtype)
    missing = wide.isnan()
    if bool(missing.any()):
        bits = FLOATS[dtype]
        inside = wide.contiguous().view(_SAME_BITS[FLOATS[wide.dtype]]).to(torch.int64)
        raw = (inside[missing] & ((1 << bits) - 1)).to(torch.int64)
        kept = _from_bits(raw, dtype)
        found = found.contiguous().clone()
        whole = found.view(_SAME_BITS[bits])
        whole[missing] = torch.where(kept.float().isnan(), kept.view(_SAME_BITS[bits]), whole[missing])
    return found


def _from_bits(raw: Tensor, dtype: torch.dtype) -> Tensor:
    bits = FLOATS[dtype]
    if bits < 64:
        raw = torch.where(raw >= 1 << (bits - 1), raw - (1 << bits), raw) if bits != 8 else raw
    return raw.to(_SAME_BITS[bits]).view(dtype)
