"""Packed weights: named, decoded and made."""

from builder.tensors.packed.schemes import (
    IN_HEADER,
    OPAQUE,
    Packing,
    companions,
    described,
    packing,
)

__all__ = ["IN_HEADER", "OPAQUE", "Packing", "companions", "described", "packing"]
