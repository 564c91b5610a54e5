"""Stand-ins for the peers' packages, each in a process that has imported none of them."""

import subprocess
import sys

import pytest

PRELUDE = """
import importlib.metadata, importlib.util, torch
from lowrank_sys.integrations import shims
shims.install()
w = torch.nn.Parameter(torch.randn(16, 24)); b = torch.nn.Parameter(torch.randn(16))
def train(cls, **keys):
    low_rank = {"params": [w], "rank": 4, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std", **keys}
    optimizer = cls([{"params": [b]}, low_rank], lr=1e-2)
    before = w.detach().clone(), b.detach().clone()
    for _ in range(3):
        ((w.sum(1) + b) ** 2).sum().backward(); optimizer.step(); optimizer.zero_grad()
    assert not torch.equal(w, before[0]) and not torch.equal(b, before[1])
    return optimizer
"""


def python(code):
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packages_are_found_imported_and_trained_by():
    """As LLaMA-Factory, transformers, ms-swift and axolotl ask for them."""
    python("""
for name, version in (("galore_torch", "1.0"), ("apollo-torch", "1.0.3"), ("q_galore_torch", "1.0")):
    assert importlib.metadata.version(name) == version
    assert importlib.util.find_spec(name.replace("-", "_")) is not None
from transformers.utils.versions import require_version
require_version("galore_torch"); require_version("apollo_torch>=1.0")
from transformers.utils import is_galore_torch_available, is_apollo_torch_available
assert is_galore_torch_available() and is_apollo_torch_available()

import lowrank_sys.optim as ours
from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from apollo_torch import APOLLOAdamW
from q_galore_torch import QGaLoreAdamW8bit
from q_galore_torch.q_galore_adamw8bit import AdamW8bit
import q_galore_torch.q_galore_adamw8bit as module
assert AdamW8bit is QGaLoreAdamW8bit is module.AdamW8bit
assert isinstance(train(GaLoreAdamW), ours.GaLoreAdamW) and train(GaLoreAdamW).param_groups[1]["eps"] == 1e-6
assert isinstance(train(GaLoreAdamW8bit), ours.GaLoreAdamW8bit)
assert isinstance(train(APOLLOAdamW, proj="random", scale_type="channel", scale_front=True), ours.APOLLOAdamW)
quantized = {"quant": True, "quant_n_bit": 4, "quant_group_size": 32, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
assert train(QGaLoreAdamW8bit, **quantized).state[w]["basis"].dtype == torch.uint8
GaLoreAdafactor([{"params": [w], "rank": 4}], lr=1e-2, relative_step=False, scale_parameter=False)
""")


def test_bad_input():
    python("""
import galore_torch, re
for cls, keys, wanted in (
    (galore_torch.GaLoreAdamW, {"correct_bias": False}, "correct_bias must be True .*, got False"),
    (galore_torch.GaLoreAdamW8bit, {"amsgrad": True}, "amsgrad must be False .*, got True"),
    (galore_torch.GaLoreAdamW8bit, {"percentile_clipping": 5}, "percentile_clipping must be 100 .*, got 5"),
):
    try:
        cls([w], **keys)
    except ValueError as error:
        assert re.search(wanted, str(error)), error
    else:
        raise AssertionError(cls)
""")


def test_a_package_that_was_imported_is_not_replaced():
    pytest.importorskip("galore_torch")
    python("""
shims.uninstall()
assert importlib.metadata.version("galore_torch") == "1.0"
import galore_torch
assert galore_torch.__file__
try:
    shims.install()
except RuntimeError as error:
    assert "galore_torch" in str(error)
else:
    raise AssertionError
""")
