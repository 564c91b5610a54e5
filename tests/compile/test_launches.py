"""What a step launches, counted without a GPU: the real launchers on CPU tensors, and a driver that records what it is handed."""

import collections
import functools
import time

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from lowrank_sys import reference
from lowrank_sys._ops.named_steps import bound
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.step import step as kernel_step

# Ops that launch nothing on a GPU; a foreach op reads its scalar on the host for CPU tensors alone.
SILENT = {
    "view",
    "reshape",
    "expand",
    "split",
    "unbind",
    "select",
    "slice",
    "alias",
    "detach",
    "as_strided",
    "squeeze",
    "unsqueeze",
    "permute",
    "t",
    "split_with_sizes",
    "_unsafe_view",
    "_local_scalar_dense",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
}
MANY = 224  # the matrices of a 7B model
# Launches that do not grow with the number of matrices: steps are collected, the scalars made, the counters advanced.
CONSTANT = 3


class Recorder:
    """Stands in for the CUDA driver of an H100, which it never calls."""

    launcher_cls = utils = None

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, type_):
        return "void*"

    def is_active(self):
        return True

    def get_active_torch_device(self):
        return torch.device("cpu")


class Ops(TorchDispatchMode):
    """Counts the ops of torch that launch a kernel each."""

    def __init__(self):
        super().__init__()
        self.counted = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        self.counted[name] += name not in SILENT
        return function(*args, **(kwargs or {}))


@pytest.fixture
def count(monkeypatch):
    """Calls a function twice; returns (launches of Triton's kernels, of torch's ops) of the second call, by name. `forms` of it
    are what was compiled in all calls, by name."""
    run, launched, forms = triton.runtime.jit.JITFunction.run, collections.Counter(), collections.defaultdict(set)

    def recorded(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched[self.__name__] += 1
        forms[self.__name__].add(kernel.hash)
        return kernel

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", recorded)
    monkeypatch.setattr(configs, "target", lambda device: configs.Target(90, 132))
    monkeypatch.setattr(triton.runtime.driver, "_active", Recorder())

    def counted(function):
        function()
        launched.clear()
        with Ops() as ops:
            function()
        return dict(launched), {name: calls for name, calls in ops.counted.items() if calls}

    counted.forms = forms
    return counted


def matrices(count, m=256, n=512, r=128, left=True, dtype=torch.bfloat16):
    """Lists of weights, gradients, bases and moments of matrices of one shape, which share their memory, and their steps."""
    shape = (r, n) if left else (m, r)
    one = [
        torch.randn(m, n).to(dtype),
        torch.randn(m, n).to(dtype),
        torch.randn(m if left else n, r).to(dtype),
        torch.randn(shape),
        torch.rand(shape),
    ]
    return *([tensor] * count for tensor in one), [torch.zeros(()) for _ in range(count)]


def common():
    """What every list form takes: a rate on the device, guards, hyper-parameters."""
    return {
        "lr": torch.tensor(1e-2),
        "grad_scale": torch.ones(1),
        "found_inf": torch.zeros(1),
        "skipped": torch.zeros((), dtype=torch.int64),
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
    }


def coded(moments):
    """Codes and largest values of first and second moments that share their memory, as lists."""
    (m, m_absmax), (v, v_absmax) = (
        reference.quantize_blockwise(tensors[0], signed=signed, by_row=True) for tensors, signed in zip(moments, (True, False))
    )
    return [[tensor] * len(moments[0]) for tensor in (m, v, m_absmax, v_absmax)]


def as_int4(dense):
    """A list of bases as codes, scales and offsets."""
    parts = reference.quantize_int4(torch.linalg.qr(dense[0].float()).Q.contiguous())
    return [[part] * len(dense) for part in parts]


def run(form, *lists, left, **options):
    """A named step over the launcher."""
    return functools.partial(bound(form, kernel_step), *lists, left=left, **options, **common())


def galore_step(lists, left):
    return run("galore_step.list", *lists, scale=0.25, left=left)


def apollo_step(lists, left):
    *tensors, steps = lists
    return run("apollo_step.list", *tensors, [torch.tensor(0.5) for _ in steps], steps, scale=1.0, left=left)


def fira_step(lists, left):
    *tensors, steps = lists
    return run("fira_step.list", *tensors, [torch.tensor(0.5) for _ in steps], [], steps, alpha=0.25, left=left)


def frugal_step(lists, left):
    return run("frugal_step.list", *lists, scale=1.0, residual_scale=0.1, sign=True, left=left)


def galore_step_8bit(lists, left):
    *tensors, m, v, steps = lists
    return run("galore_step_8bit.list", *tensors, *coded((m, v)), steps, scale=0.25, left=left)


def qgalore_step(lists, left):
    params, grads, bases, m, v, steps = lists
    weights = [[part] * len(params) for part in reference.quantize_int8(params[0].float())]
    tensors = (*weights, grads, *as_int4(bases), *coded((m, v)), steps)
    return run("qgalore_step.list", *tensors, scale=0.25, left=left, seed=1, parameters=list(range(len(steps))))


def fira_step_8bit(lists, left):
    """Ratios on 8-bit moments and a basis in INT4: the most launches that a step has."""
    params, grads, bases, m, v, steps = lists
    basis, scales, offsets = as_int4(bases)
    states = sum(coded((m, v)), []) + [torch.tensor(0.5) for _ in steps]
    policies = {"weight": "float", "basis": "int4", "moments": "8bit", "rule": "ratio-adam", "remainder": "scaled-residual"}
    tensors = (params, [], grads, basis, scales + offsets, states, steps)
    return functools.partial(kernel_step, *tensors, scale=0.25, left=left, **policies, **common())


# A step, and its launches a matrix at most.
STEPS = {galore_step: 2, galore_step_8bit: 3, qgalore_step: 3, apollo_step: 3, fira_step: 3, frugal_step: 3, fira_step_8bit: 6}


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("number", [1, MANY])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_step_launches_little(count, step, number, left, note):
    function = step(matrices(number, left=left), left)
    kernels, ops = count(function)
    assert kernels["scalars_kernel"] == 1
    assert sum(kernels.values()) + sum(ops.values()) <= STEPS[step] * number + CONSTANT, (kernels, ops)
    if not set(ops) - {"stack", "_foreach_add_"}:  # nothing computes on the host in a kernel's place
        calls = max(3, 100 // number)
        start = time.process_time()
        for _ in range(calls):
            function()
        spent = (time.process_time() - start) / calls / number
        note(f"host: {1e6 * spent:.0f} us a matrix for {step.__name__} of {number}, {'left' if left else 'right'}, no driver")


def test_any_number_of_matrices_is_served_by_one_form(count):
    """Several small matrices of one shape; one alone, which may be large, has a form of its own."""
    for number in (2, 3, 7, 9):
        kernels, _ = count(galore_step(matrices(number), True))
        assert kernels["project_kernel"] == kernels["apply_kernel"] == -(-number // configs.MOST)
    alone = {"project_kernel", "apply_kernel"}  # the ninth
    assert {name: len(found) for name, found in count.forms.items()} == {"scalars_kernel": 1} | dict.fromkeys(alone, 2)
