"""Files of named tensors, read without trusting them, and written."""

from builder.formats.open import open_checkpoint

__all__ = ["open_checkpoint"]
