"""Everything a run changes as it goes, built from the settings, saved and restored as one."""

from typing import Any

import torch
from torch import Tensor, nn

from simclr_ddp import cli, distributed
from simclr_ddp.config import Pretrain
from simclr_ddp.data import Dataset
from simclr_ddp.model import Encoder, SimCLR, initialize, projection_head
from simclr_ddp.optim import global_norm, make_optimizer
from simclr_ddp.probe import Probe
from simclr_ddp.runtime import Runtime


class State:
    """Model, optimizers and loss scale. No generator state: randomness is a function of seed, epoch and sample."""

    def __init__(
        self, settings: Pretrain, runtime: Runtime, dataset: Dataset, saved: dict[str, Any] | None = None
    ) -> None:
        """`saved` is the checkpoint to go on from; model.init counts only without one."""
        torch.manual_seed(settings.seed)  # initial weights, drawn on the CPU: equal on all ranks and devices
        wanted = settings.model
        encoder = Encoder(wanted.arch, wanted.width, wanted.stem, wanted.checkpoint_stages)
        init = "random" if saved else settings.model.init
        self.loaded = initialize(encoder, init, settings.model.arch, settings.model.width)
        head = settings.head
        projection = projection_head(head.kind, encoder.width_out, head.layers, head.hidden, head.out)
        classes = dataset.class_count if settings.probe.enabled else 0
        self.model = SimCLR(encoder, projection, classes).to(runtime.device, runtime.dtype)
        self.model.to(memory_format=encoder.memory_format)
        fraction = settings.probe.validation_fraction
        self.probe = Probe(dataset, fraction, settings.seed, runtime.device) if classes else None

        trained = nn.ModuleList([self.model.encoder, self.model.projection_head])
        optim = settings.optim
        self.optimizer = make_optimizer(
            trained, optim.name, optim.weight_decay, optim.momentum, optim.trust_coefficient
        )
        self.optimizers = [self.optimizer]
        if self.model.probe is not None:
            rate = settings.probe.learning_rate
            self.optimizers.append(torch.optim.AdamW(self.model.probe.parameters(), rate, weight_decay=0, fused=True))
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        if settings.probe.enabled and not classes:
            cli.say("online probe: off, the training images have no classes")
        self._failed = torch.zeros((), dtype=torch.bool, device=runtime.device)
        if saved:
            self.restore(saved)

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradient_norm(self) -> Tensor:
        """That of the loss itself, whatever it is scaled by."""
        norm = global_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm / self.scaler.scale(torch.ones_like(norm)) if self.scaler.is_enabled() else norm

    def step(self, skip: Tensor) -> None:
        """One update of all optimizers; a no-op on the device once `skip` (0-dim bool) has been true.

        The state then stays that before the failed step until the host, one step late, has seen it. With fp16 the loss
        scaler decides instead: it skips overflown gradients and lowers the scale.
        """
        self._failed |= skip
        failed = self._failed.float()
        for optimizer in self.optimizers:
            if not self.scaler.is_enabled():
                optimizer.found_inf, optimizer.grad_scale = failed, None  # type: ignore[attr-defined]
            self.scaler.step(optimizer)
        self.scaler.update()

    def check_ranks(self, step: int) -> None:
        """End all ranks if parameters or running statistics, which each computes by itself, are not alike."""
        names = distributed.differing(self.model.state_dict())
        if names:
            distributed.fail_together(
                f"after step {step} the ranks hold different values of {names[0]}, one of {len(names)} such tensors: "
                "memory, a GPU or the network is faulty; the same command goes on from the last checkpoint, on other "
                "hardware if it happens again"
            )

    def saved_bytes(self) -> int:
        """At least as many as a checkpoint will have, once the optimizers hold their averages (AdamW two)."""
        return 3 * sum(t.nbytes for t in self.model.state_dict().values()) + 1_000_000

    def to_save(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """All ranks end if the checkpoint is of another model."""
        try:
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                wanted = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                optimizer.load_state_dict(state)
                for group, numbers in zip(optimizer.param_groups, wanted, strict=True):
                    group |= numbers  # the settings', which resume.force may have changed
        except (RuntimeError, KeyError, ValueError) as error:
            distributed.fail_together(
                f"the checkpoint is of another model ({' '.join(str(error).split())[:200]}): run_dir=... starts "
                "another run"
            )
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
