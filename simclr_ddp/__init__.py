"""Distributed SimCLR and kernel-InfoNCE pretraining: the same run on any number of ranks, resumable anywhere."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
    from simclr_ddp.distributed.collectives import gather
    from simclr_ddp.evaluation.embed_images import embed_images
    from simclr_ddp.evaluation.knn import knn_predict
    from simclr_ddp.evaluation.logistic_fit import fit_logistic_path
    from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
    from simclr_ddp.models.backbone import backbone
    from simclr_ddp.models.resnet import Encoder
    from simclr_ddp.runs.encoder import load_encoder
    from simclr_ddp.training.optim import LARS, parameter_groups

__version__ = "0.1.0"
__all__ = [
    "LARS",
    "CrossRankBatchNorm",
    "Encoder",
    "KernelInfoNCE",
    "backbone",
    "embed_images",
    "fit_logistic_path",
    "gather",
    "knn_predict",
    "load_encoder",
    "parameter_groups",
]

# Imported when they are first asked for: `--help` and the launchers need no torch.
_MODULES = {
    "CrossRankBatchNorm": "distributed.batch_norm",
    "Encoder": "models.resnet",
    "KernelInfoNCE": "losses.kernel_info_nce",
    "LARS": "training.optim",
    "backbone": "models.backbone",
    "embed_images": "evaluation.embed_images",
    "fit_logistic_path": "evaluation.logistic_fit",
    "gather": "distributed.collectives",
    "knn_predict": "evaluation.knn",
    "load_encoder": "runs.encoder",
    "parameter_groups": "training.optim",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
