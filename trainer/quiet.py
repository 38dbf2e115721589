"""Warnings of libraries about themselves, printed as they are imported, which no user can do anything about."""

import logging

NOISE = {
    # transformers imports torchao where it is installed; its kernels for other GPUs, Pythons and torches do not load
    "torchao": "Failed to load",
    # torchao registers enums in a way that torch 2.13 no longer needs
    "torch.utils._pytree": "is an Enum subclass",
}
"""Part of the message by the name of its logger. Nothing else of these loggers is kept back."""


def leave_out_noise() -> None:
    """Keep such messages from being printed. Before the libraries are imported."""
    for name, part in NOISE.items():
        logging.getLogger(name).addFilter(lambda record, part=part: part not in str(record.msg))  # type: ignore[misc]
