"""configs/pretrain/photos.yaml on a few hundred photos, judged by labels that the run never sees."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from simclr_ddp import load_encoder, pretrain
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.write import write_dataset
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation.features import representations
from tests.support.processes import ROOT

ARCHIVES = Path(os.environ.get("SIMCLR_DATA", ROOT.parent / "shared" / "data"))
SMALL = ["model.width=0.25", "model.stem=cifar", "data.size=32", "device=cpu", "threads=1", "data.workers=1"]


def neighbours_of_one_class(run: Path, labelled: Path) -> float:
    """Share of a photo's five nearest neighbours among the others, by cosine, that are of its class."""
    photos, loaded = open_dataset(str(labelled), "test"), load_encoder(run)
    runtime = Runtime(torch.device("cpu"), "fp32", 1)
    h = representations(
        loaded.encoder, photos, loaded.spec, runtime, batch_size=128, workers=0, loader="torch", title="photos"
    )
    similarity = (normalize(h) @ normalize(h).T).fill_diagonal_(-2)
    labels = torch.as_tensor(photos.labels)
    return (labels[similarity.topk(5).indices] == labels[:, None]).double().mean().item()


@pytest.mark.slow
def test_photos_become_better_neighbours(tmp_path: Path) -> None:
    """300 photos of ten classes of Tiny-ImageNet, two thirds of the recipe's epochs.

    An encoder of other classes stands for ImageNet weights.
    """
    archive = ARCHIVES / "tiny-imagenet-subset.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there: SIMCLR_DATA names its folder")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    classes = sorted(path for path in (tmp_path / "train").iterdir() if path.is_dir())
    chosen = classes[::20][:10]
    for folder in chosen + [path for path in classes if path not in chosen][:100]:
        for image in sorted(folder.iterdir())[:30]:
            copies = (f"labelled/{folder.name}", "photos") if folder in chosen else ("others",)
            for copy in copies:
                (tmp_path / copy).mkdir(parents=True, exist_ok=True)
                shutil.copy(image, tmp_path / copy)
    for name in ("labelled", "photos", "others"):
        write_dataset(str(tmp_path / name), tmp_path / f"{name}.beton")

    start, run = tmp_path / "start", tmp_path / "run"
    first = [f"data.train={tmp_path / 'others.beton'}", "data.test=", f"run_dir={start}", "optim.epochs=2"]
    assert pretrain.main([*first, *SMALL, "optim.base_learning_rate=3"]) == 0
    recipe = [str(ROOT / "configs" / "pretrain" / "photos.yaml"), f"data.train={tmp_path / 'photos.beton'}"]
    assert pretrain.main([*recipe, *SMALL, f"run_dir={run}", f"model.init={start}", "optim.epochs=100"]) == 0
    before, after = (neighbours_of_one_class(path, tmp_path / "labelled.beton") for path in (start, run))
    assert 0.1 < before < after - 0.02, (before, after)
