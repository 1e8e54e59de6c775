"""What only a GPU can show: python -m pytest tests/test_gpu.py. Everything else is tested on a CPU.

GPU_TESTS_ON=cpu lets the bodies run where there is no GPU, to see that they still do.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
from test_fp8 import check_experts, check_products, error, losses_and_gradients, tiny, together
from training import assert_same_run, finish, log_of, run

import fp8
import sample
from model import Combine, Dispatch, grouped_linear
from support import processes
from train import TrainConfig

DEVICE = torch.device(os.environ.get("GPU_TESTS_ON", "cuda"))
ON_GPU, BF16 = DEVICE.type == "cuda", torch.bfloat16
ready = DEVICE.type == "cpu" or torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not ready, reason="needs a GPU")
hopper = pytest.mark.skipif(
    ON_GPU and ready and torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU (SM90): blockwise FP8 products exist there only",
)
HOPPER_SUMS = 1e-3  # it adds 128 products in 14 bits or so before it promotes: 2^-13 at worst


def compiled(network, how, **settings):
    """The network as train.py would run it."""
    if how == "compiled":
        machine = processes.Machine(DEVICE, torch.float32, compiled=True)
        processes.wrap(network, TrainConfig(**settings), machine)
    return network


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("dtype, loss, gradient", [(torch.float32, 1e-5, 1e-4), (BF16, 0.01, 0.05)])
def test_a_step_is_that_of_float64(dtype, loss, gradient, how):
    """Losses and all gradients, under autocast in bfloat16. Every token goes to every expert, so
    that no rounding changes a choice."""
    network = tiny()
    exact, exact_gradients = losses_and_gradients(copy.deepcopy(network).double())
    network = compiled(network.to(DEVICE), how)
    with torch.autocast(DEVICE.type, BF16, enabled=dtype == BF16):
        losses, gradients = losses_and_gradients(network, DEVICE)
    assert error(losses.cpu(), exact) < loss
    for name, x in gradients.items():
        assert x.isfinite().all() and x.norm() > 0, name
    assert error(together(gradients), together(exact_gradients)) < gradient


@pytest.mark.parametrize("counts", [[0, 5, 130, 0, 1, 0], [300, 0, 0]])
def test_experts_without_tokens_get_a_gradient_of_zero(counts):
    """Also in memory that held NaN: a grouped product has left it as it was (pytorch #172439). The
    other experts are linear layers."""
    x = torch.randn(sum(counts), 64, device=DEVICE).to(BF16).requires_grad_()
    w = torch.randn(len(counts), 96, 64, device=DEVICE).to(BF16).requires_grad_()
    dy = torch.randn(sum(counts), 96, device=DEVICE).to(BF16)
    dirt = [torch.full_like(w, torch.nan) for _ in range(8)]
    del dirt
    y = grouped_linear(x, w, torch.tensor(counts, device=DEVICE))
    found = y, *torch.autograd.grad(y, (x, w), dy)
    parts = [z.detach().double().split(counts) for z in (x, dy)]
    wide = w.detach().double()
    want = torch.cat([a @ b.T for a, b in zip(parts[0], wide, strict=True)])
    dx = torch.cat([a @ b for a, b in zip(parts[1], wide, strict=True)])
    dw = torch.stack([b.T @ a for a, b in zip(*parts, strict=True)])
    for one, other in zip(found, (want, dx, dw), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2.0**-7, atol=0.1)
    assert not found[2][[n == 0 for n in counts]].any()


def test_sums_over_experts_round_once_and_always_alike():
    tokens, K, D = 1000, 6, 96
    order = torch.randperm(tokens * K, device=DEVICE)
    place = order.argsort().view(tokens, K)
    y = torch.randn(tokens * K, D, device=DEVICE).to(BF16)
    got = Combine.apply(y, order // K, place)
    exact = y[place].double().sum(1)
    assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
    assert all(torch.equal(Combine.apply(y, order // K, place), got) for _ in range(5))
    x = got.clone().requires_grad_()
    (dx,) = torch.autograd.grad(Dispatch.apply(x, order // K, place), x, y)
    assert torch.equal(dx, got)


# ---- FP8 ----------------------------------------------------------------------------------------


@hopper
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("T,K,N", [(130, 7200, 140), (1, 4608, 128), (1193, 640, 576)])
def test_fp8_products(T, K, N, dtype, autocast):
    """Also of 1,193 tokens, V3's 576 latents, and 5 scales a row, which is no multiple of 4."""
    if ON_GPU:
        assert fp8.has_blockwise_fp8(torch.device("cuda", 0)), "CUDA too old for Hopper"
    check_products(T, K, N, dtype, autocast, DEVICE, HOPPER_SUMS)


@hopper
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("counts", [[0, 5, 130, 1], [0, 0]])
def test_fp8_experts(counts, dtype):
    check_experts(counts, dtype, DEVICE, HOPPER_SUMS)


@hopper
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_fp8_is_what_a_cpu_emulates(how):
    network = tiny()
    fp8.use_fp8(network)
    emulated, emulated_gradients = losses_and_gradients(copy.deepcopy(network))
    network = compiled(network.to(DEVICE), how, fp8=True)
    with fp8.quantized_once(network, how == "compiled" and ON_GPU):
        losses, gradients = losses_and_gradients(network, DEVICE)
    # A number on the border of two codes may take the other one.
    assert error(losses.cpu(), emulated) < 1e-3
    for name, x in gradients.items():
        assert error(x.cpu(), emulated_gradients[name]) < 0.1, name


# ---- Runs and texts -----------------------------------------------------------------------------

ON_DEVICE = (f"--device={DEVICE.type}", "--dtype=auto")
ON_DEVICE += ("--warmup=0", "--decay_start=1", "--decay_end=1")


@pytest.mark.parametrize("compile", [False, True])
def test_a_resumed_run_is_the_same_bit_for_bit(compile, workplace):
    options = (*ON_DEVICE, "--deterministic", f"--compile={compile}", "--mtp_switch=1")
    options += ("--gamma_stop=1",)
    whole = run(*options, out="whole")
    run(*options, "--steps=4", out="parts")
    assert_same_run(whole, run("--resume", *options, "--steps=8", out="parts"), 0.0)


def test_evaluations_are_compiled_on_a_gpu(workplace):
    torch._dynamo.utils.counters.clear()
    run(*ON_DEVICE, "--compile=True", "--steps=2")
    # Training has a graph of a dense block, of experts, an MTP module, the last norm and the loss.
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 5) == ON_GPU


