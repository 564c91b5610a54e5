"""One line in transformers.Trainer: its own names make this package's optimizers, and every method is reached."""

import importlib.util
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, trainer_optimizer
from transformers import trainer as trainer_module
from transformers.training_args import OptimizerNames

from lowrank_sys.integrations import transformers as integration
from lowrank_sys.optim import APOLLOAdamW, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit
from lowrank_sys.optim.preset import METHODS

CLASSES = {
    "galore_adamw": GaLoreAdamW,
    "galore_adamw_8bit": GaLoreAdamW8bit,
    "galore_adafactor": GaLoreAdafactor,
    "apollo_adamw": APOLLOAdamW,
}
EIGHT = [name + end for name in CLASSES for end in ("", "_layerwise")]


def small_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=32))


def trainer(tmp_path, model=None, optimizer_cls_and_kwargs=None, **arguments):
    model = small_llama() if model is None else model
    ids = torch.randint(0, model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(1)).repeat(8, 1)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_steps=1, **{"max_steps": 3, "learning_rate": 1e-2, **arguments},
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )  # fmt: skip


def low_rank_names(optimizer):
    return [name for group in optimizer.param_groups if "rank" in group for name in group["param_names"] if "low_rank" not in name]


def bare(optimizer):
    """The optimizer that Accelerate wraps."""
    return getattr(optimizer, "optimizer", optimizer)


@pytest.fixture
def without_peers(monkeypatch):
    for name in ("galore_torch", "apollo_torch"):
        monkeypatch.setattr(trainer_optimizer, f"is_{name}_available", lambda: False)


def test_the_table_of_transformers_is_where_it_was():
    assert {name.value for name in OptimizerNames if name.value.startswith(("galore", "apollo"))} == set(EIGHT)
    for name in EIGHT:
        assert trainer_module._OPTIMIZER_HANDLERS[name] is integration._serve


def test_a_table_that_moved_is_told(monkeypatch):
    monkeypatch.delattr(trainer_module, "_OPTIMIZER_HANDLERS")
    spec = importlib.util.spec_from_file_location("a_copy", integration.__file__)
    with pytest.raises(ImportError, match=r"transformers \d.* has no table .*\._OPTIMIZER_HANDLERS, .*building\.optimizer"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("name", EIGHT)
def test_a_name_of_transformers_trains_by_our_optimizer(name, tmp_path, without_peers):
    run = trainer(
        tmp_path, optim=name, optim_target_modules=["mlp"], optim_args="rank=8, update_proj_gap=2, scale=0.5, seed=3",
        weight_decay=0.02, adam_beta1=0.8,
    )  # fmt: skip
    run.train()
    optimizer = bare(run.optimizer)
    assert type(optimizer) is CLASSES[name.removesuffix("_layerwise")]
    names = low_rank_names(optimizer)
    assert names and all("mlp" in name for name in names)
    group = next(group for group in optimizer.param_groups if "rank" in group)
    assert (group["rank"], group["update_proj_gap"], group["scale"], group["seed"]) == (8, 2, 0.5, 3)
    assert all(group["weight_decay"] == 0.02 and group.get("betas", (0.8,))[0] == 0.8 for group in optimizer.param_groups)
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("targets, matched", [
    ("all-linear", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    ([r".*layers\.0\..*down_proj"], ("layers.0.mlp.down_proj",)),
    (r".*\.(q|k)_proj", ("q_proj", "k_proj")),
], ids=str)  # fmt: skip
def test_target_modules_are_read_as_by_transformers(targets, matched, tmp_path):
    run = trainer(tmp_path, optim="galore_adamw", optim_target_modules=targets, optim_args="rank=4")
    names = low_rank_names(run.create_optimizer())
    assert {next(part for part in matched if part in name) for name in names} == set(matched)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor"])
def test_layerwise_with_accumulation_and_clipping_is_the_dense_run(name, tmp_path):
    """Accumulated projections are clipped by their own norm, so both runs are left unclipped; the basis is the next step's."""
    runs = []
    for layerwise in (False, True):
        run = trainer(
            tmp_path, optim=name + "_layerwise" * layerwise, optim_target_modules="all-linear", gradient_accumulation_steps=2,
            optim_args="rank=8,refresh=next,update_proj_gap=2", max_grad_norm=0.0,
        )  # fmt: skip
        run.train()
        runs.append([p.detach() for n, p in run.model.named_parameters() if "low_rank_gradients" not in n])
    for dense, layer_by_layer in zip(*runs):
        torch.testing.assert_close(layer_by_layer, dense, rtol=1e-4, atol=1e-5)


def test_apollo_layerwise_with_accumulation_says_that_it_keeps_gradients(tmp_path):
    run = trainer(tmp_path, optim="apollo_adamw_layerwise", optim_target_modules="all-linear", optim_args="rank=8",
                  gradient_accumulation_steps=2)  # fmt: skip
    with pytest.warns(UserWarning, match="gradient_accumulation_steps=2"):
        run.train()
    assert not bare(run.optimizer).gradients.served_by_hooks


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_reached_the_public_way(name, tmp_path):
    rank = {} if METHODS[name].rank is None else {"rank": min(8, METHODS[name].rank)}
    run = trainer(tmp_path, optimizer_cls_and_kwargs=(integration.optimizer(name), {"lr": 1e-3, "weight_decay": 0.01, **rank}))
    run.train()
    optimizer = bare(run.optimizer)
    assert type(optimizer) is METHODS[name].optimizer
    assert all(group["weight_decay"] == 0.01 for group in optimizer.param_groups)


def test_the_factory_as_axolotl_calls_it():
    model = small_llama()
    made = integration.optimizer("q-galore")()(model, object(), rank=8, lr=1e-3, plain_lr=1e-4, betas=(0.8, 0.9))
    assert type(made) is QGaLoreAdamW8bit
    assert [group["lr"] for group in made.param_groups][:2] == [1e-4, 1e-3]
    assert all(group["betas"] == (0.8, 0.9) for group in made.param_groups)


def test_bad_input():
    with pytest.raises(ValueError, match="method must be one of .*galore.*, got 'galor'"):
        integration.optimizer("galor")
    with pytest.raises(ValueError, match="GaLoreAdamW.*momentums"):
        integration.optimizer("galore")()(small_llama(), rank=8, momentums=1)


def test_names_need_their_modules(tmp_path):
    with pytest.raises(ValueError, match="optim_target_modules must be given with optim='galore_adamw'"):
        trainer(tmp_path, optim="galore_adamw").create_optimizer()


def test_arguments_of_the_command_are_text(tmp_path):
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 'eight'"):
        trainer(tmp_path, optim="galore_adamw", optim_target_modules="all-linear", optim_args="rank=eight").create_optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = trainer(tmp_path, optim="galore_adamw", optim_target_modules="all-linear", optim_args="rank=4,subspace=svd")
        assert next(g for g in run.create_optimizer().param_groups if "rank" in g)["subspace"] == "svd"
