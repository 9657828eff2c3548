"""Options without effect: they are named, and make no other run."""

import pytest

from simclr_ddp.config import options
from simclr_ddp.config.identity import changed_keys, idle_options, without_effect
from simclr_ddp.config.schema import Pretrain


def build(*arguments: str) -> Pretrain:
    images = ("data.train", "photos.beton")
    return options.build(Pretrain, [("here", dict([images, *map(options.parse_override, arguments)]))])


IDLE = {
    "loss.kernel=cosine": "loss.gamma=2 loss.mix_weight=0.3 loss.mix_level=loss loss.second_temperature=1 loss.order=2",
    "loss.kernel=exponential": "loss.mix_weight=0.3 loss.order=2",
    "loss.kernel=arccos": "loss.gamma=2",
    "loss.kernel=simple_sum": "loss.order=3",
    "loss.kernel=spectral": "loss.temperature=0.7 loss.gamma=0.5",
    "head.kind=linear": "head.layers=3 head.hidden=64",
    "head.kind=none": "head.layers=3 head.hidden=64 head.out=64",
    "optim.name=sgd": "optim.trust_coefficient=0.1 optim.unadapted_rate=2",
    "optim.name=adamw": "optim.trust_coefficient=0.1",
    "probe.enabled=false": "probe.learning_rate=1 probe.validation_fraction=0.5",
    "monitor.every_epochs=0": "monitor.images=9 monitor.views=2 monitor.k=3",
    "data.augmentation.jitter=0.0": "data.augmentation.strength=1 data.augmentation.order=fixed",
    "data.train=spirograph": "data.augmentation.flip=0 data.augmentation.blur=[0.5,0.5]",
}


@pytest.mark.parametrize("because", IDLE)
def test_options_without_effect_are_named_and_make_no_other_run(because: str) -> None:
    idle = IDLE[because].split()
    plain, changed = build(because), build(because, *idle)
    assert changed_keys(changed) == changed_keys(plain) and idle_options(plain) == []
    (warning,) = idle_options(changed)
    assert warning.endswith(f": no effect with {because}; leave it at its default")
    assert all(f"{text.partition('=')[0]}=" in warning for text in idle)
    assert without_effect(options.dotted(changed)) == without_effect(options.dotted(plain))


USED = {
    "loss.kernel=exponential": "loss.gamma=2 loss.temperature=0.7",
    "loss.kernel=concat_sum": "loss.gamma=2 loss.mix_weight=0.3 loss.mix_level=loss loss.second_temperature=1",
    "loss.kernel=arccos": "loss.order=2 loss.temperature=0.7",
    "head.kind=nonlinear": "head.layers=3 head.hidden=64 head.out=64",
    "head.kind=linear": "head.out=64",
    "optim.name=lars": "optim.trust_coefficient=0.1 optim.unadapted_rate=2 optim.epochs=3",
    "optim.name=adamw": "optim.momentum=0.5",
    "probe.enabled=true": "probe.learning_rate=1 probe.validation_fraction=0.5",
    "data.augmentation.jitter=0.1": "data.augmentation.strength=1 data.augmentation.order=fixed",
}


@pytest.mark.parametrize("because", USED)
def test_options_with_effect_make_another_run(because: str) -> None:
    for text in USED[because].split():
        assert changed_keys(build(because, text)) != changed_keys(build(because)), text
        assert idle_options(build(because, text)) == []


def test_a_new_option_at_its_default_renames_no_run() -> None:
    assert changed_keys(Pretrain()) == {}
    assert changed_keys(build("seed=1", "optim.steps=9", "loss.gamma=2")) == {"seed": 1, "optim.steps": 9}
    assert changed_keys(build("model.init=./a//b.pt")) == changed_keys(build("model.init=a/b.pt"))
