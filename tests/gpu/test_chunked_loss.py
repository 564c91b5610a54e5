"""The loss in chunks on a GPU: 16-bit operands on the tensor cores, fp32 logits and sums."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lowrank_sys.nn import chunked_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradients(dtype):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=draw).to("cuda", dtype).requires_grad_()
    weight = (torch.randn(1000, 256, generator=draw) / 16).to("cuda", dtype).requires_grad_()
    labels = torch.randint(1000, (300,), generator=draw).cuda()
    labels[::4] = -100
    loss = chunked_loss(hidden, weight, labels, tokens=128, vocabulary=384)
    want = cross_entropy(hidden.double() @ weight.double().T, labels)
    assert loss.dtype == torch.float32 and abs(loss.item() - want.item()) <= 1e-5 * want.item()
    half = torch.finfo(dtype).eps / 2
    truth = torch.autograd.grad(want, (hidden, weight))
    probabilities = (hidden.detach().double() @ weight.detach().double().T).softmax(1)
    probabilities += torch.nn.functional.one_hot(labels.clamp(min=0), 1000)  # at least |dz|
    probabilities *= (labels != -100)[:, None] / (labels != -100).sum()
    sizes = probabilities @ weight.detach().double().abs(), probabilities.T @ hidden.detach().double().abs()
    for got, true, rounded in zip(torch.autograd.grad(loss, (hidden, weight)), truth, sizes):
        assert ((got - true).abs() <= half * (true.abs() + rounded) + 1e-4 * true.abs().max()).all()
