"""The implicit form: a first backward pass with masked weights."""
