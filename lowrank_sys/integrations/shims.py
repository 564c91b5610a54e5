"""Stand-ins for the packages galore_torch, apollo_torch and q_galore_torch: for stacks that import them by name.

    from lowrank_sys.integrations import shims
    shims.install()

before the stack is imported. LLaMA-Factory and axolotl then train by this package's optimizers from their own YAML, and find the
distributions that they check for. The classes take the peers' arguments with the peers' defaults.
"""

import importlib.machinery
import importlib.metadata
import sys
import types
from typing import Any

from lowrank_sys.optim import APOLLOAdamW, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit


def _expect(name: str, value: Any, only: Any) -> None:
    if value != only:
        raise ValueError(f"{name} must be {only!r} for the stand-ins of lowrank_sys, got {value!r}")


class GaLoreAdamWOfPeer(GaLoreAdamW):
    """galore_torch.GaLoreAdamW: GaLoreAdamW with the peer's arguments; correct_bias must be True."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True, no_deprecation_warning=False
    ):
        _expect("correct_bias", correct_bias, True)
        super().__init__(params, lr, betas, eps, weight_decay)


class APOLLOAdamWOfPeer(APOLLOAdamW):
    """apollo_torch.APOLLOAdamW: APOLLOAdamW with the peer's arguments; correct_bias must be True.

    `scale_front` in a group, where LLaMA-Factory writes it, must be that of the optimizer.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True, scale_front=False,
        disable_nl=False, no_deprecation_warning=True,
    ):  # fmt: skip
        _expect("correct_bias", correct_bias, True)
        params = list(params)
        fronts = {group["scale_front"] for group in params if isinstance(group, dict) and "scale_front" in group}
        if len(fronts) > 1:
            raise ValueError(f"scale_front must be one for all groups, got {fronts}")
        scale_front = fronts.pop() if fronts else scale_front
        super().__init__(params, lr, betas, eps, weight_decay, scale_front=scale_front, disable_nl=disable_nl)


class _Peer8bit:
    """The arguments of galore_torch's and q_galore_torch's 8-bit classes, which are those of bitsandbytes.

    amsgrad must be False, percentile_clipping 100 and block_wise True; optim_bits and args are not read, as there; is_paged moves
    nothing.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, optim_bits=32, args=None,
        min_8bit_size=4096, percentile_clipping=100, block_wise=True, is_paged=False,
    ):  # fmt: skip
        for name, value, only in (
            ("amsgrad", amsgrad, False), ("percentile_clipping", percentile_clipping, 100), ("block_wise", block_wise, True),
        ):  # fmt: skip
            _expect(name, value, only)
        super().__init__(params, lr, betas, eps, weight_decay, min_8bit_size=min_8bit_size)


class GaLoreAdamW8bitOfPeer(_Peer8bit, GaLoreAdamW8bit):
    """galore_torch.GaLoreAdamW8bit."""


class QGaLoreAdamW8bitOfPeer(_Peer8bit, QGaLoreAdamW8bit):
    """q_galore_torch.QGaLoreAdamW8bit."""

    # axolotl rewrites the peer's class for newer releases of bitsandbytes unless it bears this mark.
    _axolotl_bnb050_patched = True


# Package: its version, and {module in it: {name of the class there: (class, name in the package)}}.
PACKAGES = {
    "galore_torch": ("1.0", {
        "adamw": {"AdamW": (GaLoreAdamWOfPeer, "GaLoreAdamW")},
        "adamw8bit": {"AdamW8bit": (GaLoreAdamW8bitOfPeer, "GaLoreAdamW8bit")},
        "adafactor": {"Adafactor": (GaLoreAdafactor, "GaLoreAdafactor")},
    }),
    "apollo_torch": ("1.0.3", {"apollo": {"AdamW": (APOLLOAdamWOfPeer, "APOLLOAdamW")}}),
    "q_galore_torch": ("1.0", {"q_galore_adamw8bit": {"AdamW8bit": (QGaLoreAdamW8bitOfPeer, "QGaLoreAdamW8bit")}}),
}  # fmt: skip


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, package):
        self._package = package

    def read_text(self, filename):
        version, _ = PACKAGES[self._package]
        return f"Metadata-Version: 2.1\nName: {self._package}\nVersion: {version}\n" if filename == "METADATA" else None

    def locate_file(self, path):
        return path


class _Finder(importlib.metadata.DistributionFinder):
    def find_spec(self, fullname, path=None, target=None):
        return None

    def find_distributions(self, context=None):
        name = None if context is None else context.name
        wanted = None if name is None else name.lower().replace("-", "_")
        return [_Distribution(package) for package in PACKAGES if wanted in (None, package)]


_FINDER = _Finder()


def install() -> None:
    """Put the stand-ins in the place of the packages, whether those are installed or not. Twice is once.

    Raises RuntimeError where one of the packages has been imported before: whoever has it would keep it.
    """
    if _FINDER in sys.meta_path:
        return
    if there := [package for package in PACKAGES if package in sys.modules]:
        raise RuntimeError(f"shims.install() must come before the first import of {', '.join(there)}")
    for package, (version, modules) in PACKAGES.items():
        _module(package, {"__version__": version, "__path__": []})
        for name, classes in modules.items():
            module = _module(f"{package}.{name}", {own: cls for own, (cls, _) in classes.items()})
            vars(sys.modules[package]).update({name: module, **{public: cls for cls, public in classes.values()}})
    sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Take the stand-ins away again; whoever has imported them keeps them."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]


def _module(name, names):
    module = types.ModuleType(name, f"Stand-in of lowrank_sys for {name}.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=__name__, is_package="__path__" in names)
    vars(module).update(names)
    sys.modules[name] = module
    return module
