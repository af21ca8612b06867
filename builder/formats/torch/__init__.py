"""PyTorch's files, in all the forms they have had, read without running them."""
