"""Crash-consistent checkpoints on torch.distributed.checkpoint."""

from trainer.checkpoint.background import Saving
from trainer.checkpoint.checkpoint import PER_RANK, Checkpoint, TensorInfo
from trainer.checkpoint.store import CheckpointSaveError, CheckpointStore

__all__ = ["PER_RANK", "Checkpoint", "CheckpointSaveError", "CheckpointStore", "Saving", "TensorInfo"]
