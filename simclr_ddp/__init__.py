"""Distributed SimCLR and kernel-InfoNCE pretraining: the same run on any number of ranks, resumable anywhere."""

from simclr_ddp.info_nce import KernelInfoNCE

__version__ = "0.1.0"
__all__ = ["KernelInfoNCE"]
