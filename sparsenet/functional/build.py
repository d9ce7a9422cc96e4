"""What this build offers, and what it runs on."""

from __future__ import annotations

import torch

from sparsenet.functional.native import native_build_info

__all__ = ["build_info"]


def build_info() -> dict:
    """Version, instruction set in use and available, CUDA architectures built, torch and CUDA seen, threads."""
    return {
        **native_build_info(),
        "torch": torch.__version__,
        "cuda_available": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }
