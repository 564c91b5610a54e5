"""What every method promises of a model that it trains."""

import copy
import io

import pytest
import torch
from methods.inputs import GAP
from methods.trained import assert_alike, assert_resumed, made, mean_loss, run
from small_model import backward, loss_of, tokens

from lowrank_sys.nn.quant_weight import is_quantized, tensors_of
from lowrank_sys.optim.preset import METHODS
from lowrank_sys.subspace.select import SELECT

EACH = pytest.mark.parametrize("name", METHODS)
SUBSPACE = pytest.mark.parametrize("name", ["muon", "asgo"])
LOW = {"rank": 8, "update_proj_gap": GAP}
WEIGHTS = pytest.mark.parametrize(
    "how", [{}, {"dtype": torch.bfloat16}, {"int8": True}, {"int8": True, "dtype": torch.bfloat16}],
    ids=["fp32", "bf16", "int8", "int8 in bf16"],
)  # fmt: skip


@WEIGHTS
@EACH
def test_it_trains_resumes_and_accounts(name, how):
    model, optimizer = made(name, **how)
    start = mean_loss(model)
    run(model, optimizer, range(GAP + 2))  # in the middle of a gap

    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    resumed, again = made(name, **how)
    run(resumed, again, range(1))
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    twin, twins = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (resumed, again), (twin, twins)):
        run(m, o, range(GAP + 2, 2 * GAP + 3))
    assert_alike(model, resumed)
    assert_alike(model, twin)

    run(model, optimizer, range(2 * GAP + 3, 20))
    assert mean_loss(model) < start - 0.05
    assert optimizer.skipped() == 0

    memory = optimizer.memory()
    assert memory["other"] == 0 and memory["gradients"] == 0
    own = sum(v.untyped_storage().nbytes() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    counters = sum(counter.nbytes for counter in optimizer.counters.values())
    weights = [t for p in model.parameters() for t in ((p, *tensors_of(p)) if is_quantized(p) else (p,))]
    assert optimizer.state_bytes() == own
    assert memory["total"] == own + counters + sum(t.untyped_storage().nbytes() for t in weights)


@pytest.mark.parametrize(
    "name", ["fira-lion", "coap", "ldadam", "scale", "sinkgd", "galore-lion", "muon", "asgo", "lisa", "owlore", "gum", "grades"]
)
def test_moments_in_8_bits_train_and_resume(name):
    how = {"bits": 8, "min_8bit_size": 0, **({"rank": 16} if name == "owlore" else {})}
    model, optimizer = made(name, **how)
    start = mean_loss(model)
    run(model, optimizer, range(GAP + 2))
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq") if key in s]
    assert torch.uint8 in {moment.dtype for moment in moments} and optimizer.memory()["other"] == 0
    assert_resumed(model, optimizer, made(name, **how), range(GAP + 2, 20), start)


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@EACH
def test_in_backward_is_the_same_to_the_bit(name, int8):
    (model, optimizer), (other, hooked) = made(name, int8=int8), made(name, int8=int8, per_layer="in_backward")
    run(model, optimizer, range(2 * GAP + 1))
    run(other, hooked, range(2 * GAP + 1))
    assert_alike(model, other)


@EACH
def test_accumulate_where_a_step_starts_from_r(name):
    model, optimizer = made(name)
    subspaces = [group["subspace"] for group in optimizer.param_groups if "subspace" in group]
    from_sketch = all(SELECT[s].sketched for s in subspaces if s in SELECT)
    if METHODS[name].rank is None or not (optimizer.pipeline.from_low_rank and from_sketch):
        with pytest.raises(ValueError, match="per_layer='accumulate'|refresh='next'"):
            made(name, per_layer="accumulate")
        return
    start = mean_loss(model)
    model, optimizer = made(name, per_layer="accumulate")
    for step in range(20):
        backward(model, step, micro=2)
        optimizer.step()
        optimizer.zero_grad()
    assert mean_loss(model) < start - 0.05


@EACH
def test_surroundings_change_no_bit(name):
    """A closure, a scheduler, autocast, another default dtype."""
    model, optimizer = made(name)
    other, same = made(name)
    for o in (optimizer, same):
        o.scheduler = torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step)
    for step in range(GAP + 2):
        backward(model, step)
        optimizer.step()
        optimizer.scheduler.step()
        optimizer.zero_grad()

        def closure(step=step):
            same.zero_grad()
            loss = loss_of(other, tokens(step))
            loss.backward()
            return loss

        closure()
        grads = [None if p.grad is None else p.grad.clone() for p in other.parameters()]
        torch.set_default_dtype(torch.bfloat16 if step % 2 else torch.float64)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                same.step(lambda: [setattr(p, "grad", g) for p, g in zip(other.parameters(), grads)])
        finally:
            torch.set_default_dtype(torch.float32)
        same.scheduler.step()
    loss = same.step(closure)
    assert loss.dim() == 0 and loss.isfinite()
    backward(model, step)
    optimizer.step()
    assert_alike(model, other)


def test_no_two_methods_are_one():
    ends = {}
    for name in METHODS:
        model, optimizer = made(name)
        run(model, optimizer, range(20))
        ends[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    for i, (name, end) in enumerate(ends.items()):
        assert [other for other in list(ends)[:i] if torch.equal(ends[other], end)] == [], name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.rank is not None])
def test_every_basis_moves(name, side):
    model, optimizer = made(name, proj_type=side)
    matrices = next(group for group in optimizer.param_groups if "rank" in group)["params"]

    keys = ("basis", "key", "indices", "columns", "left_vectors")

    def bases():
        states = [optimizer.state[p] for p in matrices if optimizer.state.get(p)]
        return [torch.cat([state[key].flatten().double() for key in keys if key in state]) for state in states]

    run(model, optimizer, range(1))
    first = bases()
    run(model, optimizer, range(1, 2 * GAP + 2))
    sides = {optimizer.state[p]["left"] for p in matrices if "left" in optimizer.state.get(p, ())}
    assert sides == {side == "left"} or name == "mofasgd" and not sides
    assert first and len(first) == len(bases())
    assert not any(torch.equal(a, b) for a, b in zip(first, bases()))


# --- Muon and ASGO, which need no subspace, in one


@pytest.mark.parametrize("how", [{}, {"dtype": torch.bfloat16}, {"int8": True}], ids=["fp32", "bf16", "int8"])
@SUBSPACE
def test_in_a_subspace_it_trains_and_resumes(name, how):
    model, optimizer = made(name, **LOW, **how)
    start = mean_loss(model)
    run(model, optimizer, range(GAP + 2))
    assert_resumed(model, optimizer, made(name, **LOW, **how), range(GAP + 2, 30), start)
    state = optimizer.state[optimizer.param_groups[1]["params"][0]]
    assert state["exp_avg"].shape == (96, 8) and state["basis"].shape == (48, 8)
    assert name == "muon" or state["gram"].shape == (8, 8)


@SUBSPACE
def test_in_a_subspace_r_accumulates(name):
    start = mean_loss(made(name)[0])
    model, optimizer = made(name, per_layer="accumulate", **LOW)
    for step in range(30):
        backward(model, step, micro=2)
        optimizer.step()
        optimizer.zero_grad()
    assert mean_loss(model) < start - 0.05
