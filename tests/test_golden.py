"""Outputs of other people's code, as arrays in tests/golden (its README says how each was made), against ours.

What differs there on purpose is in docs/differences.md, and its figures are tested here too.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from simclr_ddp import LARS, CrossRankBatchNorm, KernelInfoNCE
from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data import augmentations, crops
from simclr_ddp.data.batches import Batch
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation import logistic
from simclr_ddp.evaluation.chunks import Features
from simclr_ddp.models import resnet
from simclr_ddp.training.components import Training, make_training
from simclr_ddp.training.optim import parameter_groups, set_learning_rate
from simclr_ddp.training.plan import make_plan
from simclr_ddp.training.schedule import learning_rate, peak_learning_rate


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
        return dict(arrays)


def tensor(array: np.ndarray) -> Tensor:
    return torch.tensor(array)


# --- losses ---------------------------------------------------------------------------------------------------------


def assert_loss(
    loss: Callable[[Tensor, Tensor], Tensor], arrays: dict[str, np.ndarray], name: str, within: float
) -> None:
    y = tensor(arrays["y"]).requires_grad_()
    value = loss(y[0], y[1])
    (gradient,) = torch.autograd.grad(value, y)
    expected = tensor(arrays[f"gradient_{name}"])
    assert value.item() == pytest.approx(arrays[f"loss_{name}"].item(), rel=within), name
    assert (gradient - expected).norm() < within * expected.norm(), name


def test_nt_xent_is_half_of_the_official_loss() -> None:
    arrays = golden("nt_xent")
    for temperature in (1.0, 0.5, 0.1, 0.05, 0.02):
        objective = KernelInfoNCE("cosine", temperature)
        assert_loss(lambda a, b, ours=objective: 2 * ours(a, b), arrays, str(temperature), 1e-12)


def test_kernels_are_those_of_the_kernel_infonce_code() -> None:
    arrays = golden("kernel_infonce")
    cases = {}
    for t in (1.0, 0.5, 0.2):
        cases |= {f"gamma{gamma}_t{t}": KernelInfoNCE("exponential", t, gamma=gamma) for gamma in (2.0, 1.0, 0.5)}
        for theirs, ours in (("sum", "simple_sum"), ("product", "concat_sum")):
            objective = KernelInfoNCE(ours, t, mix_weight=0.3, mix_level="loss")
            cases[f"{theirs}_gamma1_lambda0.3_t{t}"] = objective
    for p in (1.0, 3.0, math.inf):
        cases[f"distance{p}_gamma1_t0.5"] = KernelInfoNCE("laplacian", 0.5, distance_p=p)
        cases[f"norm{p}_gamma1_t0.5"] = KernelInfoNCE("laplacian", 0.5, norm_p=p)
    cases |= {f"arccos{order}_t0.5": KernelInfoNCE("arccos", 0.5, order=order) for order in (1, 2, 3)}
    for name, objective in cases.items():
        # 1e-12 was added inside their arc cosine
        assert_loss(objective, arrays, name, 1e-11 if "arccos" in name else 1e-12)
    for t in (1.0, 0.5, 0.2):
        assert_loss(KernelInfoNCE("gaussian", t), arrays, f"gamma2.0_t{t}", 1e-12)
        assert_loss(KernelInfoNCE("laplacian", t), arrays, f"gamma1.0_t{t}", 1e-12)

    for radius_squared in (1.0, 10.0):
        objective = KernelInfoNCE("spectral", radius=math.sqrt(radius_squared))

        def theirs(a: Tensor, b: Tensor, ours: KernelInfoNCE = objective, mu: float = radius_squared) -> Tensor:
            """Ours, with the mean of the squares over N (N - 1) instead of 2 N (2 N - 1) pairs."""
            n = len(a)
            positive = mu * nn.functional.cosine_similarity(a, b).mean()
            return (ours(a, b) + 2 * positive) * 2 * (2 * n - 1) / (n - 1) - 2 * positive

        assert_loss(theirs, arrays, f"spectral_mu{radius_squared}", 1e-12)
    used = len(cases) + 2
    assert used == sum(name.startswith("loss_") for name in arrays), "every member is compared"


# --- optimizer and schedule -----------------------------------------------------------------------------------------


def test_lars_is_the_official_one_for_50_steps() -> None:
    arrays = golden("lars")
    names = {"kernel": True, "zero_kernel": True, "bias": False, "batch_normalization_gamma": False}  # adapted?
    for decay in (0.0, 1e-4, 1e-2):
        weights = {name: nn.Parameter(tensor(arrays[f"start_{name}"])) for name in names}
        groups = [
            {"params": [w for name, w in weights.items() if names[name] == adapt], "adapt": adapt}
            for adapt in (True, False)
        ]
        optimizer = LARS(groups, lr=0.0, momentum=0.9, weight_decay=decay)
        for step, rate in enumerate(arrays["learning_rates"], start=1):
            set_learning_rate(optimizer, float(rate))
            for name, w in weights.items():
                w.grad = tensor(arrays[f"gradients_{name}"][step - 1])
            optimizer.step()
            for name, w in weights.items() if step in (2, 10, 50) else ():
                expected = tensor(arrays[f"after{step}_{decay}_{name}"])
                torch.testing.assert_close(w.detach(), expected, rtol=1e-10, atol=1e-12, msg=f"{name} after {step}")


@pytest.mark.parametrize(
    ("name", "batch", "images", "epochs", "warmup", "base", "scaling"),
    [
        ("imagenet", 4096, 1_281_167, 100, 10, 0.3, "linear"),
        ("cifar", 512, 50_000, 1000, 10, 1.0, "linear"),
        ("small", 64, 3_200, 10, 2, 0.3, "linear"),
        ("odd", 100, 3_333, 7, 1.5, 0.3, "linear"),
        ("nowarm", 64, 3_200, 10, 0, 0.3, "linear"),
        ("sqrt", 256, 20_000, 10, 1, 0.3, "sqrt"),
    ],
)
def test_the_schedule_is_the_official_one(
    name: str, batch: int, images: int, epochs: int, warmup: float, base: float, scaling: str
) -> None:
    arrays = golden("schedule")
    total, warmup_steps = (int(n) for n in arrays[f"{name}_total"])
    peak = peak_learning_rate(base, scaling, batch)
    for step, rate in arrays[name]:
        ours = learning_rate(int(step), peak, warmup_steps, total, "cosine")
        assert ours == pytest.approx(rate, rel=1e-5, abs=1e-7 * peak), step  # theirs is in float32
    # Theirs drops images at the end of the run only, and has one step more; ours, at the end of every epoch.
    assert total == images * epochs // batch + 1 >= epochs * (images // batch) + 1
    assert warmup_steps == warmup * images // batch


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    """The official network of tests/golden, with the weights that it started from, and the option that matches it."""
    torch.set_num_threads(1)
    monkeypatch.setitem(resnet.BLOCKS, "resnet50", (Bottleneck, (1, 1, 1, 1)))
    values = {
        "precision": "fp64",
        "run_dir": "not written",
        "data.train": "views",
        "data.size": 8,
        "data.augmentation.flip": 0,
        "data.augmentation.jitter": 0,
        "data.augmentation.greyscale": 0,
        "data.augmentation.mean": [0, 0, 0],
        "data.augmentation.std": [1, 1, 1],
        "model.arch": "resnet50",
        "model.width": 1 / 32,
        "model.stem": "cifar",
        "head.out": 8,
        "loss.temperature": 0.5,
        "optim.global_batch_size": 6,
        "optim.weight_decay": 5e-5,
        "optim.unadapted_rate": 2,
    }
    settings = options.build(Pretrain, [("the test", values)])
    dataset = Dataset("views", 6, None, None, "")
    runtime = Runtime(torch.device("cpu"), "fp64", 1)
    made = make_training(settings, runtime, dataset, make_plan(settings, dataset))
    arrays, first = golden("training"), 0
    parameters = dict(made.state.model.named_parameters())
    assert sorted(arrays["start_names"]) == sorted(parameters)
    with torch.no_grad():
        for name in arrays["start_names"]:
            parameter = parameters[name]
            last = first + parameter.numel()
            parameter.copy_(tensor(arrays["start_values"][first:last]).view_as(parameter))
            first = last
    assert first == len(arrays["start_values"])
    return made


def official_rate(step: int) -> float:
    return float(np.float32(0.1 * min(1, step / 4)))


def batch_of(arrays: dict[str, np.ndarray]) -> Batch:
    return Batch(tensor(arrays["views"].transpose(0, 1, 4, 2, 3)), torch.arange(6), None)


def take_step(training: Training, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    set_learning_rate(training.state.optimizer, official_rate(step))
    loss, y = training.forward_backward(batch, 0)
    training.state.step(training.agree(loss, y, accuracy=False).failed)
    return loss, y


def test_training_is_the_official_one_step_for_step(training: Training) -> None:
    """Projections, gradients and ten losses of the official model: optim.unadapted_rate=2, and half of its decay."""
    arrays, state, counts = golden("training"), training.state, {}
    batch = batch_of(arrays)
    norms = {m: name for name, m in state.model.encoder.named_modules() if isinstance(m, CrossRankBatchNorm)}
    for module, name in norms.items():
        module.register_forward_hook(lambda _, x, __, name=name: counts.update({name: x[0].numel() // x[0].shape[1]}))
    for step, expected in enumerate(arrays["losses"]):
        loss, y = take_step(training, batch, step)
        assert 2 * loss.item() == pytest.approx(expected, rel=1e-9), step
        if step == 0:
            torch.testing.assert_close(y.flatten(0, 1), tensor(arrays["projections0"]), rtol=1e-9, atol=1e-9)
            parameters = dict(state.model.named_parameters())
            for name, norm in zip(arrays["gradient_norm_names"], arrays["gradient_norms0"], strict=True):
                assert 2 * parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-12), name

    # Their running variances are biased; those of torch are larger by n / (n - 1).
    weight_of_start = 0.9 ** len(arrays["losses"])
    images = batch.inputs.flatten(0, 1).double() / 255
    state.model.eval()
    for correct in (False, True):
        for module, name in norms.items() if correct else ():
            n = counts[name]
            module.running_var.sub_(weight_of_start).mul_((n - 1) / n).add_(weight_of_start)
        with torch.no_grad():
            h = state.model.encoder(images)
        difference = (h - tensor(arrays["eval10"])).norm() / h.norm()
        assert difference < 1e-7 if correct else 0.01 < difference < 0.1


def test_unadapted_rate_repeats_twenty_steps_of_a_loss_of_twice_the_size(training: Training) -> None:
    """Against the official rule written out, on twice the loss and with their decay of 1e-4."""
    batch = batch_of(golden("training"))
    model, optimizer = training.state.model, training.state.optimizer
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    for step in range(20):
        take_step(training, batch, step)
    ours = {name: p.detach().clone() for name, p in model.named_parameters()}

    model.load_state_dict(start | buffers)
    adapted = {id(w) for w in parameter_groups(model)[0]}
    momentum = {name: torch.zeros_like(w) for name, w in start.items()}
    for step in range(20):
        training.forward_backward(batch, 0)
        with torch.no_grad():
            for name, w in model.named_parameters():
                g, ratio = 2 * w.grad, 1.0
                if id(w) in adapted:
                    g += 1e-4 * w
                    ratio = 0.001 * w.norm() / g.norm() if w.norm() > 0 and g.norm() > 0 else 1.0
                momentum[name].mul_(0.9).add_(official_rate(step) * ratio * g)
                w -= momentum[name]
    assert isinstance(optimizer, LARS)
    for name, w in model.named_parameters():
        assert (ours[name] - w).norm() <= 1e-9 * w.norm(), name
        assert (w - start[name]).norm() > 1e-3 * start[name].norm(), name


def test_tensors_of_zeros_take_the_rate_of_what_is_not_adapted() -> None:
    zeros, bias = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))
    zeros.grad, bias.grad = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 0.0])
    LARS([{"params": [zeros]}, {"params": [bias], "adapt": False}], lr=0.5, unadapted_rate=2.0).step()
    assert zeros.tolist() == [-1.0, 2.0, 0.0] and bias.tolist() == [0.0, 1.0]


# --- augmentation ---------------------------------------------------------------------------------------------------


def test_colours_and_blur_are_the_official_ones() -> None:
    """Without contrast and saturation, which have another definition there."""
    arrays = golden("augmentations")
    images = tensor(arrays["images"]).permute(0, 3, 1, 2) / 255

    def difference(changed: Tensor, name: str) -> float:
        return (changed.permute(0, 2, 3, 1) - tensor(arrays[name])).abs().max().item()

    for factor in (0.4, 1.6):
        factors = torch.full((2,), factor)
        assert difference(augmentations.brightness(images, factors), f"brightness_{factor}") < 1e-6
        # About the mean of each channel instead of the mean luma; S of HSV instead of the distance from the luma.
        assert difference(augmentations.contrast(images, factors), f"contrast_{factor}") > 0.1
        by_channel = images * factor + images.mean((2, 3), keepdim=True) * (1 - factor)
        assert difference(by_channel.clamp(0, 1), f"contrast_{factor}") < 1e-6
        assert difference(augmentations.saturation(images, factors), f"saturation_{factor}") > 0.1
    for turns in (-0.2, 0.1):
        assert difference(augmentations.shift_hue(images, torch.full((2,), turns)), f"hue_{turns}") < 1e-6
    assert difference(augmentations.greyscale(images), "greyscale") < 2e-4  # their luma has 0.2989 for 0.299
    image = tensor(arrays["blur_image"])[None, None, :, :, 0] / 255
    for sigma in (0.1, 0.7, 2.0):
        blurred = augmentations.gaussian_blur(image, torch.tensor([sigma]))[0, 0]
        assert (blurred - tensor(arrays[f"blur_{sigma}"])).abs().max() < 1e-6


def test_crops_beside_the_official_ones() -> None:
    """Evaluation boxes are the same but for the rounding of an odd margin; random boxes have another law."""
    arrays = golden("crops")
    for height, width, *box in arrays["evaluation_boxes"].tolist():
        top, left, *sides = crops.evaluation_box(height, width, 224)
        assert sides == box[2:]
        assert (top + (height - sides[0]) % 2, left + (width - sides[1]) % 2) == tuple(box[:2])

    for height, width in ((32, 32), (96, 96), (400, 500), (500, 333)):
        name, count = f"{height}x{width}", 4000
        boxes = crops.crop_boxes(0, 0, np.arange(count), np.tile([[height, width]], (count, 1)), 1)[:, 0]
        top, left, h, w = boxes.T
        area, aspect = h * w / (height * width), w / h
        assert area.mean() - arrays[f"{name}_area"].mean() == pytest.approx(0.05, abs=0.012)
        assert arrays[f"{name}_area"].min() >= 0.0999 and area.min() < 0.0815
        for centre, ours in (("centre_y", (top + h / 2) / height), ("centre_x", (left + w / 2) / width)):
            assert ours.mean() == pytest.approx(arrays[f"{name}_{centre}"].mean(), abs=0.025)
        for values in (aspect, arrays[f"{name}_aspect"]):  # widths and heights are whole pixels
            assert 3 / 4 - 1.3 / h.min() < values.min() < values.max() < 4 / 3 + 1.8 / h.min()
    square = arrays["96x96_area"].mean()
    assert round(float(square), 2) == 0.43


# --- InvCLR ---------------------------------------------------------------------------------------------------------


def test_the_colour_distortion_of_invclr_and_its_gradient() -> None:
    arrays = golden("invclr")
    factors = tensor(arrays["jitter_factors"]).requires_grad_()
    images = augmentations.colour_jitter(tensor(arrays["jitter_images"]), factors, hue=augmentations.rotate_chroma)
    torch.testing.assert_close(images.detach(), tensor(arrays["jitter_result"]), rtol=1e-12, atol=1e-12)
    ramp = torch.arange(images.numel(), dtype=torch.float64).view_as(images) / images.numel()
    (gradient,) = torch.autograd.grad((images * ramp).sum(), factors)
    torch.testing.assert_close(gradient, tensor(arrays["jitter_factor_gradient"]), rtol=1e-10, atol=1e-10)


def test_the_linear_models_of_invclr() -> None:
    """Their 60 rounds of L-BFGS in float32 stop near the minimum that ours finds."""
    arrays = golden("invclr")
    x, labels, numbers = (tensor(arrays[name]) for name in ("features", "labels", "numbers"))
    n = int(arrays["train"])
    rows = torch.arange(n)
    for strength in (0.001, 0.01):
        for classes, y, name in ((4, labels.long(), "weight"), (0, numbers.double(), "regression_weight")):
            (ours,) = logistic.solutions(Features(x), y, rows, [strength], classes=classes)
            torch.testing.assert_close(
                ours.weight.T.float(), tensor(arrays[f"{name}_{strength}"]), rtol=1e-3, atol=1e-3
            )
            held = ours.predict(x[n:].double())
            if classes:
                assert (held.argmax(1) == y[n:]).double().mean().item() == arrays[f"accuracy_{strength}"]
                theirs = tensor(arrays[f"bias_{strength}"])
                centred = ours.bias.float() - ours.bias.float().mean() + theirs.mean()  # its mean is arbitrary
                torch.testing.assert_close(centred, theirs, rtol=1e-3, atol=1e-3)
            else:
                assert (held - y[n:]).square().mean().item() == pytest.approx(arrays[f"mse_{strength}"], rel=1e-3)
