"""The planner against what is measured: tensors of real runs, scratch by torch's allocator, a process by the system."""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lanes import usual
from resident import allocated

from lowrank_sys import cli
from lowrank_sys._ops import workspace
from lowrank_sys._ops.named_steps import bound
from lowrank_sys._ops.step import BASES, LIMITED
from lowrank_sys.memory import allocator, planner, process, rehearsal, units
from lowrank_sys.memory.workspace import scratch_bytes
from lowrank_sys.nn.low_rank_part import NAMES
from lowrank_sys.optim.fused import FUSED
from lowrank_sys.train import flags
from lowrank_sys.train.methods import METHODS

GIB = 2**30


def arguments(**changes):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    args = parser.parse_args(["--device", "cpu", "--dtype", "fp32"])
    vars(args).update(changes)
    flags.check(args)
    return args


# --- tensors


@pytest.mark.parametrize("changes", usual([
    {"gradient_accumulation_steps": 2, "dtype": "bf16"},
    {"method": "q-galore", "dtype": "bf16"},
    {"per_layer": "accumulate", "gradient_accumulation_steps": 2},
    {"method": "loqt"},
    ],
    {"method": "loqt", "weights": "int8", "projected": "auto", "gradient_accumulation_steps": 2},
    {"model": "llama-9m"},
    {"model": "llama-60m", "batch_size": 1, "seq_len": 32},
    {"gradient_checkpointing": True},
    {"method": "galore-adafactor", "subspace": "svd"},
    {"method": "adamw", "batch_size": 1},
    {"method": "galore8bit", "per_layer": "accumulate"},
    {"per_layer": "accumulate", "accumulate_dtype": "bf16", "gradient_accumulation_steps": 2},
), ids=str)  # fmt: skip
def test_a_rehearsal_has_the_peak_of_the_real_run(changes):
    args = arguments(**{"model": "llama-1m", "batch_size": 4, "seq_len": 128, "rank": 32, **changes})
    fake, real = rehearsal.rehearse(args), rehearsal.rehearse(args, fake=False)
    assert fake.peak == pytest.approx(real.peak, rel=0.05)
    assert fake.rest == pytest.approx(real.rest, rel=0.005)
    assert fake.in_heap == pytest.approx(real.in_heap, rel=0.05)
    for run in (fake, real):
        assert sum(run.at_peak.values()) == run.peak and sum(run.at_rest.values()) == run.rest
    codes = [b for name, b in real.model.named_buffers() if name.rpartition(".")[2] in ("codes", *NAMES)]
    weights = sum(t.untyped_storage().nbytes() for t in (*real.model.parameters(), *codes))
    assert fake.at_peak["weights"] == real.at_peak["weights"] == pytest.approx(weights, rel=0.01)
    for category in ("basis", "moments", "scales", "counters"):
        assert fake.at_rest.get(category) == real.at_rest.get(category)
    assert (fake.at_peak.get("basis", 0) > 0) == (args.method != "adamw")


def test_checkpointing_shrinks_activations():
    plain, checkpointed = (
        rehearsal.rehearse(arguments(model="llama-1m", batch_size=8, seq_len=256, rank=32, gradient_checkpointing=on))
        for on in (False, True)
    )
    assert checkpointed.at_peak["activations"] < 0.8 * plain.at_peak["activations"]


def test_activations_are_named_where_the_loss_makes_no_logits():
    run = rehearsal.rehearse(arguments(model="llama-1m", method="q-galore", batch_size=8, seq_len=128, rank=32))
    assert run.at_peak["activations"] > 10 * run.at_peak["workspace"]


ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
BIG = (1500, 1100)  # above one tile


def matrix(m, n, r, left, dtype):
    torch.manual_seed(0)
    low_rank = (r, n) if left else (m, r)
    basis = torch.linalg.qr(torch.randn(m if left else n, r))[0].to(dtype)
    return (
        torch.randn(m, n).to(dtype),
        torch.randn(m, n).to(dtype),
        basis.contiguous(),
        torch.zeros(low_rank),
        torch.zeros(low_rank),
    )


