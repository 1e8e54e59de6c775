"""What the experiments measure is what they say; their findings are in docs/, not tested."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import fp8_loss
import speculation

import fp8


@pytest.mark.parametrize("block", [fp8.TILE, fp8.BLOCK])
@pytest.mark.parametrize("shape", [(100, 200), (2, 100, 200)])
def test_contrast_has_one_scale_and_loses_small_tokens(block, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., :10, :] *= 1e-6
    q, tiles = fp8.quantize(x, block, pow2=True)
    with fp8_loss.KINDS["one scale per tensor"]:
        q_one, one = fp8.quantize(x, block, pow2=True)
        assert fp8.quantize(x[..., :0, :], block)[0].numel() == 0
    assert one.shape == tiles.shape and one.unique().numel() == 1 and one.max() == tiles.max()
    assert not fp8.dequantize(q_one, one, block)[..., :10, :].any()  # below E4M3's smallest
    assert torch.equal(fp8.quantize(x, block, pow2=True)[0].float(), q.float())  # patch undone


def test_contrast_of_gradients_changes_backward_alone():
    torch.manual_seed(0)
    layer, x, grads, ys = fp8.FP8Linear(128, 128), torch.randn(128, 128), {}, {}
    dy = torch.randn(128, 128) * torch.logspace(-6, 0, 128)[:, None]  # tokens of very unlike size
    for kind in ("tiles", "gradients in 128x128"):
        with fp8_loss.KINDS[kind]:
            leaf = x.clone().requires_grad_()
            ys[kind] = layer(leaf)
            ys[kind].backward(dy)
            grads[kind] = leaf.grad
    assert torch.equal(*ys.values())
    assert grads["tiles"][0].any() and not grads["gradients in 128x128"][0].any()


def test_interval_and_smoothing():
    assert fp8_loss.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert fp8_loss.interval([1.0]) == (1.0, None)
    assert fp8_loss.smooth([1.0, 2.0]) == [1.0, pytest.approx(1.1)]


def test_allowed_speed_up_and_repeats():
    theorem = (1 - 0.8**3) / ((1 - 0.8) * (2 * 0.1 + 1))
    assert speculation.allowed([0.8, 0.64], 0.1, 1.0) == pytest.approx(theorem)
    assert speculation.allowed([0.5], 0.25, 1.25) == pytest.approx(1.0)
    assert speculation.repeats([1, 2, 3, 1, 2, 3, 4], n=3) == pytest.approx(1 / 5)


def test_prompts_are_drawn_alike_each_time():
    first, again = (speculation.unseen_prompts(lambda s: [*s.encode()], 3, 50) for _ in range(2))
    assert first == again and len(set(map(bytes, first))) in (1, 3)  # 1: Python without its tests
