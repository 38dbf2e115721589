"""From text to rows of tokens: sources, tokenizers, token files, packing, and the order of samples.

Imports nothing slow: the configuration lives here too, and is checked before anything heavy begins.
"""

IGNORE = -100
"""Label of a position that no loss is counted on (torch's default ignore_index)."""
