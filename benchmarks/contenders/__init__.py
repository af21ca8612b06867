"""What the tool is measured against: the plain way with torch, and the least that must be done."""

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
