"""What can be done to a component."""
