"""torch.compile over a whole optimizer step: no graph break, no recompilation as step and rate change."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lowrank_sys import _ops
from lowrank_sys.optim import GaLoreAdamW, param_groups


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.LayerNorm(32))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_twenty_steps_with_changing_rate(backend):
    compiled, eager = build(), build()
    optimizers = [GaLoreAdamW(param_groups(m, rank=8, update_proj_gap=7), lr=torch.tensor(1e-2)) for m in (compiled, eager)]
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    step = torch.compile(optimizers[0].step, fullgraph=True, backend=counter)
    for i in range(20):
        for p, q in zip(compiled.parameters(), eager.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-2 / (i + 1))
        step()
        optimizers[1].step()
    assert counter.frame_count <= 2
    for p, q in zip(compiled.parameters(), eager.parameters()):
        assert torch.equal(p, q)


def test_the_plain_op_with_tensors():
    """The tensor overload in a custom loop: one graph for all steps."""
    hyper = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.25, "left": True}

    def run(param, grad, basis, m, v, step, lr):
        torch.ops.lowrank.galore_step(param, grad, basis, m, v, step=step, lr=lr, **hyper)

    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    states = []
    for function in (compiled, run):
        torch.manual_seed(0)
        param, basis = torch.randn(16, 24), torch.linalg.qr(torch.randn(16, 4))[0].contiguous()
        m, v = torch.zeros(4, 24), torch.zeros(4, 24)
        for i in range(20):
            function(param, torch.randn(16, 24), basis, m, v, torch.tensor(i + 1.0), torch.tensor(1e-2 / (i + 1)))
        states.append(param)
    assert counter.frame_count == 1
    assert torch.equal(*states)


HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
LOW_RANK = {**HYPER, "scale": 0.25, "left": True}
# List ops, with the shapes of their lists of tensors (or a tensor) and their other arguments. The optimizers call no other form.
LISTS = {
    "galore_step.list": ([(16, 24), (16, 24), (16, 4), (4, 24), (4, 24)], LOW_RANK),
    "subspace_step.list": ([(16, 24), (4, 24), (16, 4), (4, 24), (4, 24)], LOW_RANK),
    "adamw_step": ([(16, 24)] * 4, HYPER),
    "grass_step.list": ([(16, 24), (16, 24), torch.tensor([1, 5, 8, 9], dtype=torch.int32), (4,), (4, 24), (4, 24)], LOW_RANK),
}


def test_every_list_op_is_here():
    listed = {name for name, schema in _ops.SCHEMAS.items() if "[] steps" in schema and "Tensor lr, *" not in schema}
    assert listed == LISTS.keys()


@pytest.mark.parametrize("op", LISTS)
def test_a_list_op_is_compiled_once(op):
    """Steps, rate, grad_scale and found_inf change, the graph does not."""
    shapes, hyper = LISTS[op]
    name, _, form = op.partition(".")
    function = getattr(getattr(torch.ops.lowrank, name), form or "default")

    def run(lists, steps, lr, grad_scale, found_inf, skipped):
        function(*lists, steps, lr=lr, grad_scale=grad_scale, found_inf=found_inf, skipped=skipped, **hyper)

    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    states = []
    for call in (torch.compile(run, fullgraph=True, backend=counter), run):
        draw = torch.Generator().manual_seed(0)
        lists = [[shape.clone() if isinstance(shape, torch.Tensor) else torch.randn(shape, generator=draw).abs()
                  for _ in range(2)] for shape in shapes]
        steps, skipped = [torch.tensor(0.0), torch.tensor(5.0)], torch.tensor(0)
        for i in range(12):
            call(lists, steps, torch.tensor(1e-2 / (i + 1)), torch.tensor(1.0 + i), torch.tensor(float(i == 7)), skipped)
        assert [step.item() for step in steps] == [11, 16]
        states.append([tensor for column in lists for tensor in column])
    assert counter.frame_count == 1
    assert all(map(torch.equal, *states))
