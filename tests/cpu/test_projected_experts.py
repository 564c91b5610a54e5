"""Experts stacked in one parameter, in transformers' models as they are: each expert's backward gives R and no G."""

import copy
import io

import pytest
import torch
from small_model import assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_sys.nn import compare_sides, project_model, unproject_model
from lowrank_sys.nn.projected_experts import LAYERS, ProjectedExperts
from lowrank_sys.optim import GaLoreAdamW, param_groups

transformers = pytest.importorskip("transformers")

RANK, VOCAB, E = 8, 64, 4
CLOSE = {"atol": 1e-5, "rtol": 0}
BOTH = pytest.mark.parametrize("side", ["left", "right"])
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "num_experts_per_tok": 2, "use_cache": False, "head_dim": 16,
}  # fmt: skip
KINDS = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": E}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, {"num_experts": E}),
}


def moe(kind="mixtral", **more):
    config, own = KINDS[kind]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, **own, **more}))


def galore(model, **keys):
    return GaLoreAdamW(param_groups(model, rank=RANK, update_proj_gap=4, **keys), lr=1e-2, eps=1e-3, weight_decay=0.1)


def batch(step):
    return torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(step % 4))


def train(model, optimizer, steps, micro=1):
    losses = []
    for step in steps:
        for ids in batch(step).chunk(micro):
            loss = model(input_ids=ids, labels=ids).loss / micro
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


def owner(model):
    return next(module for module in model.modules() if isinstance(module, ProjectedExperts))


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_the_loss_curve_of_optimizer_side_galore(side, kind):
    """Which projects the gradient of the stack, expert by expert, with the same bases."""
    model, other = project_model(moe(kind), RANK, side), moe(kind)
    optimizer, theirs = galore(model), galore(other, proj_type=side, refresh="next")
    losses = train(model, optimizer, range(12))
    torch.testing.assert_close(losses, train(other, theirs, range(12)), **CLOSE)
    assert_same(model, other, **CLOSE)
    assert sum(LAYERS in name for name in optimizer.refreshes()) == 2 * E
    with torch.no_grad():  # by the implementation that is set
        ids = batch(0)
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-4, rtol=0)


