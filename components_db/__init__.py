"""The catalog's data: tables of tensor names and shapes, architectures, well-known weights."""
