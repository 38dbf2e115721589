"""Cross entropy of a step: a sum over counted targets, from the hidden states in pieces or from whole logits."""
