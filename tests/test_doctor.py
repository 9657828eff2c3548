"""The doctor's findings: each kind of trouble is found, named, and has a way out."""

import shutil
import socket
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_ddp import doctor, pretrain
from simclr_ddp.config import options
from simclr_ddp.config.schema import Doctor
from simclr_ddp.data import device_loader
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.write import write_dataset
from simclr_ddp.losses import p_norm, tiled, tiling
from simclr_ddp.system import machine
from simclr_ddp.training import components, examination, forecast, preflight
from simclr_ddp.training.plan import make_plan
from tests.conftest import write_images
from tests.support.disk import files_limited_to
from tests.support.tiny_run import settings


def findings(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, list[tuple[str, str]]]:
    status = doctor.main(arguments)
    lines = capfd.readouterr().out.splitlines()
    found = [line.split(None, 1) for line in lines]
    return status, [(level, text) for level, text in found if level in ("ok", "warning", "error")]


def built(*arguments: str) -> Doctor:
    pairs = (options.parse_override(argument) for argument in arguments)
    return options.build(Doctor, [("here", dict(pairs))])


def test_a_sound_run(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = settings(images, tmp_path / "new" / "run", "doctor.steps=2", "optim.trust_coefficient=0.001")
    status, found = findings(arguments, capfd)
    assert status == 0 and not [text for level, text in found if level == "error"]
    text = "\n".join(text for _, text in found)
    for part in (
        f"torch {torch.__version__.split('+')[0]}",
        "40 images, 2 classes",
        "its checksum is correct",
        "images are decoded by",
        "the model receives values with min -",
        "batch of 16 images",
        "can be written",
        "24 steps at",
        "hours on one process",
    ):
        assert part in text, part
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_damaged_file(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(images.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.beton").write_bytes(data)
    (tmp_path / "bad.beton.json").write_text(images.with_name("train.beton.json").read_text())
    status, found = findings(settings(tmp_path / "bad.beton", tmp_path / "run", "doctor.steps=0"), capfd)
    assert status == 1 and any("is damaged: its checksum is wrong" in text for level, text in found if level == "error")


@pytest.mark.parametrize(
    ("more", "level", "said"),
    [
        ("doctor.ranks=3", "error", "optim.global_batch_size=16: it does not divide among 3 processes"),
        ("optim.base_learning_rate=0.0001", "warning", "LARS at a learning rate of 0.0001"),
        ("optim.name=sgd,optim.base_learning_rate=30", "warning", "SGD at a learning rate of 30"),
        ("loss.temperature=0.001", "warning", "loss.temperature=0.001 is NT-Xent at 0.001"),
        ("loss.kernel=gaussian,loss.temperature=10", "warning", "loss.temperature=10 is NT-Xent at 5"),
        ("data.workers=1000", "warning", "data.workers=1000: "),
        ("data.train=missing.beton", "error", "missing.beton"),
        ("data.spirograph=rows", "error", "data.spirograph=rows: no effect on the images of"),
        ("data.test=missing.beton", "warning", "missing.beton does not exist"),
        ("data.test={three}", "warning", "has no class class2, only class0, class1"),
        ("data.test={images}", "ok", "40 test images, whose classes the training images have"),
        ("optim.global_batch_size=64", "error", "40 images are fewer than"),
    ],
)
def test_troubles(
    more: str, level: str, said: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if "{three}" in more:
        write_dataset(str(write_images(tmp_path / "three", 6, classes=3)), tmp_path / "three.beton")
    more = more.format(three=tmp_path / "three.beton", images=images)
    status, found = findings([*settings(images, tmp_path / "run", "doctor.steps=0"), *more.split(",")], capfd)
    assert any(said in text for found_level, text in found if found_level == level), found
    assert status == (1 if level == "error" else 0)


def test_nearly_constant_inputs(images: Path, tmp_path: Path) -> None:
    """Pictures of 4 of 256 levels, as 12-bit data look that were divided by the range of 16 bits."""
    source = open_dataset(str(images), "train")
    assert examination.inputs(built("data.size=16"), source).level == "ok"
    folder = tmp_path / "dark"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(source.file.image(i) // 64).save(folder / f"{i}.png")
    write_dataset(str(folder), tmp_path / "dark.beton", mode="raw")
    found = examination.inputs(built("data.size=16"), open_dataset(str(tmp_path / "dark.beton"), "train"))
    assert found.level == "warning" and "views are nearly constant" in found.text and "nearly black" in found.text


def test_no_room(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with files_limited_to(100_000):
        status, found = findings(settings(images, tmp_path / "run", "doctor.steps=0"), capfd)
    assert status == 1 and any("can't be written" in text for level, text in found if level == "error")
    assert list(tmp_path.iterdir()) == []


Usage = namedtuple("Usage", "total used free")


def test_the_room_is_that_of_the_run_directorys_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or Usage(9e9, 0, 9e9))
    assert "9.0 GB are free" in examination.room(built(f"run_dir={tmp_path / 'new' / 'run'}", "model.width=0.125")).text
    assert asked == [tmp_path]


def test_shared_memory_of_one_process(
    images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Batches of 256 x 2 views of 32 pixels are 1.5 MB: two for each of 2 workers, and the one in use, 7.5."""
    monkeypatch.setattr(preflight, "usable_workers", lambda wanted, ranks: wanted)
    arguments = (f"data.train={images}", "device=cpu", "data.workers=2")

    def said(free: int, *more: str) -> list[str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
        return [f.text for f in preflight.machine(built(*arguments, *more), ranks=1) if f.level == "warning"]

    (line,) = said(7 << 20, "data.loader=torch")
    assert "/dev/shm has 7 MB free" in line and "take 8 MB" in line and "--shm-size" in line
    assert said(8 << 20, "data.loader=torch") == [] == said(7 << 20, "data.loader=torch", "data.workers=0")
    assert said(7 << 20, "data.loader=ffcv") == [], "its threads share nothing through it"

    capfd.readouterr()
    for free, amiss in ((1 << 20, 1), (8 << 20, 0)):  # five batches of 40 single views of 64 pixels are 2.3 MB
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free, 0, free))
        preflight.evaluation([open_dataset(str(images), "test")], 2, "torch", 256, 64)
        err = capfd.readouterr().err
        assert err.count("take 2 MB: use docker run --shm-size=8g or --ipc=host, or fewer workers") == amiss, err


def test_workers_beyond_the_cores_of_all_local_ranks(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(preflight, "cores", lambda: 8)
    for ranks, amiss in ((1, 0), (2, 0), (4, 1)):
        found = preflight.machine(built(f"data.train={images}", "device=cpu", "data.workers=4"), ranks)
        assert sum("data.workers=4" in f.text for f in found if f.level == "warning") == amiss


def test_a_check_that_fails_leaves_the_others(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise ValueError("FFCV can't be imported")

    monkeypatch.setattr(examination, "describe_loader", missing)
    monkeypatch.setattr(examination, "recipe", lambda *_: 1 / 0)
    status, found = findings(settings(images, tmp_path / "run", "doctor.steps=0"), capfd)
    errors = [text for level, text in found if level == "error"]
    assert status == 1 and errors[0] == "FFCV can't be imported" and "ZeroDivisionError" in errors[1], found
    assert any("can be written" in text for _, text in found)
    status, found = findings(settings(tmp_path / "missing.beton", tmp_path / "run", "doctor.steps=1"), capfd)
    assert status == 1 and any("can be written" in text for _, text in found)


def test_data_larger_than_the_free_memory(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(str(images), "train")
    for free, level in ((10**9, "ok"), (1000, "warning")):
        monkeypatch.setattr(preflight, "available_bytes", lambda free=free: free)
        (finding,) = preflight.memory(dataset)
        assert finding.level == level and str(images) in finding.text
    assert "in random order" in finding.text and "a local SSD" in finding.text
    assert list(preflight.memory(open_dataset("spirograph", "train"))) == []
    monkeypatch.undo()
    assert 10**7 < (machine.available_bytes() or 0) < 10**14


def test_the_header_of_a_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Negatives; data and checkpoints that do not fit."""
    arguments = settings(images, tmp_path / "run", "optim.steps=1", "data.workers=0")
    assert pretrain.main(arguments) == 0
    out, err = capfd.readouterr()
    assert "N = 16 images: 30 negatives per view" in out.splitlines() and "memory are free" not in out
    assert "MB free" not in err
    assert preflight.negatives(256, 2) == "N = 256 images on 2 ranks: 510 negatives per view, from all ranks"

    monkeypatch.setattr(preflight, "available_bytes", lambda: 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1_000_000, 0, 1_000_000))
    arguments = settings(images, tmp_path / "other", "optim.steps=1", "data.workers=0")
    assert pretrain.main(arguments) == 0
    out, err = capfd.readouterr()
    assert "memory are free: images are read from the disk in every epoch" in out
    (line,) = (line for line in err.splitlines() if "MB free" in line)
    assert "has 1 MB free, but 3 checkpoints take up to" in line and "make room" in line


def test_checkpoints_that_are_there_need_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2500, 0, 2500))
    assert "3 checkpoints" in preflight.room_for(tmp_path, 1000, keep_last=2)
    (tmp_path / "step-00000005.pt").write_bytes(bytes(600))
    assert preflight.room_for(tmp_path, 1000, keep_last=2) == ""


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        found = list(preflight.machine(built("device=cpu"), ranks=2))
    assert any(f"port {port} is in use" in finding.text for finding in found if finding.level == "warning")


def test_a_start_prints_only_what_is_amiss(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for more, expected in (((), ""), (("optim.base_learning_rate=0.0001",), "warning: LARS at")):
        wanted = built(*settings(images, tmp_path / "run", "data.workers=0", "optim.trust_coefficient=0.001"), *more)
        dataset = open_dataset(str(images), "train")
        preflight.at_the_start(wanted, make_plan(wanted, dataset), dataset)
        assert capfd.readouterr().err.startswith(expected)


def test_gpu_memory_and_time_are_predicted_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = built("model.width=0.25", "optim.global_batch_size=64", "doctor.ranks=2", "doctor.steps=0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    texts = [finding.text for finding in examination.examine(wanted)]
    (memory,) = (text for text in texts if "GPU memory" in text)
    (time,) = (text for text in texts if "TFLOP per step" in text)
    assert memory.startswith("about ") and " GB of GPU memory per process, " in memory
    assert time.endswith("(a prediction: docs/scaling.md)")
    wanted.device = "cpu"
    assert not [finding for finding in examination.examine(wanted) if "GPU memory" in finding.text]


class Live(TorchDispatchMode):
    """Within, the bytes of all tensors that are alive, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return result

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("kept", [0, 2**30])
@pytest.mark.parametrize(
    "given",
    [
        *(
            "kernel=cosine",
            "kernel=laplacian",
            "kernel=exponential gamma=0.5",
            "kernel=simple_sum",
            "kernel=concat_sum",
        ),
        *("kernel=arccos", "kernel=arccos order=3", "kernel=laplacian distance_p=1", "kernel=laplacian distance_p=3"),
        *("kernel=simple_sum mix_level=loss", "kernel=spectral"),
    ],
)
def test_the_memory_of_the_loss_is_counted(given: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what the same tiles take on the CPU, a GPU's 4,096 replaced by 256, without buffers that live on."""
    small = tiling.Sizes(256, 128, kept)
    monkeypatch.setattr(tiling, "GPU", small)
    monkeypatch.setattr(tiled, "sizes_for", lambda _: small)
    monkeypatch.setattr(p_norm, "GPU_BLOCK", p_norm.BLOCK)
    monkeypatch.setattr(tiled.Buffers, "take", lambda self, name, numbers, like: like.new_empty(numbers))
    monkeypatch.setattr(tiled.Buffers, "give_back", lambda self, name, buffer: None)
    wanted = built("optim.global_batch_size=512", "head.out=16", *(f"loss.{pair}" for pair in given.split()))
    generator = torch.Generator().manual_seed(0)
    y_a, y_b = (torch.randn(512, 16, generator=generator).requires_grad_() for _ in range(2))
    with Live() as live:
        components.make_objective(wanted)(y_a, y_b).backward()
    predicted = forecast.loss_bytes(wanted, 1)
    if given == "kernel=spectral":
        assert predicted == 0 and live.peak < 5 * 2**20
    else:
        assert live.peak * 0.95 <= predicted <= live.peak * 2, (live.peak, predicted)


def test_images_that_lie_on_the_device_count(images: Path) -> None:
    dataset = open_dataset(str(images), "train")
    wanted = built(f"data.train={images}", "data.loader=device", "data.size=512", "model.width=0.125")
    wanted.optim.global_batch_size = 2
    assert dataset.images is not None
    size = device_loader.kept_bytes(dataset.images, 512)
    numbers = [float(forecast.gpu_memory(wanted, 1, given).text.split()[1]) for given in (None, dataset)]
    assert numbers[1] - numbers[0] == pytest.approx(size / 1e9, abs=0.11) and size > 2e7


def test_the_operations_of_a_step_are_counted() -> None:
    """ResNet-50 at 224 pixels: 4.1 billion multiplications and additions forward, and twice that backward."""
    wanted = built("model.arch=resnet50", "model.width=1", "model.stem=imagenet", "data.size=224")
    once = forecast.flops_per_view(wanted)
    assert once == pytest.approx(3 * 2 * 4.1e9, rel=0.02)
    wanted.model.checkpoint_stages = True
    again = forecast.flops_per_view(wanted)
    wanted.model.checkpoint_stages, wanted.optim.micro_batch_size = False, 32
    assert once * 1.3 < again < once * 4 / 3 < forecast.flops_per_view(wanted) < once * 1.35


@pytest.mark.parametrize(("arch", "size", "stem"), [("resnet18", 32, "cifar"), ("resnet50", 64, "imagenet")])
def test_activations_are_counted_without_memory(arch: str, size: int, stem: str) -> None:
    """Against the bytes that autograd really keeps, in float32."""
    wanted = built(f"model.arch={arch}", "model.width=0.25", f"model.stem={stem}", f"data.size={size}")
    predicted = forecast.activation_bytes(wanted, low=False)
    from simclr_ddp.models.resnet import Encoder
    from simclr_ddp.models.simclr import SimCLR, projection_head

    encoder = Encoder(arch, 0.25, stem)
    model = SimCLR(encoder, projection_head("nonlinear", encoder.width_out))
    own = {p.data_ptr() for p in model.parameters()}
    kept = []
    for count in (2, 6):
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(1, count, 3, size, size))
        kept.append(sum(sizes.values()))
    assert predicted == pytest.approx((kept[1] - kept[0]) / 4, rel=0.02)
