"""The trainer, its configuration, and the main job: one training run from data to report."""

from sparsenet.data.examples import Evaluation, Examples
from sparsenet.training.config import TrainConfig
from sparsenet.training.initial import prune_at_initialization
from sparsenet.training.trainer import FitResult, Trainer

__all__ = ["Evaluation", "Examples", "FitResult", "TrainConfig", "Trainer", "prune_at_initialization"]
