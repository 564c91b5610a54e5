"""torch.compile over a whole optimizer step: no graph break, no recompilation as step and rate change."""

import pytest
import torch
from cases import CASES
from cases.case import overload, replace, same_bits, tensors_of
from cases.draw import Simplest
from lanes import usual
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lowrank_sys import _ops
from lowrank_sys.optim import GaLoreAdamW, param_groups


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.LayerNorm(32))


@pytest.mark.parametrize("backend", usual(["eager"], "inductor"))
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


# Every list op: the optimizers call no other form.
LISTS = [name for name, schema in _ops.SCHEMAS.items() if "[] steps" in schema and "grad_scale" in schema]


@pytest.mark.parametrize("op", LISTS)
def test_a_list_op_is_compiled_once(op):
    """Steps, rate, grad_scale and found_inf change, the graph does not."""
    function = overload(op)
    arguments = CASES[op].arguments(Simplest())
    known = {argument.name for argument in function._schema.arguments}

    def run(values, guards):
        function(**{**values, **guards})

    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    states = []
    for call in (torch.compile(run, fullgraph=True, backend=counter), run):
        values, skipped = {name: replace(value, torch.clone) for name, value in arguments.items()}, torch.tensor(0)
        for i in range(12):
            guards = {
                "lr": torch.tensor(1e-2 / (i + 1)),
                "grad_scale": torch.tensor(1.0 + i),
                "found_inf": torch.tensor(float(i == 7)),
                "skipped": skipped,
            }
            call(values, {name: guards[name] for name in guards.keys() & known})
        states.append(tensors_of(list(values.values())))
    assert counter.frame_count == 1
    assert all(map(same_bits, *states))
    assert not all(map(same_bits, states[0], tensors_of(list(arguments.values()))))
