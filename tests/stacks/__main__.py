"""Every stack that people train by, as PyPI has it: python tests/stacks [NAME ...]

The stacks pin each other away, so each has an environment of its own, .stacks/NAME, built once from the table below; none holds the
peers that this package stands in for. In it run the tests of that stack, which count our classes and ops. Exit status 1 where one
fails. TORCH: what is installed as torch (torch==2.13.0), the build for CPUs with
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".stacks"
TORCH = os.environ.get("TORCH", "torch==2.13.0")  # the newest that axolotl takes
# No telemetry, and nothing but packages from the network.
ALONE = {"DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
TESTER = ["pytest", "setuptools>=77", "packaging", "numpy"]


class Stack(NamedTuple):
    """packages: as pip takes them. bare: those that come without what they ask for, of which `packages` has what training needs:
    the rest is user interfaces, other modalities, clouds and CUDA. tests: under tests/, run as named. only: pytest's -k."""

    tests: tuple[str, ...]
    packages: str
    bare: str = ""
    only: str = ""


TRAINER = ("cpu/test_integration_transformers.py", "cpu/test_integration_shims.py", "cpu/test_finetune.py")
STACKS = {
    # the two ends of what pyproject.toml says
    "transformers-oldest": Stack(
        (*TRAINER, "cpu/test_data_sets.py"),
        "transformers==5.2.0 datasets==4.0.0 accelerate==1.11.0 matplotlib",
        only="not bad_data_sets",  # datasets 4.0 says otherwise what is wrong
    ),
    "transformers-newest": Stack(TRAINER, "transformers datasets accelerate matplotlib"),
    "lightning": Stack(("cpu/test_examples.py",), "lightning transformers", only="lightning"),
    "accelerate": Stack(("cpu/test_examples.py",), "accelerate transformers", only="accelerate"),
    "peft": Stack(("stacks/stack_peft.py",), "peft transformers accelerate datasets"),
    "llamafactory": Stack(
        ("stacks/stack_llamafactory.py",),
        """transformers==5.6.0 datasets==4.0.0 accelerate==1.11.0 peft==0.18.1 trl==0.24.0 einops fastapi fire hf-transfer
        matplotlib omegaconf pandas protobuf pydantic pyyaml safetensors scipy sentencepiece sse-starlette tiktoken
        torchdata<=0.11.0 tyro<0.9.0 uvicorn bitsandbytes""",
        bare="llamafactory==0.9.5",
    ),
    "ms-swift": Stack(
        ("stacks/stack_ms_swift.py",),
        """transformers<5.20 datasets<4.8.5 peft<0.21 trl<1.0 accelerate addict modelscope dacite einops json-repair simplejson
        sortedcontainers binpacking tiktoken sentencepiece safetensors tensorboard pandas pillow matplotlib nltk rouge
        scipy zstandard importlib-metadata""",
        bare="ms-swift==4.6.0",
    ),
    "axolotl": Stack(
        ("stacks/stack_axolotl.py",),
        """transformers==5.16.1 datasets==4.8.4 accelerate==1.13.0 peft==0.20.0 trl==1.9.0 tokenizers==0.23.1
        huggingface_hub==1.17.0 pydantic==2.12.5 addict fire PyYAML requests einops colorama typer==0.25.1 scipy python-dotenv
        schedulefree==1.4.1 sentencepiece zstandard==0.22.0 pillow evaluate wandb posthog mistral-common numba fastcore triton
        bitsandbytes torchao==0.17.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6""",
        bare="axolotl==0.19.0",
    ),
}


def python(name: str) -> str:
    return str(HOME / name / "bin" / "python")


def build(name: str) -> None:
    """The environment of a stack, unless it is there as the table says."""
    stack, ready = STACKS[name], HOME / name / ".ready"
    says = hashlib.sha256(repr((TORCH, TESTER, stack.packages, stack.bare)).encode()).hexdigest()
    if ready.is_file() and ready.read_text() == says:
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", HOME / name], check=True)
    pip = [sys.executable, "-m", "pip", "--python", python(name), "install", "-q", "--no-compile"]
    subprocess.run([*pip, TORCH], check=True)
    held = HOME / name / "held.txt"  # what is asked for next must not bring another torch, but may move what torch asks for
    said = "import importlib.metadata; print('torch==' + importlib.metadata.version('torch'))"
    held.write_text(subprocess.run([python(name), "-c", said], check=True, capture_output=True, text=True).stdout)
    subprocess.run([*pip, "-c", held, *TESTER, *stack.packages.split()], check=True)
    if stack.bare:
        subprocess.run([*pip, "--no-deps", *stack.bare.split()], check=True)
    ready.write_text(says)


def test(name: str) -> bool:
    stack = STACKS[name]
    files = [str(ROOT / "tests" / file) for file in (*stack.tests, "stacks/stack_versions.py")]
    only = ["-k", f"({stack.only}) or stack_versions"] if stack.only else []
    environment = {**os.environ, **ALONE, "PYTHONPATH": str(ROOT)}
    return subprocess.run([python(name), "-m", "pytest", "-q", *only, *files], cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STACKS)}; all by default")
    names = parser.parse_args().names or list(STACKS)
    if unknown := [name for name in names if name not in STACKS]:
        parser.error(f"no stack {', '.join(unknown)}; there are {', '.join(STACKS)}")
    results = {}
    for name in names:
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        build(name)
        results[name] = test(name), time.perf_counter() - start
    for name, (passed, seconds) in results.items():
        print(f"{'passed' if passed else 'FAILED'}  {name}, {seconds:.0f} s")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
