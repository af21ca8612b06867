"""Layouts: how a model's tensors are named and shaped, in original files and in diffusers' folders."""