def expected(function, *args, **kwargs):
    return scratch_bytes(function, args, kwargs)


def behind(form, *args, **kwargs):
    """(op, its arguments, its keywords) that a named step calls."""
    call = []
    bound(form, lambda *lists, **keywords: call.extend((lists, keywords)))(*args, **kwargs)
    return torch.ops.lowrank.step.default, *call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("shape", [BIG, (300, 200)], ids=str)
def test_scratch_formulas_are_what_the_allocator_sees(shape, left, dtype):
    ops = torch.ops.lowrank
    param, grad, basis, m, v = matrix(*shape, 24, left, dtype)
    low_rank = torch.randn_like(m)
    for form, gradient in (("galore_step", grad), ("subspace_step", low_rank)):
        op, lists, keys = behind(form, param, gradient, basis, m, v, step=1, scale=1.0, left=left, **ADAM)
        assert allocated(op, *lists, **keys) == expected(op, *lists, **keys) >= 4 * m.numel()
    for call in ((ops.project.default, grad, basis), (ops.back_project_.default, param, low_rank, basis)):
        assert allocated(*call, left=left) == expected(*call, left=left)
    assert allocated(ops.channel_norms.default, grad, left=left) == expected(ops.channel_norms.default, grad, left=left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("shape", [BIG, (300, 200)], ids=str)
def test_scratch_formulas_of_low_precision_ops(shape, left, dtype):
    """Nothing of a weight's size in full precision, to the byte."""
    ops = torch.ops.lowrank
    param, grad, basis, m, v = matrix(*shape, 24, left, dtype)
    int4, int8, x = ops.quantize_int4(basis), ops.quantize_int8(param), torch.randn_like(m)
    stream = dict(seed=1, parameter=0)
    rows, outs = torch.randn(1100, shape[1]).to(dtype), torch.randn(7, shape[0]).to(dtype)
    calls = [
        ((ops.project_int4.default, grad, *int4), dict(left=left)),
        ((ops.back_project_int4_.default, param, x, *int4), dict(left=left)),
        ((ops.quantize_int8.default, param), {}),
        ((ops.int8_update_.default, *int8, grad), dict(step=1, **stream)),
        ((ops.int8_linear.default, rows, *int8, param[:, 0].contiguous()), {}),
        ((ops.int8_linear_backward.default, outs, *int8), {}),
        ((ops.back_project_int8_.default, *int8, x, basis), dict(left=left, step=1, **stream)),
        ((ops.back_project_int8_.default, *int8, x, *int4), dict(left=left, step=1, **stream)),
    ]
    for call, keys in calls:
        assert allocated(*call, **keys) == expected(*call, **keys), str(call[0])


def step_call(weight, basis, moments, rule, remainder, shape, left, dtype):
    """(lists, keywords) of a step of one matrix."""
    ops = torch.ops.lowrank
    param, grad, b, m, v = matrix(*shape, 24, left, dtype)
    states, parts = [m, v], []
    if moments == "8bit":
        (m, m_absmax), (v, v_absmax) = (ops.quantize_blockwise(x, signed=x is m, by_row=True) for x in (m, v))
        states = [m, v, m_absmax, v_absmax]
    if remainder in LIMITED:
        states.append(torch.tensor(0.5))
    if basis == "int4":
        b, *parts = ops.quantize_int4(b)
    elif basis == "key":
        b = torch.tensor([1, 2, 3, 0])
    weights, scales = ([x] for x in ops.quantize_int8(param)) if weight == "int8" else ([param], [])
    policies = dict(weight=weight, basis=basis, moments=moments, rule=rule, remainder=remainder, left=left)
    keys = dict(**ADAM | {"lr": torch.tensor(0.1)}, scale=1.0, sign=True, parameters=[0] if scales else [], **policies)
    return (weights, scales, [grad], [b], parts, states, [torch.tensor(0.0)]), keys


STEPS = [row for row in FUSED if row[1] in BASES]


@pytest.mark.parametrize("dtype", usual([torch.float32], torch.bfloat16), ids=["fp32", "bf16"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("row", STEPS, ids="-".join)
def test_scratch_of_every_step(row, left, dtype):
    """To the byte, and nothing of the weight's size."""
    lists, keys = step_call(*row, BIG, left, dtype)
    op = torch.ops.lowrank.step.default
    assert allocated(op, *lists, **keys) == expected(op, *lists, **keys)
    lists, keys = step_call(*row, (2500, 1800), left, dtype)
    assert allocated(op, *lists, **keys) < 4 * 2500 * 1800


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scratch_of_a_list_is_kept_from_matrix_to_matrix(dtype):
    matrices = [matrix(m, n, 16, True, dtype) for m, n in ((64, 300), (BIG), (200, 100))]
    lists = [list(column) for column in zip(*matrices)]
    steps = [torch.zeros(()) for _ in matrices]
    lr = torch.tensor(ADAM["lr"])
    keys = {**ADAM, "lr": lr, "scale": 1.0, "left": True}
    op, step_lists, step_keys = behind("galore_step.list", *lists, steps, **keys)
    seen, said = allocated(op, *step_lists, **step_keys), expected(op, *step_lists, **step_keys)
    assert seen <= said <= 1.25 * seen  # the parts are largest at different matrices
    plain = (
        [p.clone() for p in lists[0]],
        lists[1],
        [torch.zeros(p.shape) for p in lists[0]],
        [torch.zeros(p.shape) for p in lists[0]],
        steps,
    )
    op = torch.ops.lowrank.adamw_step.default
    assert allocated(op, *plain, **{**ADAM, "lr": lr}) == expected(op, *plain, **{**ADAM, "lr": lr}) == 0


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scratch_of_products_in_int8(dtype, left):
    """Quantised operands; the panels of the threads are not torch's, and so not seen."""
    ops = torch.ops.lowrank
    param, grad, basis, m, v = matrix(*BIG, 24, left, dtype)
    step = dict(step=1, scale=1.0, left=left, int8_gemm=True, **ADAM)
    for op, call, keys in [
        (ops.project.default, (grad, basis), dict(left=left, int8_gemm=True)),
        (ops.back_project_.default, (param, torch.randn_like(m), basis), dict(left=left, int8_gemm=True)),
        behind("galore_step", param, grad, basis, m, v, **step),
        behind("subspace_step", param, torch.randn_like(m), basis, m, v, **step),
    ]:
        seen, said = allocated(op, *call, **keys), expected(op, *call, **keys)
        panels = workspace.int8_panels(24)
        assert seen <= said - panels <= 1.35 * seen, str(op)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("t, m, n", [(1500, 1300, 1100), (64, 300, 200)])
def test_scratch_of_int8_weights(t, m, n, dtype):
    ops = torch.ops.lowrank
    torch.manual_seed(0)
    codes, scale = ops.quantize_int8(torch.randn(m, n))
    x, grad_out, bias = torch.randn(t, n).to(dtype), torch.randn(t, m).to(dtype), torch.randn(m).to(dtype)
    for call in (
        (ops.int8_linear.default, x, codes, scale),
        (ops.int8_linear.default, x, codes, scale, bias),
        (ops.int8_linear_backward.default, grad_out, codes, scale),
        (ops.quantize_int8.default, x),
        (ops.dequantize_int8.default, codes, scale),
    ):
        assert allocated(*call) == expected(*call)
    update = (ops.int8_update_.default, codes, scale, torch.randn(m, n).to(dtype))
    keys = {"alpha": 1e-3, "seed": 1, "step": 1, "parameter": 0}
    assert allocated(*update, **keys) == expected(*update, **keys) == 0


def test_scratch_of_torchs_own_operators():
    grads = [torch.randn(500, 300), torch.randn(40, 30)]
    norm = torch.ops.aten._foreach_norm.Scalar
    assert allocated(norm, grads, 2, dtype=torch.float64) == pytest.approx(8 * 500 * 300, rel=0.01)
    assert expected(norm, grads, 2, dtype=torch.float64) == 8 * 500 * 300 and expected(norm, grads, 2) == 0
    svd = torch.ops.aten._linalg_svd.default
    assert allocated(svd, grads[0]) == pytest.approx(expected(svd, grads[0]), rel=0.03)
    eigh = torch.ops.aten._linalg_eigh.default
    assert allocated(eigh, grads[0][:300]) == pytest.approx(expected(eigh, grads[0][:300]), rel=0.03)


def test_an_op_without_a_formula_is_bounded():
    param, grad, basis, m, v = matrix(*BIG, 24, True, torch.bfloat16)
    small = 4 * (basis.numel() + 2 * m.numel())
    assert workspace.bound(param, grad, basis, m, v, left=True) == small + 4 * workspace.TILE_ELEMENTS
    assert workspace.bound([param, param[:8]], [grad, grad[:8]], [basis, basis], lr=0.1) == (
        4 * basis.numel() + 4 * workspace.TILE_ELEMENTS
    )
    _, lists, keys = behind("galore_step", param, grad, basis, m, v, step=1, scale=1.0, left=True, **ADAM)
    assert workspace.FORMULAS["step"](*lists, **keys) <= workspace.bound(param, grad, basis, m, v, left=True)


# --- the process


@pytest.mark.full
def test_the_plan_is_the_systems_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = {"--model": "llama-9m", "--batch-size": "4", "--seq-len": "128", "--rank": "64", "--device": "cpu",
             "--data": str(Path(argparse.__file__)), "--eval-tokens": "256", "--steps": "2"}  # fmt: skip
    words = [word for pair in flags.items() for word in pair]
    code = "import sys; from lowrank_sys import cli; sys.exit(cli.main())"
    start = [sys.executable, "-c", code]
    run = subprocess.Popen([*start, "train", *words, "--out", str(tmp_path / "run")], stderr=subprocess.DEVNULL)
    done = subprocess.run([*start, "plan", *words, "--json"], capture_output=True, text=True)
    assert run.wait() == 0 and done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert plan["peak_bytes"] == pytest.approx(summary["peak_memory_bytes"], rel=0.1)
    assert plan["training_peak_bytes"] == pytest.approx(summary["training_peak_memory_bytes"], rel=0.1)
    assert plan["process_baseline_bytes"] > 200 * 2**20 and plan["fits"] is None
    assert summary["memory"]["moments"] == plan["tensors"]["moments"]
    assert summary["memory"]["basis"] == plan["tensors"]["basis"]


def test_freed_blocks_go_back_to_the_system():
    code = """
import sys, torch
from lowrank_sys.memory import allocator
from pathlib import Path
rss = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
torch.empty(8 << 20, dtype=torch.uint8)  # freed: glibc's threshold is above 2 MiB from now on
if sys.argv[1] == "save":
    assert allocator.save_memory()
before = rss()
blocks = [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(64)]
fence = [torch.ones(1000) for _ in range(1000)]
peak = rss()
del blocks
print(peak - before, rss() - before)
"""
    if sys.platform != "linux" or not hasattr(os, "confstr") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"):
        pytest.skip("needs glibc")
    held = {}
    for mode in ("save", "default"):
        out = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True).stdout
        peak, held[mode] = map(int, out.split())
        assert peak > 127 << 20
    assert held["save"] < 16 << 20 < 100 << 20 < held["default"]


def test_tight():
    model = torch.nn.Linear(1000, 1000, bias=False)
    assert allocator.is_tight(model, 23e6) and not allocator.is_tight(model, 25e6)  # 2 x (4 + 8) bytes a weight
    assert not allocator.is_tight(model.requires_grad_(False), 0)
    assert 0 < allocator.available_bytes() < 2**50


# --- the command


@functools.cache
def rehearsed(words):
    return rehearsal.rehearse(argparse.Namespace(**dict(words)))


@pytest.fixture
def plan(monkeypatch, capsys):
    """Run `lowrank plan` with a process baseline of 1 GiB; returns (exit code, stdout, stderr). A run is rehearsed once."""
    monkeypatch.setattr(process, "measure", lambda args: process.Baseline(GIB, GIB, True))
    of_the_plan = ("run", "command", "json", "device_memory", "out")
    monkeypatch.setattr(
        planner,
        "rehearse",
        lambda args: rehearsed(tuple((name, value) for name, value in sorted(vars(args).items()) if name not in of_the_plan)),
    )

    def run(*words, **flags):
        small = {"model": "llama-1m", "batch_size": 4, "seq_len": 64, "rank": 32, "device": "cpu", **flags}
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in small.items() if value is not None]
        code = cli.main(["plan", *(word for pair in pairs for word in pair), *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_parts_add_up(plan):
    code, out, _ = plan("--json", device_memory="2GiB")
    facts = json.loads(out)
    assert code == 0 and facts["fits"] is True and "would_fit" not in facts
    assert sum(facts["tensors"].values()) == facts["tensor_peak_bytes"]
    assert facts["peak_bytes"] == facts["tensor_peak_bytes"] + GIB + facts["allocator_bytes"]
    assert 0 < facts["activations_with_checkpointing_bytes"] < facts["activations_without_checkpointing_bytes"]


@pytest.mark.full
def test_a_run_that_does_not_fit(plan):
    memory = GIB + int(0.95 * json.loads(plan("--json")[1])["tensor_peak_bytes"])
    code, out, err = plan("--json", device_memory=memory)
    facts = json.loads(out)
    assert code == 3 and facts["fits"] is False and "rehearsing --gradient-checkpointing" in err
    assert facts["would_fit"]
    for change in facts["would_fit"]:  # each was planned: planning it again says the same
        again = json.loads(plan("--json", *change["flags"].split(), device_memory=memory)[1])
        assert again["fits"] and again["peak_bytes"] == change["peak_bytes"] <= memory
    code, out, _ = plan(device_memory=memory)
    assert code == 3 and "does not fit" in out and f"would fit: {facts['would_fit'][0]['flags']}" in out


def test_the_allocator_is_suggested_where_it_is_enough(plan, monkeypatch):
    monkeypatch.setattr(allocator, "is_tight", lambda model, available: False)
    memory = GIB + int(1.05 * json.loads(plan("--json")[1])["tensor_peak_bytes"])
    facts = json.loads(plan("--json", device_memory=memory)[1])
    assert not facts["fits"] and facts["would_fit"][0]["flags"] == "MALLOC_MMAP_THRESHOLD_=1048576 in the environment"
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    again = json.loads(plan("--json", device_memory=memory)[1])
    assert again["fits"] and again["allocator_tight"] and again["peak_bytes"] == facts["would_fit"][0]["peak_bytes"]


@pytest.mark.parametrize("flags", [["--per-layer", "in_backward"], ["--weights", "int8"], ["--method", "loqt"]], ids=" ".join)
def test_a_run_that_asks_for_little_memory_holds_no_freed_blocks(plan, monkeypatch, flags):
    monkeypatch.setattr(allocator, "is_tight", lambda model, available: False)
    assert not json.loads(plan("--json")[1])["allocator_tight"]
    facts = json.loads(plan("--json", *flags)[1])
    assert facts["allocator_tight"]
    assert facts["allocator_bytes"] == round(allocator.TIGHT_SHARE * facts["tensor_peak_bytes"])


@pytest.mark.full
def test_a_combination_is_tried_and_the_least_is_told(plan):
    wide = {"batch_size": 4, "seq_len": 128}
    code, out, _ = plan("--json", device_memory="1GiB", **wide)
    facts = json.loads(out)
    assert code == 3 and facts["would_fit"] == []
    least = facts["smallest"]
    assert "--batch-size 1 --gradient-accumulation-steps 4" in least["flags"] and "--dtype bf16" in least["flags"]
    assert "--per-layer in_backward" not in least["flags"]  # which takes no micro-batches
    code, out, _ = plan("--json", device_memory=least["peak_bytes"], **wide)
    assert code == 3 and json.loads(out)["would_fit"][-1]["peak_bytes"] <= least["peak_bytes"]
    assert "nothing that was tried fits; the least" in plan(device_memory="1GiB", **wide)[1]


@pytest.mark.full
def test_every_method_plans(plan):
    for method in METHODS:
        rank = {} if METHODS[method].rank is not None else {"rank": None}
        code, out, _ = plan("--json", method=method, **rank)
        assert code == 0 and json.loads(out)["tensors"]["moments"] > 0


def test_a_gpu_is_planned_without_one(plan, monkeypatch):
    monkeypatch.undo()
    code, out, _ = plan("--json", device="cuda", device_memory="24GiB")
    facts = json.loads(out)
    assert code == 0 and facts["dtype"] == "bf16" and not facts["process_baseline_measured"]
    assert facts["process_baseline_bytes"] == process.CUDA_CONTEXT


def test_a_config_file_is_a_model(plan, tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=300, n_positions=128).save_pretrained(tmp_path)
    code, out, _ = plan("--json", model=tmp_path / "config.json", rank=8)
    facts = json.loads(out)
    assert code == 0 and facts["tensors"]["basis"] > 0
    (tmp_path / "config.json").write_text("{}")
    code, _, err = plan(model=tmp_path / "config.json")
    assert code == 2 and err.count("error:") == 1 and "config.json" in err


@pytest.mark.parametrize("text, size", [
    ("24GiB", 24 * GIB), ("1.5 TB", 15 * 10**11), ("80gb", 8 * 10**10), ("512MiB", 2**29), ("3KiB", 3072), ("7kb", 7000),
    ("1000", 1000), ("5 B", 5), ("2TiB", 2**41), ("6MB", 6 * 10**6),
])  # fmt: skip
def test_sizes(text, size):
    assert units.parse(text, "--device-memory") == size


@pytest.mark.parametrize("text", ["24G", "24 gibibytes", "GiB", "-1GiB", "0", "1e9", "", "0.1B"])
def test_a_wrong_size_is_one_error(plan, text):
    code, out, err = plan(f"--device-memory={text}")
    assert (code, out) == (2, "")
    assert err == (
        f"lowrank plan: error: --device-memory: got {text!r}; it must be a size above 0 in bytes, KiB, MiB, GiB, "
        "TiB or KB, MB, GB, TB, as 24GiB\n"
    )


@pytest.mark.parametrize("flag, value, part", [
    ("model", "llama-2m", "--model: unknown 'llama-2m'; valid: llama-1m,"),
    ("model", "missing/config.json", "--model: unknown 'missing/config.json'"),
    ("method", "sgd", "--method: unknown 'sgd'; valid: adamw"),
    ("rank", 193, "at most 192"),
])  # fmt: skip
def test_bad_flags_are_those_of_train(plan, monkeypatch, tmp_path, flag, value, part):
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(**{flag: value})
    lines = [line for line in err.splitlines() if "error" in line]
    assert (code, out, len(lines)) == (2, "", 1) and part in lines[0]


def test_plan_takes_every_flag_of_train():
    from lowrank_sys.memory import command as plan_command

    parsers = []
    for add in (flags.add_arguments, plan_command.add_arguments):
        parsers.append(argparse.ArgumentParser())
        add(parsers[-1])
    train, plans = ({action.dest for action in parser._actions} for parser in parsers)
    assert plans - train == {"device_memory", "json", "nproc", "strategy"}
