"""A declarative build system for model checkpoints."""

__version__ = "0.1.0"
