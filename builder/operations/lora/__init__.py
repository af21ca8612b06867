"""Adapters of models: LoRA and its kin, as steps of a recipe."""
