"""A recipe's sources: found, opened, and had from elsewhere."""
