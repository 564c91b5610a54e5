"""Parameters that come alone, without a model or names: matrices by their shapes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_sys.integrations import flat
from lowrank_sys.nn import project_model
from lowrank_sys.optim import APOLLOAdamW, GaLoreAdamW, QGaLoreAdamW8bit, param_groups
from lowrank_sys.optim.preset import METHODS

VOCAB = 64


def llama(layers=3):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=32, tie_word_embeddings=False))


def split(groups):
    """The identities of what has a rank, and of what has none."""
    sorts = {True: set(), False: set()}
    for group in groups:
        sorts["rank" in group] |= {id(p[1] if isinstance(p, tuple) else p) for p in group["params"]}
    return sorts


@pytest.mark.parametrize("layers, keys", [(3, {}), (1, {"vocab_size": VOCAB})], ids=["by repetition", "by vocab_size"])
def test_the_choice_is_that_of_names(layers, keys):
    model = llama(layers)
    wanted = split(param_groups(model, rank=8))
    assert split(flat.param_groups(model.parameters(), rank=8, **keys)) == wanted
    assert split(flat.param_groups(model.named_parameters(), rank=8, **keys)) == wanted


def steps(model, optimizer, n=3):
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(n):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name, cls", [("galore", GaLoreAdamW), ("apollo_mini", APOLLOAdamW), ("q_galore", QGaLoreAdamW8bit)])
def test_it_trains_as_by_names_to_the_bit(name, cls):
    """torchtitan's call: a list, and keywords of torch's own AdamW."""
    method, rank = METHODS[name.replace("_", "-")], 1 if name == "apollo_mini" else 8
    one, other = llama(), llama()
    optimizer = getattr(flat, name)(list(one.parameters()), lr=1e-2, weight_decay=0.1, rank=rank, fused=True, foreach=False)
    assert type(optimizer) is cls
    keys = {"rank": rank, "update_proj_gap": 200, "subspace": method.subspace, method.scale_key: method.scale, **method.keys}
    named = cls(param_groups(other, **keys), lr=1e-2, weight_decay=0.1, **method.options)
    assert all(torch.equal(a, b) for a, b in zip(steps(one, optimizer), steps(other, named)))


def test_groups_keep_their_keys():
    """As NeMo hands over what decays and what does not."""
    model = llama()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = flat.galore([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                            lr=1e-2, plain_lr=1e-3, rank=8)  # fmt: skip
    assert [(len(g["params"]), g.get("rank"), g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (2, None, 1e-3, 0.1), (21, 8, 1e-2, 0.1), (7, None, 1e-3, 0.0),
    ]  # fmt: skip


def test_experts_are_matrices_and_what_is_narrow_is_plain():
    experts = [torch.nn.Parameter(torch.zeros(4, 16, 8)) for _ in range(3)]
    routers = [torch.nn.Parameter(torch.zeros(4, 16)) for _ in range(3)]
    assert split(flat.param_groups([*experts, *routers], rank=8)) == {True: set(map(id, experts)), False: set(map(id, routers))}


def test_every_method_that_needs_no_model():
    served = {name for name in METHODS if hasattr(flat, name.replace("-", "_"))}
    assert METHODS.keys() - served == {"scale", "galore-plus"}  # these ask the model for its heads and embeddings
    for name in sorted(served):
        rank = {} if METHODS[name].rank is None else {"rank": min(8, METHODS[name].rank)}
        model = llama()
        before = [p.detach().clone() for p in model.parameters()]
        after = steps(model, getattr(flat, name.replace("-", "_"))(model.parameters(), lr=1e-2, **rank))
        assert all(a.isfinite().all() for a in after) and any(not torch.equal(a, b) for a, b in zip(after, before)), name


@pytest.mark.parametrize("keys, wanted", [
    ({"vocab_size": 16}, "a matrix of at least rank 8 without a side of vocab_size=16"),
    ({"vocab_size": VOCAB, "target_modules": ["mlp"]}, "keys of the low-rank group must be among .*, got target_modules"),
    ({"vocab_size": VOCAB, "momentums": 1}, "keywords of GaLoreAdamW: .*momentums"),
], ids=str)  # fmt: skip
def test_bad_input(keys, wanted):
    with pytest.raises(ValueError, match=wanted):
        flat.galore(llama(layers=1).parameters(), rank=8, **keys)


def test_what_holds_no_matrix():
    two = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(2)]
    with pytest.raises(ValueError, match="at least rank 8 whose shape occurs 3 times or more, got 2 parameters"):
        flat.galore(two, rank=8)


def test_projected_layers_need_their_model():
    with pytest.raises(ValueError, match="params must be without projected layers"):
        flat.galore(project_model(llama(), rank=8).parameters(), rank=8)
    with pytest.raises(AttributeError, match="no attribute 'galor'"):
        getattr(flat, "galor")  # noqa: B009
