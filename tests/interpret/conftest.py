"""The kernels against the oracle: in Triton's interpreter on the CPU, or compiled on a GPU where there is one."""

import pathlib
import types

import numpy as np
import pytest
import torch
import triton

from lowrank_sys import _ops, reference

INTERPRETED = bool(triton.knobs.runtime.interpret)
HERE = pathlib.Path(__file__).parent
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.25}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE not in item.path.parents:
            continue
        # NaN gradients are the point of some tests; numpy, which the interpreter runs on, warns of them.
        item.add_marker(pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered"))
        if not INTERPRETED and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="Triton kernels need a GPU, or TRITON_INTERPRET=1 before Python starts"))
        elif not INTERPRETED and "meter" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="memory accesses are counted only in the interpreter: TRITON_INTERPRET=1"))


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Uninitialised memory holds NaN."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


GUARD = 64


def guarded(tensor):
    """A copy of `tensor` inside a larger buffer of sevens; returns (view, buffer)."""
    buffer = torch.full((tensor.numel() + 2 * GUARD,), 7, dtype=tensor.dtype, device=tensor.device)
    view = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view, buffer


class Case:
    """Tensors of one matrix on `device`, all guarded, and the same in fp64 for the oracle."""

    names = ("param", "grad", "basis", "exp_avg", "exp_avg_sq")

    def __init__(self, device, m, n, r, left, param=torch.float32, grad=torch.float32, basis=torch.float32, seed=0):
        draw = torch.Generator().manual_seed(seed)
        d = m if left else n
        values = {
            "param": torch.randn(m, n, generator=draw).to(param),
            "grad": torch.randn(m, n, generator=draw).to(grad),
            "basis": (torch.randn(d, r, generator=draw) / max(1, d) ** 0.5).to(basis),
        }
        self.left, self.r = left, r
        shape = _ops.low_rank_shape(values["grad"], values["basis"], left)
        values["exp_avg"] = torch.randn(shape, generator=draw) * 0.1
        values["exp_avg_sq"] = torch.rand(shape, generator=draw) * 0.1 + 0.01
        values["low_rank"] = torch.randn(shape, generator=draw)
        for name, value in values.items():
            self.put(name, value.to(device))

    def put(self, name, value):
        """Replace a tensor, and the oracle's copy with it."""
        view, buffer = guarded(value)
        setattr(self, name, view)
        self.__dict__.setdefault("buffers", {})[name] = buffer
        self.__dict__.setdefault("wants", {})[name] = value.double().cpu()

    def tensors(self, gradient="grad"):
        return self.param, getattr(self, gradient), self.basis, self.exp_avg, self.exp_avg_sq

    def oracle(self, gradient="grad", *, grad_scale=1.0, step, lr=1e-2):
        """Run the oracle's step on the fp64 copies."""
        want = self.wants
        reference.named("galore_step" if gradient == "grad" else "subspace_step")(
            want["param"],
            want[gradient] * grad_scale,
            want["basis"],
            want["exp_avg"],
            want["exp_avg_sq"],
            step=step,
            lr=lr,
            left=self.left,
            **HYPER,
        )

    def check_guards(self):
        for name, buffer in self.buffers.items():
            edges = torch.cat((buffer[:GUARD], buffer[-GUARD:]))
            assert (edges == 7).all(), f"{name}: written outside of the tensor"

    def check(self, before):
        """Everything matches the oracle. `before` is the weight before the step."""
        depth = self.wants["basis"].shape[0]
        for name in ("exp_avg", "exp_avg_sq"):
            assert_close(name, getattr(self, name), self.wants[name], rtol=1e-6, atol=4e-7 * max(1, depth) ** 0.5)
        moved = (self.wants["param"] - before.double().cpu()).abs().max().item() if before.numel() else 0.0
        # One rounding of the weight, and the update's own precision: fp32 sums, or X in the basis' 16-bit type.
        relative = 2e-6 * self.r**0.5 if self.basis.dtype == torch.float32 else torch.finfo(self.basis.dtype).eps
        assert_close(
            "param", self.param, self.wants["param"], rtol=torch.finfo(self.param.dtype).eps, atol=max(relative * moved, 1e-7)
        )
        self.check_guards()


