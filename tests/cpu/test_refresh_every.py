"""`refresh_every`: refreshes in one of so many steps, so that all others are alike, and compiled once."""

import pytest
import torch
from small_model import CLOSE, assert_same, backward, build, galore, groups, loss_of, tokens, train
from torch import nn

from lowrank_sys.nn import project_model
from lowrank_sys.optim import GrassAdamW, QGaLoreAdamW8bit

EVERY, GAP = 4, 6  # a gap that is none of its multiples: 8


def deep():
    torch.manual_seed(0)
    model = nn.Sequential(build()[:4], *(nn.Linear(48, 48) for _ in range(5)))
    model.add_module("head", nn.Linear(48, 50))
    return project_model(model, 16, "right")


def due_by_step(model, optimizer, steps=30):
    found = []
    for step in range(steps):
        found.append(set(optimizer.gradients.announced()))
        train(model, optimizer, [step])
    return found


@pytest.mark.parametrize("cls", [None, GrassAdamW], ids=["galore", "grass"])
def test_one_step_of_so_many_refreshes(cls):
    model = deep()
    keys = {"update_proj_gap": GAP, "refresh_every": EVERY}
    optimizer = galore(model, None, **keys) if cls is None else cls(groups(model, **keys), lr=1e-2)
    due = due_by_step(model, optimizer)
    assert [step for step, names in enumerate(due) if names] == list(range(0, 30, EVERY))
    for name in due[0]:
        at = [step for step, names in enumerate(due) if name in names]
        assert len(due[0]) == 7 and at[1] in (4, 8) and all(b - a == 8 for a, b in zip(at[1:], at[2:]))
    model = deep()
    assert len(due_by_step(model, galore(model, None, update_proj_gap=GAP), 1)[0]) < 7  # as they are spread without it


def test_a_gap_of_its_own_ends_there_too():
    """It grows by 1.5, to 6 and 9 and 14: rounded up to 8, 12 and 16."""
    model = build()
    keys = {"update_proj_gap": EVERY, "gamma_proj": 1.5, "cos_threshold": 0.0, "queue_size": 1, "quant_group_size": 32}
    optimizer = QGaLoreAdamW8bit(groups(model, refresh_every=EVERY, **keys), lr=1e-3)
    waits = []
    for step in range(40):
        train(model, optimizer, [step])
        waits.append([entry["countdown"] for entry in optimizer.refreshes().values()])
    at = [step for step in range(1, 40) if any(now > before for now, before in zip(waits[step], waits[step - 1]))]
    assert len(at) >= 3 and all(step % EVERY == 0 for step in at)


def test_whole_gradients_and_accumulated_ones_agree():
    (model, first), (other, second) = ((m, galore(m, mode, refresh="next", refresh_every=EVERY)) for m, mode in
                                       ((build(), None), (build(), "accumulate")))  # fmt: skip
    train(model, first, range(14))
    train(other, second, range(14), micro=2)
    assert_same(model, other, **CLOSE)


def test_compiled_steps():
    """One graph, for all steps but one in EVERY."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (model, first), (other, second) = ((m, galore(m, None, update_proj_gap=8, refresh_every=EVERY)) for m in (deep(), deep()))
    compiled, eager = torch.compile(other, fullgraph=True, backend="aot_eager"), 0
    for step in range(12):
        backward(model, step)
        first.step()
        first.zero_grad()
        due = bool(second.gradients.announced())
        eager += due
        with torch.compiler.set_stance("force_eager" if due else "default"):
            loss_of(compiled, tokens(step)).backward()
        second.step()
        second.zero_grad()
    assert eager == 12 // EVERY and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_same(model, other, **CLOSE)
