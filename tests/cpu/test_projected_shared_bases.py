"""Layers of ProjectedLinear that read one input share a basis."""

import copy

import pytest
import torch
from projected_model import RANK, backward, batch, galore, layers, llama, projected, train
from small_model import assert_same

from lowrank_sys.nn import project_model


def shared(**keys):
    return projected("right", llama(num_key_value_heads=1), share=True, **keys)  # k and v are narrower than q


def families(model):
    for block in model.model.layers:
        yield [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
        yield [block.mlp.gate_proj, block.mlp.up_proj]


@pytest.mark.parametrize("keys", [{}, {"quant": True, "quant_group_size": 32}, {"moments": "rotate"}], ids=str)
def test_layers_that_read_one_input_share_a_basis(keys):
    """Bit for bit, over refreshes; all else is as without: micro-batches add up, a resumed run and a copy are exact."""
    (model, optimizer), (four, other) = shared(**keys), shared(**keys)
    chosen = set()
    for step in range(10):
        train(model, optimizer, [step])
        train(four, other, [step], 4)
        for members in families(model):
            first, *rest = (optimizer.state[layer.weight] for layer in members)
            assert all(torch.equal(state["basis"], first["basis"]) for state in rest)
            chosen.add(first["basis"].float().sum().item())
        if step == 5:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            copied = copy.deepcopy((model, optimizer))
    assert len(chosen) >= 3 * 4  # three bases each
    if not keys:  # codes of a basis, and turned moments, part by rounding
        assert_same(model, four, atol=1e-4, rtol=0)
    resumed = shared(**keys)
    resumed[0].load_state_dict(saved[0])
    resumed[1].load_state_dict(saved[1])
    for others in (resumed, copied):
        train(*others, range(6, 10))
        assert_same(model, others[0])


def test_a_shared_basis_is_that_of_all_gradients():
    """Close to the best one for those of q, k and v one over the other, where they stand still."""
    model = project_model(llama(num_key_value_heads=1), RANK, "right", share=True)
    optimizer = galore(model, lr=1e-7)
    train(model, optimizer, [0] * 9)
    plain = llama(num_key_value_heads=1)
    plain.load_state_dict(model.state_dict())
    backward(plain, 0)
    names = {module: name for name, module in model.named_modules()}
    for members in families(model):
        grad = torch.cat([plain.get_parameter(f"{names[layer]}.weight").grad for layer in members])
        best = torch.linalg.svdvals(grad)[:RANK].square().sum()
        energy = (grad @ optimizer.state[members[0].weight]["basis"]).square().sum()
        assert energy > 0.95 * best, names[members[0]]


def test_what_layers_that_share_keep_for_backward():
    """One X B for q, k and v, one for gate and up; and each its own where they were trained apart."""
    from lowrank_sys.bench.projected import kept_bytes

    def kept(model):
        return kept_bytes(list(layers(model).values()), lambda: model(input_ids=batch(0), labels=batch(0)).loss)

    model, optimizer = shared(update_proj_gap=100)
    train(model, optimizer, range(5))
    assert not optimizer.gradients.announced()
    one = 4 * batch(0).numel() * RANK
    assert kept(model) == 2 * 4 * one
    members, x = next(families(model)), torch.randn(6, 32)
    for step in range(2):  # one alone, with the same input after the basis has changed
        narrow = members[0].projection.narrow(x, x.dtype)
        torch.testing.assert_close(narrow, x @ optimizer.state[members[0].weight]["basis"])
        for member in members:
            optimizer.state[member.weight]["countdown"].zero_()
        optimizer.gradients.finish(optimizer)
        train(model, optimizer, [step])
    assert kept(model) == 2 * 4 * one
    layer = model.model.layers[0].self_attn.k_proj
    layer.requires_grad_(False)
    train(model, optimizer, range(2))
    layer.low_rank_gradients.requires_grad_(True)
    assert kept(model) == (4 + 6) * one
    train(model, optimizer, range(3))


def test_auto_takes_the_cheaper_side():
    """Bytes by hand: R at 12 an element, the basis and what is kept at 4, for 10 tokens and for 10,000."""
    for tokens in (10, 10_000):
        model = project_model(llama(hidden_size=64, intermediate_size=512), RANK, "auto", tokens=tokens)
        for name, layer in layers(model).items():
            m, n = layer.weight.shape
            right = 12 * m * RANK + 4 * n * RANK + 4 * tokens * RANK
            left = 12 * n * RANK + 4 * m * RANK + 4 * tokens * n
            assert layer.projection.left == (left < right), name
    wide = layers(project_model(llama(hidden_size=64, intermediate_size=512), RANK, "auto", tokens=10))
    assert {name.rpartition(".")[2] for name, layer in wide.items() if layer.projection.left} == {"gate_proj", "up_proj"}
