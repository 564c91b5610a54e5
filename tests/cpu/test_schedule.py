"""Schedules: which layers train now, what is freed with them, draws, resume, and what is refused."""

import copy
import io

import pytest
import torch
from torch import nn

from lowrank_sys.optim import GUM, LISA, CapturedStep, GradES, LowRankOptimizer, OwLore, param_groups
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.rules import Adam
from lowrank_sys.schedule.outliers import outlier_scores
from lowrank_sys.schedule.roles import WHOLE, layer_of
from lowrank_sys.schedule.schedule import Sampled, draw
from lowrank_sys.schedule.settling import Settling

LAYERS, WIDTH, PERIOD = 5, 16, 3
NAMES = [f"layers.{i}" for i in range(LAYERS)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Embedding(20, WIDTH)  # not a linear layer

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x @ self.head.weight.T


# name -> (class, group keys, arguments)
SAMPLED = {
    "lisa": (LISA, {"rank": None}, {"active_layers": 2, "period": PERIOD}),
    "owlore": (OwLore, {"rank": 4}, {"active_layers": 2, "period": PERIOD, "scores": dict(zip(NAMES, (1.0, 2.0, 3.0, 4.0, 0.0)))}),
    "gum": (GUM, {"rank": 4, "update_proj_gap": PERIOD}, {"active_layers": 2}),
}
EACH = pytest.mark.parametrize("name", SAMPLED)


def made(name, seed=0, **more):
    cls, keys, arguments = SAMPLED[name]
    torch.manual_seed(0)
    model = Model()
    return model, cls(param_groups(model, **keys, seed=seed), lr=1e-2, **arguments, **more)


def backward(model, step, micro=1):
    ids = torch.randint(0, 20, (32,), generator=torch.Generator().manual_seed(step))
    for part, target in zip(ids.chunk(micro), ids.roll(1).chunk(micro)):
        (nn.functional.cross_entropy(model(part), target) / micro).backward()


def run(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def training(model):
    """The layers of which something has requires_grad, after a check that all of it has."""
    found = []
    for i, layer in enumerate(model.layers):
        wants = {p.requires_grad for p in layer.parameters()}
        assert len(wants) == 1
        found += [i] if wants == {True} else []
    return found


# --- draws


def test_layers_by_name():
    names = ("model.layers.3.mlp.up.weight", "encoder.block.0.layer.1.w", "lm_head.weight", "weight", "parameter 2", "0.weight")
    assert [layer_of(name) for name in names] == ["model.layers.3", "encoder.block.0", "lm_head", "weight", "parameter 2", "0"]


def test_draws_are_even_without_replacement_and_of_the_seed():
    turns = [draw(NAMES, 2, None, 7, turn) for turn in range(2000)]
    assert all(len(turn) == 2 for turn in turns)
    assert turns == [draw(NAMES, 2, None, 7, turn) for turn in range(2000)]
    assert turns != [draw(NAMES, 2, None, 8, turn) for turn in range(2000)]
    for name in NAMES:  # 800 in the mean, with a deviation of 22
        assert abs(sum(name in turn for turn in turns) - 800) < 110


def test_draws_follow_scores():
    scores = dict(zip(NAMES, (1.0, 2.0, 3.0, 4.0, 0.0)))
    firsts = [next(iter(draw(NAMES, 1, scores, 3, turn))) for turn in range(2000)]
    for name, score in scores.items():  # deviations of 22 at most
        assert abs(firsts.count(name) - 200 * score) < 110
    assert firsts.count("layers.4") == 0


# --- who trains, and what is freed


@pytest.mark.parametrize("per_layer", [None, "in_backward"])
@pytest.mark.parametrize("name", ["lisa", "owlore"])
def test_only_drawn_layers_have_gradients_and_states(name, per_layer):
    model, optimizer = made(name, per_layer=per_layer)
    seen = []
    for step in range(4 * PERIOD):
        now = training(model)
        assert len(now) == 2
        seen.append(now)
        before = copy.deepcopy(model.state_dict())
        backward(model, step)
        for i, layer in enumerate(model.layers):
            assert i in now or all(p.grad is None for p in layer.parameters())
        assert model.embedding.weight.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        moved = {layer_of(key) for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == {"embedding", "head", *(f"layers.{i}" for i in now)}
        kept = {layer_of(n) for n, p in model.named_parameters() if optimizer.state.get(p)}
        assert kept <= {"embedding", "head", *(f"layers.{i}" for i in now)} and set(kept) >= {"embedding", "head"}
        after = training(model)
        assert after == now or (step + 1) % PERIOD == 0
        assert {f"layers.{i}" for i in after} & kept == {f"layers.{i}" for i in set(now) & set(after)}
    periods = seen[::PERIOD]
    assert all(seen[i] == periods[i // PERIOD] for i in range(len(seen))) and len({*map(tuple, periods)}) > 1
    assert name != "owlore" or not any(4 in now for now in seen)


def test_memory_shrinks_with_what_is_frozen():
    """Of five equal layers two have states: so much of the moments of AdamW on all of them."""
    model = Model()
    everything = LISA(param_groups(model, rank=None), active_layers=LAYERS)
    run(model, everything, range(1))
    small, optimizer = made("lisa")
    run(small, optimizer, range(1))
    layer = 2 * 4 * sum(p.numel() for p in small.layers[0].parameters())
    assert everything.memory()["moments"] - optimizer.memory()["moments"] == 3 * layer
    run(small, optimizer, range(1, 2 * PERIOD))  # layers that were drawn once are not kept
    assert everything.memory()["moments"] - optimizer.memory()["moments"] >= 3 * layer
    assert optimizer.memory()["other"] == 0


def test_gum_s_layers_are_whole_by_turns():
    model, optimizer = made("gum")
    periods = []
    for step in range(4 * PERIOD):
        run(model, optimizer, [step])
        if (step + 1) % PERIOD == 0:
            assert not any(optimizer.state.get(p) for layer in model.layers for p in (layer.up.weight, layer.down.weight))
            continue
        states = [optimizer.state[layer.up.weight] for layer in model.layers]
        whole = [i for i, state in enumerate(states) if "outside" in state]
        assert len(whole) == 2
        for i, state in enumerate(states):
            assert tuple(state["exp_avg"].shape) == ((2 * WIDTH, WIDTH) if i in whole else (2 * WIDTH, 4))
            assert state["share"] == (0.4 if i in whole else 0.6) and int(state["countdown"]) == PERIOD - step % PERIOD - 1
        periods.append(tuple(whole))
    assert periods[::2] == periods[1::2] and len(set(periods)) > 1 and training(model) == list(range(LAYERS))


def test_what_is_plain_in_a_layer_of_gum_keeps_its_state():
    model, optimizer = made("gum")
    run(model, optimizer, range(4 * PERIOD))
    plain = [p for name, p in model.named_parameters() if name.endswith(("norm.weight", "bias", "embedding.weight"))]
    assert {float(optimizer.state[p]["step"]) for p in plain} == {4.0 * PERIOD}


def test_accumulation_belongs_to_one_period():
    """Windows of micro-batches are single steps: roles change between them alone."""
    results = []
    for micro in (1, 4):
        model, optimizer = made("lisa")
        for step in range(2 * PERIOD):
            backward(model, step, micro)
            optimizer.step()
            optimizer.zero_grad()
        results.append((training(model), model.layers[0].up.weight.detach(), optimizer.param_groups[1]["schedule_steps"]))
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2] == 2 * PERIOD
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=0)


def test_a_rate_of_zero_is_no_step():
    """As checkpoint loaders take one to have the states made."""
    model, optimizer = made("lisa")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(model, optimizer, range(3 * PERIOD))
    assert {group["schedule_steps"] for group in optimizer.param_groups} == {0}


def test_what_the_caller_froze_stays_frozen():
    torch.manual_seed(0)
    model = Model()
    groups = param_groups(model, rank=None)
    model.layers[1].up.weight.requires_grad_(False)
    optimizer = LISA(groups, active_layers=LAYERS, period=1)
    run(model, optimizer, range(3))
    assert not model.layers[1].up.weight.requires_grad and model.layers[1].down.weight.requires_grad
    optimizer.release()
    assert not model.layers[1].up.weight.requires_grad


def test_an_optimizer_that_is_refused_freezes_nothing():
    model = Model()
    vectors, matrices = param_groups(model, rank=4)
    first, second = ({**matrices, "params": matrices["params"][i::2]} for i in range(2))
    with pytest.raises(ValueError, match="rank must be at most 16"):
        OwLore([vectors, first, {**second, "rank": 99}], active_layers=1)
    assert training(model) == list(range(LAYERS))


def test_a_group_that_joins_later_takes_its_role():
    model = Model()
    vectors, matrices = param_groups(model, rank=None)
    first, second = ({**matrices, "params": matrices["params"][:6]}, {**matrices, "params": matrices["params"][6:]})
    optimizer = LISA([vectors, first], active_layers=2, period=PERIOD)
    optimizer.add_param_group(second)
    assert len(training(model)) == 2
    run(model, optimizer, range(PERIOD + 1))
    assert len(training(model)) == 2


def test_release_thaws():
    model, optimizer = made("lisa")
    assert len(training(model)) == 2
    optimizer.release()
    assert training(model) == list(range(LAYERS))


# --- resume


@pytest.mark.parametrize("stop", [PERIOD, PERIOD + 1, 2 * PERIOD - 1])
@EACH
def test_a_resumed_run_is_the_same_to_the_bit(name, stop):
    model, optimizer = made(name)
    run(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    resumed, again = made(name)
    run(resumed, again, range(100, 100 + PERIOD + 2))  # in another period, with other layers
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    assert training(resumed) == training(model)
    twin, twins = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (resumed, again), (twin, twins)):
        run(m, o, range(stop, stop + 2 * PERIOD))
    for other in (resumed, twin):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_a_state_of_other_roles_is_refused():
    model, optimizer = made("lisa")
    run(model, optimizer, range(PERIOD - 1))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["schedule_steps"] += 1 + 2 * PERIOD
    other, again = made("lisa")
    before = again.state_dict()
    with pytest.raises(ValueError, match="the loaded state of layers.* must have what LISA keeps, it has .*exp_avg"):
        again.load_state_dict(state)
    assert again.state_dict()["param_groups"] == before["param_groups"] and len(training(other)) == 2
    for group in state["param_groups"]:
        del group["schedule_steps"]
    with pytest.raises(ValueError, match="must have the keys of LISA, it lacks schedule_steps"):
        again.load_state_dict(state)


def test_a_state_that_lacks_what_trains_warns():
    """As torch.distributed.checkpoint's helpers leave out the weights that are frozen as they load."""
    model, optimizer = made("lisa")
    run(model, optimizer, range(PERIOD + 1))
    state = copy.deepcopy(optimizer.state_dict())
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    matrices = [i for i, name in enumerate(names) if name.endswith(("up.weight", "down.weight"))]
    state["state"] = {i: one for i, one in state["state"].items() if i not in matrices}
    with pytest.warns(UserWarning, match="no state was loaded for 4 weights that train now, which begin anew: layers"):
        made("lisa")[1].load_state_dict(state)


# --- a composition that is no preset


def test_any_method_takes_a_schedule():
    """GaLore whose drawn layers train whole for a while."""
    torch.manual_seed(0)
    model = Model()
    pipeline = Pipeline(Adam(), schedule=Sampled(WHOLE, active_layers=1, steps=PERIOD))
    optimizer = LowRankOptimizer(param_groups(model, rank=4), pipeline, {"lr": 1e-2, "weight_decay": 0.0, **Adam.defaults})
    run(model, optimizer, range(PERIOD - 1))
    (drawn,) = training(model)
    state = optimizer.state[model.layers[drawn].up.weight]
    assert "basis" not in state and state["exp_avg"].shape == (2 * WIDTH, WIDTH)


# --- GradES


def test_a_matrix_stops_when_its_gradient_has_settled():
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.layers[2].down.weight.mul_(1e-9)  # of the layer's first matrix hardly a gradient
    optimizer = GradES(param_groups(model, rank=None), lr=1e-12, tau=1e-4, grace=4, period=2)
    frozen = []
    for step in range(8):
        run(model, optimizer, [step])
        frozen.append([n for n, p in model.named_parameters() if not p.requires_grad])
    assert frozen == [[]] * 5 + [["layers.2.up.weight"]] * 3
    assert not optimizer.state.get(model.layers[2].up.weight) and optimizer.memory()["other"] == 0
    resumed = Model()
    again = GradES(param_groups(resumed, rank=None), lr=1e-12, tau=1e-4, grace=4, period=2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [n for n, p in resumed.named_parameters() if not p.requires_grad] == ["layers.2.up.weight"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_has_not_settled(bad):
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = GradES([{"params": [weight], "rank": None}], lr=1e-2, tau=1e9, grace=0, period=1)
    weight.grad = torch.full((3, 4), bad)
    optimizer.step()
    assert weight.requires_grad
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    assert not weight.requires_grad and weight.grad is None


def test_settling_sees_gradients_without_a_scaler_s_factor():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = GradES([{"params": [weight], "rank": None}], lr=1e-2, tau=13.0, grace=0, period=1)
    weight.grad = torch.full((3, 4), 1024.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.zeros(())
    optimizer.step()
    assert not weight.requires_grad


# --- OwLore's scores


def test_outlier_scores():
    torch.manual_seed(0)
    model = Model()
    ids = torch.arange(20)
    with torch.no_grad():
        model.layers[4].down.weight[5, 7] = 1e3
    scores = outlier_scores(model, [ids])
    assert list(scores) == NAMES and scores["layers.4"] == pytest.approx(1 / (4 * WIDTH * WIDTH))
    assert [scores[name] for name in NAMES[:4]] == [0.0] * 4
    with pytest.raises(ValueError, match="numbered layers"):
        outlier_scores(nn.Linear(3, 4), [torch.ones(2, 3)])


# --- what is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"active_layers": 0}, "active_layers must be an integer of at least 1, got 0"),
        ({"period": 0}, "period must be an integer of at least 1, got 0"),
        ({"scores": {"layers.0": 1.0}}, "scores must have one for every layer, got none for layers.1"),
        ({"scores": dict.fromkeys(NAMES, 0.0)}, "scores must be above 0 for 2 layers or more, got 0"),
        ({"scores": [1.0]}, "scores must be a dict of names and numbers of at least 0 or None"),
        ({"schedule_steps": 3}, "LISA takes .*, got schedule_steps"),
    ],
)
def test_refused(arguments, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        LISA(param_groups(model, rank=None), **arguments)
    assert training(model) == list(range(LAYERS))


def test_a_schedule_is_neither_accumulated_nor_captured():
    model = Model()
    with pytest.raises(ValueError, match="per_layer='accumulate' needs a rule that can start from R, got OwLore"):
        OwLore(param_groups(model, rank=4), per_layer="accumulate")
    with pytest.raises(ValueError, match="must train everything always to be captured, got LISA"):
        CapturedStep(LISA(param_groups(model, rank=None)))
    with pytest.raises(ValueError, match="refresh must be one of now, got 'next'"):
        GUM(param_groups(model, rank=4, refresh="next"))
    assert Settling().memory["settled"] == ()