class Made(TorchDispatchMode):
    """Shapes of all that is allocated."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        taken = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in taken:
                self.shapes.add(tuple(sorted(tensor.shape)))
        return made


def made_in_backward(model):
    loss = model(input_ids=batch(0), labels=batch(0)).loss
    with Made() as made:
        loss.backward()
    return made.shapes


@BOTH
def test_no_gradient_of_an_expert_is_made(side):
    """Neither of one nor of the stack, nor in a refresh."""
    sizes = {"hidden_size": 200, "intermediate_size": 144}  # above the 128 tokens
    of_one, of_stack = {(200, 288), (144, 200)}, {(E, 200, 288), (E, 144, 200)}
    assert of_stack <= made_in_backward(moe(**sizes))  # as it would be seen
    model = project_model(moe(**sizes), RANK, side)
    optimizer, due = galore(model), 0
    for _ in range(4):
        due += sum(LAYERS in name for name in optimizer.gradients.announced())
        assert not (of_one | of_stack) & made_in_backward(model)
        optimizer.step()
        optimizer.zero_grad()
    assert due >= 2 * E


def test_what_a_model_is_to_others(tmp_path):
    """Its state_dict, its files and its number of parameters are those of any model of its kind."""
    plain, model = moe(), project_model(moe(), RANK)
    optimizer = galore(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    count = sum(p.numel() for name, p in model.named_parameters() if "low_rank_gradients" not in name)
    assert count == sum(p.numel() for p in plain.parameters())
    train(model, optimizer, range(3))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, loaded)
    again = project_model(moe(), RANK)
    again.load_state_dict(loaded.state_dict(), strict=True)
    other = galore(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(train(again, other, range(3, 8)), train(model, optimizer, range(3, 8)))
    assert_same(model, again)


def test_copies_casts_and_moves_keep_the_layers_on_the_stack():
    model = project_model(moe(), RANK, "left")
    optimizer = galore(model)
    train(model, optimizer, range(2))
    other, theirs = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, range(2, 5)), train(other, theirs, range(2, 5)))
    assert_same(model, other)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for one in (model, other, loaded, copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).to("meta")):
        module = owner(one)
        for name, layers in module.low_rank_experts.items():
            stack = getattr(module, name)
            for layer, matrix in zip(layers, stack, strict=True):
                assert layer.weight.dtype == stack.dtype and layer.weight.device == stack.device
                assert stack.is_meta or layer.weight.data_ptr() == matrix.data_ptr()
    loaded.load_state_dict({k: v.clone() for k, v in moe().state_dict().items()}, assign=True)
    train(loaded, galore(loaded), range(1))
    assert not torch.equal(owner(loaded).gate_up_proj, moe().model.layers[0].mlp.experts.gate_up_proj)


def test_micro_batches_add_up():
    (one, first), (four, second) = ((m, galore(m)) for m in (project_model(moe(), RANK, "right") for _ in range(2)))
    train(one, first, range(6))
    train(four, second, range(6), micro=4)
    assert_same(one, four, atol=1e-4, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    (model, first), (other, second) = ((m, galore(m)) for m in (project_model(moe(), RANK, "right") for _ in range(2)))
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    other.train()
    assert torch.equal(train(model, first, range(6)), train(other, second, range(6)))
    assert_same(model, other)


def test_autocast():
    """R is that of fp32 to bf16's rounding."""
    grads = []
    for cast in (False, True):
        model = project_model(moe(), RANK, "right")
        optimizer = galore(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = model(input_ids=batch(0), labels=batch(0)).loss
        loss.backward()
        grads.append(owner(model).low_rank_experts.down_proj[1].coefficient.grad)
        del optimizer
    assert grads[1].dtype == torch.float32
    assert 0 < (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()


def test_an_expert_without_tokens_stays_as_it_is():
    model = project_model(moe(), RANK, "left")
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
    optimizer = galore(model)
    layers = owner(model).low_rank_experts.gate_up_proj
    before = [layer.weight.clone() for layer in layers]
    ids = batch(0)
    model(input_ids=ids, labels=ids).loss.backward()
    idle = [e for e, layer in enumerate(layers) if layer.coefficient.grad is None]
    optimizer.step()
    assert [e for e in range(E) if torch.equal(layers[e].weight, before[e])] == idle and len(idle) == E - 2


def test_unproject_model():
    model = unproject_model(project_model(moe(), RANK))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [(n, True) for n in dict(moe().named_parameters())]
    assert_same(model, moe())
    train(model, galore(model), range(2))


def test_auto_counts_the_tokens_of_an_expert():
    found = {one.name.rpartition(".")[2]: one for one in compare_sides(moe(), RANK, tokens=64)}
    up = found["gate_up_proj"]
    assert up.shape == (96, 32) and up.left.kept == E * 4 * 32 * 32 and up.right.kept == E * 4 * 32 * RANK  # 2 of 4 for each token
    assert up.left.low_rank == E * 12 * RANK * 32


class Experts(nn.Module):
    is_transposed = False

    def __init__(self):
        super().__init__()
        self.up_proj, self.config = nn.Parameter(torch.randn(E, 32, 32)), None

    def forward(self, x):
        return torch.bmm(x, self.up_proj)


class Turned(Experts):
    is_transposed = True


@pytest.mark.parametrize(
    "cls, message",
    [(Experts, r"must be read as linear\(x, up_proj\[expert\]\) by its module"), (Turned, r"must be \(experts, out, in\)")],
)
def test_what_computes_otherwise_is_refused(cls, message):
    model = nn.ModuleDict({"experts": cls(), "one": nn.Linear(32, 32)})
    with pytest.raises(ValueError, match=rf"experts.up_proj {message}.* got {cls.__name__}: leave it out by target_modules"):
        project_model(model, RANK)
    assert project_model(model, RANK, target_modules=["one"]) is model


def test_gpt_oss_is_refused():
    config = transformers.GptOssConfig(**{**SIZES, "num_local_experts": E})
    with pytest.raises(ValueError, match=r"gate_up_proj must be \(experts, out, in\)"):
        project_model(transformers.AutoModelForCausalLM.from_config(config), RANK)


def test_a_stack_of_two_modules_is_refused():
    model = moe(num_hidden_layers=2)
    one, two = (block.mlp.experts for block in model.model.layers)
    two.down_proj = one.down_proj
    with pytest.raises(ValueError, match=r"0.mlp.experts.down_proj must be of one module, got .*0.mlp.experts, .*1.mlp.experts"):
        project_model(model, RANK)
    assert not any(isinstance(module, ProjectedExperts) for module in model.modules())
