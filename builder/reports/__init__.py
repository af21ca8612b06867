"""What there is to say of checkpoints, to people and to programs."""
