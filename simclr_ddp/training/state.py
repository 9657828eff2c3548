"""Everything that training changes: built from the settings, and saved and restored together."""

from typing import Any

import torch
from torch import Tensor, nn

from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.models.backbones import make_encoder
from simclr_ddp.models.simclr import SimCLR, projection_head
from simclr_ddp.models.weights import initialize
from simclr_ddp.system import console
from simclr_ddp.system.errors import one_line
from simclr_ddp.training.optim import global_norm, make_optimizer
from simclr_ddp.training.probe import Probe


class TrainingState:
    """Model, optimizers and loss scale of a training run.

    There is no generator state, because all randomness is a function of seed, epoch and sample.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], runtime: Runtime) -> None:
        self.model, self.optimizers = model, optimizers
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.failed = torch.zeros((), dtype=torch.bool, device=runtime.device)

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradient_norm(self) -> Tensor:
        """Return the gradient norm of the loss, without its fp16 scale."""
        norm = global_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm / self.scaler.scale(torch.ones_like(norm)) if self.scaler.is_enabled() else norm

    def step(self, skip: Tensor) -> None:
        """Update with all optimizers; a no-op on the device once `skip` (0-dim bool) has been true.

        The state from before the failed step then stays until the host, one step later, reads the failure. With fp16
        the loss scaler decides instead: it skips overflown gradients and lowers the scale, and later steps count again.
        """
        if self.scaler.is_enabled():
            self.failed.copy_(skip)
        else:
            self.failed |= skip
        failed = self.failed.float()
        for optimizer in self.optimizers:
            if not self.scaler.is_enabled():
                optimizer.found_inf, optimizer.grad_scale = failed, None  # type: ignore[attr-defined]
            self.scaler.step(optimizer)
        self.scaler.update()

    def check_ranks(self, step: int) -> None:
        """End all ranks if parameters or running statistics, which each rank computes by itself, are not equal."""
        names = collectives.differing(self.model.state_dict())
        if names:
            collectives.fail_together(
                f"after step {step} the ranks hold different values of {names[0]}, one of {len(names)} such tensors: "
                "memory, a GPU or the network is faulty; the same command resumes from the last checkpoint; use other "
                "hardware if it happens again"
            )

    def saved_bytes(self) -> int:
        """Return an upper bound of a checkpoint's bytes, with all averages of the optimizers (AdamW has two)."""
        return 3 * sum(t.nbytes for t in self.model.state_dict().values()) + 1_000_000

    def to_save(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Load a checkpoint; all ranks end if it is of another model."""
        try:
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                optimizer.load_state_dict(state)
                for group, values in zip(optimizer.param_groups, groups, strict=True):
                    group |= values  # from the settings, which resume.force may have changed
        except (RuntimeError, KeyError, ValueError) as error:
            collectives.fail_together(
                f"the checkpoint is of another model ({one_line(error, 200)}): run_dir=... starts another run"
            )
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])


class State(TrainingState):
    """The state of pretraining: encoder, projection head and probe."""

    model: SimCLR

    def __init__(
        self, settings: Pretrain, runtime: Runtime, dataset: Dataset, saved: dict[str, Any] | None = None
    ) -> None:
        """`saved` is the checkpoint to resume from; model.init is used only without one."""
        torch.manual_seed(settings.seed)  # initial weights, drawn on the CPU: equal on all ranks and devices
        m = settings.model
        size = settings.data.size
        encoder = make_encoder(m.arch, m.width, m.stem, size, checkpoint_stages=m.checkpoint_stages)
        init = "random" if saved else m.init
        self.loaded = initialize(encoder, init, m.arch, m.width, size)
        head = settings.head
        projection = projection_head(head.kind, encoder.width_out, head.layers, head.hidden, head.out)
        classes = dataset.class_count if settings.probe.enabled else 0
        model = SimCLR(encoder, projection, classes).to(runtime.device, runtime.dtype)
        model.to(memory_format=encoder.memory_format)
        fraction = settings.probe.validation_fraction
        self.probe = Probe(dataset, fraction, settings.seed, runtime.device) if classes else None

        trained = nn.ModuleList([model.encoder, model.projection_head])
        optim = settings.optim
        self.optimizer = make_optimizer(
            trained, optim.name, optim.weight_decay, optim.momentum, optim.trust_coefficient, optim.unadapted_rate
        )
        optimizers = [self.optimizer]
        if model.probe is not None:
            rate = settings.probe.learning_rate
            optimizers.append(torch.optim.AdamW(model.probe.parameters(), rate, weight_decay=0, fused=True))
        super().__init__(model, optimizers, runtime)
        if settings.probe.enabled and not classes:
            console.say("online probe: off, the training images have no classes")
        if saved:
            self.restore(saved)