def assert_close(name, got, want, *, rtol, atol):
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    bad = ~((got - want).abs() <= atol + rtol * want.abs()) & ~(got.isnan() & want.isnan()) & (got != want)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} differ, largest {(got - want).abs().max():.3g}; "
            f"first at {first}: {got[first]:.9g}, expected {want[first]:.9g}"
        )


@pytest.fixture
def lane(device):
    """What the tests share; `put` makes a copy of a tensor whose surroundings `check_guards` looks at."""
    buffers = []

    def put(tensor):
        view, buffer = guarded(tensor)
        buffers.append(buffer)
        return view

    def check_guards():
        for buffer in buffers:
            assert (torch.cat((buffer[:GUARD], buffer[-GUARD:])) == 7).all(), "written outside of a tensor"

    return types.SimpleNamespace(
        device=device,
        put=put,
        check_guards=check_guards,
        hyper=HYPER,
        interpreted=INTERPRETED,
        assert_close=assert_close,
        case=lambda *args, **kwargs: Case(device, *args, **kwargs),
    )


@pytest.fixture(autouse=True)
def launches(monkeypatch, count, request):
    """Counts the kernels and configurations that are interpreted."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    launch, metered = interpreter.GridExecutor.__call__, "meter" in request.fixturenames

    def counted(self, *args, **kwargs):
        configuration = sorted((name, value) for name, value in kwargs.items() if name.isupper() or name.startswith("num_"))
        for what in ("launch", "traffic") if metered else ("launch",):
            count(what, self.fn.__name__, str(configuration))
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)


class Meter:
    """How often each element of each argument of each launch is loaded and stored."""

    def __init__(self):
        self.launches = []

    def begin(self, kernel, arguments):
        # An argument is a tensor or a tuple with one a matrix; the elements of a tuple are counted as one.
        groups = {name: value if isinstance(value, tuple) else (value,) for name, value in arguments.items()}
        groups = {name: group for name, group in groups.items() if all(isinstance(t, torch.Tensor) for t in group)}
        self.spans, counts = [], {}
        for name, group in groups.items():
            total = sum(t.numel() for t in group)
            counts[name] = {"loaded": np.zeros(total, np.int64), "stored": np.zeros(total, np.int64)}
            first = 0
            for t in group:
                self.spans.append((name, t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), t.element_size(), first))
                first += t.numel()
        self.launches.append(types.SimpleNamespace(kernel=kernel, counts=counts, itemsize={s[0]: s[3] for s in self.spans}))

    def touch(self, kind, pointers, mask):
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].reshape(-1)
        if not addresses.size:
            return
        for name, start, end, size, first in self.spans:
            if start <= addresses[0] < end:
                index = first + ((addresses - np.uint64(start)) // np.uint64(size)).astype(np.int64)
                assert addresses.min() >= start and addresses.max() < end, f"{kind} outside of {name}"
                np.add.at(self.launches[-1].counts[name][kind], index, 1)
                return
        raise AssertionError(f"{self.launches[-1].kernel}: {kind} outside of every argument")

    def bytes(self, launch, name):
        """(loaded, stored) of one argument, (0, 0) where it was not given."""
        if name not in launch.counts:
            return 0, 0
        return tuple(int(launch.counts[name][kind].sum()) * launch.itemsize[name] for kind in ("loaded", "stored"))


@pytest.fixture
def meter(monkeypatch, launches):
    from triton.runtime import interpreter

    meter = Meter()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    launch = executor.__call__

    def counted_load(self, pointers, mask, *rest):
        meter.touch("loaded", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        meter.touch("stored", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_atomic(self, operation, pointers, value, mask, *rest):
        meter.touch("loaded", pointers, mask)
        meter.touch("stored", pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def counted_launch(self, *args, **kwargs):
        meter.begin(self.fn.__name__, kwargs)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", counted_atomic)
    monkeypatch.setattr(executor, "__call__", counted_launch)
    return meter
