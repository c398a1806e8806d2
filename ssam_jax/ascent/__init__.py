"""The ascent: which way, how far, and in which norm."""
