"""What a command chooses to run in."""

import pytest
import torch

from simclr_ddp.distributed.runtime import setup


@pytest.mark.parametrize(("native", "wanted"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_no_precision_that_the_gpu_emulates(
    native: bool, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch emulates bf16 on GPUs without it, and says unasked that it is supported."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr("simclr_ddp.distributed.runtime._device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    try:
        assert setup("auto", "auto", 1).precision == wanted
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.set_num_threads(before[2])
    assert f"1 x cuda in {wanted}" in capsys.readouterr().out
