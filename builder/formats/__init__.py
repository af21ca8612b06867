"""Files of named tensors, read without trusting them."""
