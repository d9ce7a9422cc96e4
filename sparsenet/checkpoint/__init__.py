"""Checkpoints: a model with its topology, optimizer, sparsifier and scheduler in one file that never unpickles."""

from sparsenet.checkpoint.saving import Checkpoint, FileContents, describe, load, save

__all__ = ["Checkpoint", "FileContents", "describe", "load", "save"]
