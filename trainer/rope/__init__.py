"""Rotary position embeddings beyond the length that a model was trained with."""
