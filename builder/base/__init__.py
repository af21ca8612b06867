"""What all else stands on; knows nothing of models."""
