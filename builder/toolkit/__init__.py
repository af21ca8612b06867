"""What the commands of one line do."""
