"""Masks: which entries to select, in which pattern, and when to select anew."""
