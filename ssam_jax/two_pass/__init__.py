"""Both gradients of a step from one trace of the loss."""
