"""Room Machine: device, number format, seeds, signals."""

import contextlib
import os
import signal

import pytest
import torch
from conftest import complaint

import standalone_transformer_lm as lm

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@contextlib.contextmanager
def handler(number, action):
    """`action` handles a signal inside the block."""
    before = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, before)


# --- device and precision -------------------------------------------------------------------------


def test_a_device_that_is_not_here_is_the_users_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(lm.UserError) as error:
            lm.pick_device(name)
        what, fix = error.value.faults[0]
        assert f"--device {name}" in what and "--device cpu" in fix
    assert lm.pick_device("auto") == lm.pick_device("cpu") == CPU


def test_cuda_takes_its_local_rank_and_the_cpu_no_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert lm.pick_device("auto") == lm.pick_device("cuda") == torch.device("cuda", 3)
    assert lm.pick_device("cpu") == CPU and lm.pick_device("cpu").index is None


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("flags : fpu avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("vendor_id : GenuineIntel flags : avx512_bf16 amx_bf16", True),
        ("vendor_id : GenuineIntel flags : avx512f avx512_bf16", False),
        ("vendor_id : AuthenticAMD flags : avx512f avx512_bf16", True),
        ("Features : fp asimd bf16 i8mm", True),
        ("flags : fpu avx2 avx512f avx512_vnni", False),
        ("flags : fpu xbf16x avx512_bf16ish", False),
        ("", False),
    ],
)
def test_bf16_cpu_reads_cpuinfo(monkeypatch, text, has):
    monkeypatch.setattr(lm.Path, "read_text", lambda self, **_: text)
    assert lm.bf16_cpu() is has
    assert lm.pick_dtype("auto", CPU) is (torch.bfloat16 if has else torch.float32)


def test_no_cpuinfo_means_no_bf16(monkeypatch):
    def missing(self, **_):
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(lm.Path, "read_text", missing)
    assert lm.bf16_cpu() is False


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((10, 0), torch.bfloat16),
    ],
)
def test_pick_dtype_by_cuda_generation(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert lm.pick_dtype("auto", GPU) is dtype


def test_pick_dtype_obeys_the_flag_and_mps_is_fp32():
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in names.items():
        assert lm.pick_dtype(name, CPU) is lm.pick_dtype(name, GPU) is dtype
    assert lm.pick_dtype("auto", torch.device("mps")) is torch.float32


def test_autocast_only_below_fp32():
    a = torch.randn(4, 4)
    with lm.Machine(CPU, torch.float32).autocast():
        assert (a @ a).dtype == torch.float32
    with lm.Machine(CPU, torch.bfloat16).autocast():
        assert (a @ a).dtype == torch.bfloat16


# --- what the device can do -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A40", 150),
        ("NVIDIA A30", 165),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_peak_flops_of_known_devices(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert lm.peak_flops(GPU) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA Z999",
        "",
        "NVIDIA GeForce GTX 1080 Ti",
        "Quadro RTX 6000",
        "NVIDIA A16",
        "NVIDIA A2",
        "NVIDIA L20",
        "NVIDIA T400 4GB",
        "NVIDIA RTX A1000",
        "NVIDIA RTX A4000",
        "NVIDIA RTX A3000 Laptop GPU",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_an_unknown_device_has_no_made_up_peak(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert lm.peak_flops(GPU) is None


def test_no_table_row_hides_another(monkeypatch):
    for name, flops in lm.PEAK_FLOPS:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None, n=name: n)
        assert lm.peak_flops(GPU) == flops, name


def test_a_cpu_has_no_peak():  # and counts no memory: see test_mfu_says_unknown_where_it_is
    assert lm.peak_flops(CPU) is None and lm.peak_flops(torch.device("mps")) is None


# --- one process ----------------------------------------------------------------------------------


def test_one_rank_needs_no_process_group():
    machine = lm.Machine(CPU, torch.float32)
    module = torch.nn.Linear(2, 2)
    assert machine.main and not lm.Machine(CPU, torch.float32, rank=1, world=2).main
    assert machine.all_reduce_sum(1.5, 2) == [1.5, 2] and machine.broadcast("x") == "x"
    assert lm.distribute(module, machine) is module
    with lm.no_sync(module, last=False):
        module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad is not None


def test_work_of_rank_0_is_done_there_alone_and_its_failure_is_raised():
    done, machine = [], lm.Machine(CPU, torch.float32)
    assert machine.on_main(lambda: done.append(1)) is None and done == [1]
    for fault in (OSError(28, "No space left"), lm.UserError("a", "b")):

        def fail(fault=fault):
            raise fault

        with pytest.raises(type(fault)) as caught:
            machine.on_main(fail)
        assert caught.value is fault


def test_a_failure_of_rank_0_is_raised_on_the_others(monkeypatch):
    monkeypatch.setattr(lm.Machine, "broadcast", lambda self, value: OSError(28, "on rank 0"))
    with pytest.raises(OSError, match="on rank 0"):
        lm.Machine(CPU, torch.float32, rank=1, world=2).on_main(pytest.fail)


def test_seed_step_differs_by_seed_step_and_rank_and_repeats():
    def numbers(*key):
        lm.seed_step(*key)
        return tuple(torch.rand(3).tolist())

    keys = [(s, k, r) for s in (0, 1, 12) for k in (0, 1, 2, 11, 12) for r in (0, 1, 2, 112)]
    assert len({numbers(*key) for key in keys}) == len(keys)
    assert numbers(1, 2, 3) == numbers(1, 2, 3)


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_remembered_and_handlers_come_back(name):
    number, heard = getattr(signal, name), []
    with handler(number, lambda *_: heard.append(number)):
        mine = signal.getsignal(number)
        with lm.Signals() as signals:
            assert signals.received == 0 and signal.getsignal(number) != mine
            os.kill(os.getpid(), number)
            assert signals.received == number and not heard
            os.kill(os.getpid(), number)
            assert not heard, "schedulers send a signal twice"
            signals.at -= 2
            os.kill(os.getpid(), number)
            assert heard == [number] * (name == "SIGINT"), "impatience is a second Ctrl-C"
        assert signal.getsignal(number) is mine


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with pytest.raises(ZeroDivisionError), lm.Signals():
        raise ZeroDivisionError
    assert before == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]


def test_flash_kernels_are_put_in_place_where_there_are_some(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.nn.attention, "activate_flash_attention_impl", asked.append, raising=False
    )
    lm.open_machine(lm.DeviceSettings(device="cpu", threads=1))
    assert asked == []
    lm.open_machine(lm.DeviceSettings(device="cpu", threads=1, flash="FA3"))
    assert asked == ["FA3"]


def test_flash_kernels_whose_package_is_not_there_are_one_sentence(run, data_dir):
    """It is torch's own refusal, or that it is too old to offer any."""
    complaint(
        run(["train", "--data_dir", data_dir, "--flash", "FA3", "--device", "cpu"]),
        "--flash FA3",
        "install",
    )
