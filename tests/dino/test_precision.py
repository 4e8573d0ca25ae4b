"""Precision follows what the device has; on a CPU `auto` is the same everywhere."""

import pytest
import torch

from dino.precision import NAMES, resolve_precision

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture(params=["none", "amx", "avx512"])
def cpu_flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hardware's answers; no test machine has all three."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param == "amx")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param == "avx512")
    return request.param


def test_auto_is_fp32_on_every_cpu(cpu_flags: str) -> None:
    assert resolve_precision("auto", CPU) == "fp32"


def test_bf16_on_a_cpu_needs_hardware(cpu_flags: str) -> None:
    if cpu_flags == "none":
        with pytest.raises(ValueError, match=r"pretrain\.precision is bf16.* cpu would emulate.*choose auto or fp32"):
            resolve_precision("bf16", CPU)
    else:
        assert resolve_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize("supported", [True, False])
def test_auto_on_cuda_is_bf16_where_it_is_no_emulation(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(including_emulation: bool = True) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    assert resolve_precision("auto", CUDA) == ("bf16" if supported else "fp32")
    if not supported:
        with pytest.raises(ValueError, match="this cuda would emulate"):
            resolve_precision("bf16", CUDA)


def test_other_devices_compute_in_fp32() -> None:
    assert resolve_precision("auto", MPS) == "fp32"
    with pytest.raises(ValueError, match="mps"):
        resolve_precision("bf16", MPS)


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_fp32_is_what_it_says(device: torch.device) -> None:
    assert resolve_precision("fp32", device) == "fp32"
    assert set(NAMES) == {"fp32", "bf16"}


def test_this_machines_flags_can_be_read() -> None:
    assert resolve_precision("auto", CPU) == "fp32"
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
