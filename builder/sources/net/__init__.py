"""Sources from the network: addresses, pins, downloads and remote tables of contents."""