def test_a_compiled_text_is_the_eager_one():
    """Greedily and with drafts, whatever CUDA graphs were recorded before."""
    network = tiny().to(DEVICE).eval().requires_grad_(False)
    prompt = torch.arange(8, device=DEVICE)[None]
    for new in (20, 12):
        options = dict(temperature=0, speculative=1)
        eager = sample.generate(network, prompt, new, **options)
        assert torch.equal(sample.generate(network, prompt, new, compile=True, **options), eager)


def test_compiled_texts_are_the_eager_ones_several_and_sampled():
    network = tiny(max_position_embeddings=256).to(DEVICE).eval().requires_grad_(False)
    prompt = torch.arange(24, device=DEVICE).view(3, 8)
    for _ in range(2):  # the second finds its graphs, with other addresses
        runs = []
        for compiled in (False, True):
            generator = torch.Generator(DEVICE).manual_seed(3)
            options = dict(temperature=0.8, speculative=2, compile=compiled, generator=generator)
            runs.append(sample.generate(network, prompt, 60, **options))
        assert torch.equal(*runs)


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_compiled_are_close_to_one_eager(parallel, workplace, start):
    options = (f"--device={DEVICE.type}", "--dtype=bfloat16", "--steps=2", "--grad_accum=2")
    one = run(*options, "--compile=False", out="one")
    two = start(*options, "--compile=True", f"--parallel={parallel}", world=2, out="two",
                setup=own_gpu)  # fmt: skip
    finish(two, seconds=600)
    for a, b in zip(log_of(one), log_of(Path("two")), strict=True):
        assert abs(a.get("loss", 0) - b.get("loss", 0)) < 0.01


def own_gpu():
    os.environ["LOCAL_RANK"] = os.environ["RANK"]


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(parallel, workplace, start):
    options = (f"--device={DEVICE.type}", "--compile=False", "--steps=2")
    one = run(*options, out="one")
    finish(start(*options, f"--parallel={parallel}", world=2, out="two", setup=own_gpu))
    assert_same_run(one, Path("two"), 1e-9)  # in float64
