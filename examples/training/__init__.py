"""A trainer for the paper's experiments: data, models, optimizers, and a loop that survives a kill."""
