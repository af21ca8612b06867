"""Tensors: seen without being read, cast, moved, digested and scanned."""
