"""MFU is wrong by as much as the numbers it is made of."""
from types import SimpleNamespace

import pytest
import torch

from train_gpt2 import GPT, GPTConfig, flops_per_token, peak_flops, speed_report


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H200", 989.5), ("NVIDIA B200", 2250),
    ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125),
    ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4080", 97.5), ("NVIDIA GeForce RTX 3090", 71)])
def test_a_known_gpu_has_its_data_sheets_peak(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops(torch.device("cuda")) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3080 Ti", "NVIDIA L40",
                                  "NVIDIA GeForce GTX 1080", "NVIDIA GH200 480GB", "Radeon RX 7900", ""])
def test_a_gpu_that_only_resembles_a_known_one_has_no_peak(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops(torch.device("cuda")) is None


@pytest.mark.parametrize("name, tflops", [("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5),
                                          ("NVIDIA H200 NVL", 835.5), ("NVIDIA A10G", 70),
                                          ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 312 / 7),
                                          ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 989.5 / 7),
                                          ("Tesla V100-PCIE-16GB", 112)])
def test_a_slower_sibling_is_not_measured_by_the_faster_ones_peak(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops(torch.device("cuda")) in (None, tflops * 1e12)


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


def test_a_token_costs_gpt2_860_megaflop():
    with torch.device("meta"):  # shapes only
        model = GPT(GPTConfig())
    attention = 12 * 12 * 768 * 1024  # layers, width, T
    assert flops_per_token(model, 1024) == 6 * 124_439_808 + attention == pytest.approx(860e6, rel=1e-3)
    assert flops_per_token(model, 512) == 6 * 124_439_808 + attention / 2


@pytest.mark.parametrize("name, mfu", [("NVIDIA H200", " | MFU 22.8%"), ("a GPU of 2040", "")])
def test_mfu_is_what_each_process_does_of_what_its_gpu_could(monkeypatch, name, mfu):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    with torch.device("meta"):
        model = GPT(GPTConfig())
    machine = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    cfg = SimpleNamespace(total_batch_size=2**20, seq_len=1024)
    # 2**20 tokens in 2 seconds, 860 MFLOP each, by two GPUs: 225 TFLOP/s each, of 989.5.
    assert speed_report(model, cfg, 2.0, machine) == f"2000.0 ms | 524,288 tokens/s{mfu}"
