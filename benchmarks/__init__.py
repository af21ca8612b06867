"""Full-size checkpoints made on the spot, and what is measured on them."""
