"""Builds the native modules with CMake and ninja; everything else is in pyproject.toml.

LOWRANK_NATIVE=0 installs pure Python, LOWRANK_CUDA=0 leaves CUDA out, 1 demands it and labels the version (0.1.0+cu13),
LOWRANK_CUDA_ARCHS="80;90" builds for these compute capabilities instead of CUDA_ARCHS, MAX_JOBS bounds the build.
"""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")


def torch_package():
    """Folder, version and CUDA version (None for a CPU build) of torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        sys.exit("lowrank: torch is not installed: pip install 'torch>=2.11' first")
    version = runpy.run_path(os.path.join(os.path.dirname(spec.origin), "version.py"))
    return Path(spec.origin).parent, str(version["__version__"]), version["cuda"]


def find_compiler():
    """The first compiler that knows C++20."""
    for name in [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]:
        command = [shutil.which(name), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
        found = command[0] and subprocess.run(command, input="#include <barrier>\n", text=True, capture_output=True)
        if found and found.returncode == 0:
            return command[0]
    return None


def run_tool(command):
    """What a command prints, on either stream."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def find_nvcc(torch_folder, major):
    """nvcc on PATH, in CUDA_HOME, or of the PyPI package nvidia-cuda-nvcc."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), torch_folder.parent / "nvidia" / f"cu{major}"]
    candidates = [shutil.which("nvcc")] + [str(Path(home) / "bin" / "nvcc") for home in homes]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def cuda_archs(nvcc):
    """Compute capabilities to build for, oldest first: those of LOWRANK_CUDA_ARCHS, else those of CUDA_ARCHS that nvcc knows."""
    listed = re.findall(r"compute_(\d+)$", run_tool([nvcc, "--list-gpu-arch"]), re.MULTILINE)
    known = {arch for arch in listed if int(arch) >= int(CUDA_ARCHS[0])}
    wish = os.environ.get("LOWRANK_CUDA_ARCHS", "")
    if not wish:
        return [arch for arch in CUDA_ARCHS if arch in known]
    if not known.issuperset(archs := wish.split(";")):
        valid = ", ".join(sorted(known, key=int))
        sys.exit(f"lowrank: LOWRANK_CUDA_ARCHS must be compute capabilities such as '90' or '80;90', got {wish!r}; valid: {valid}")
    return sorted(set(archs), key=int)


def cuda_options(torch_folder, torch_cuda):
    """CMake options of the CUDA half; without it, LOWRANK_CUDA_NOTE says why."""
    wish = os.environ.get("LOWRANK_CUDA", "")
    if wish == "0":
        return {"LOWRANK_CUDA_NOTE": "left out by LOWRANK_CUDA=0"}
    if torch_cuda is None:
        note = "torch is a CPU build"
    else:
        major = torch_cuda.partition(".")[0]
        nvcc = find_nvcc(torch_folder, major)
        if nvcc:
            libraries = re.findall(r'-L([^"\s]+)', run_tool([nvcc, "--dryrun", "-x", "cu", os.devnull]))
            release = re.search(r"V([\d.]+)", run_tool([nvcc, "--version"])).group(1)
            return {
                "LOWRANK_NVCC": nvcc,
                "LOWRANK_CUDA_NOTE": f"nvcc {release}",
                "LOWRANK_CUDA_ARCHS": ";".join(cuda_archs(nvcc)),
                "LOWRANK_CUDA_LIBS": ";".join(libraries),
            }
        # PyPI has the compiler itself from CUDA 13 on.
        get = f"pip install 'nvidia-cuda-nvcc=={major}.*'" if int(major) >= 13 else f"install the CUDA {major} toolkit"
        note = f"no nvcc; to get it: {get}, then install lowrank-sys again"
        print(f"lowrank: torch has CUDA {torch_cuda}, but this builds for the CPU alone: {note}", file=sys.stderr)
    if wish == "1":
        sys.exit(f"lowrank: LOWRANK_CUDA=1, but {note}")
    return {"LOWRANK_CUDA_NOTE": note}


class Build(build_ext):
    """One CMake build instead of an extension at a time: into the source tree if editable, else into the wheel."""

    def run(self):
        in_tree = self.inplace or self.editable_mode
        package = ROOT / "lowrank_sys" if in_tree else Path(self.build_lib).resolve() / "lowrank_sys"
        unwanted = os.environ.get("LOWRANK_NATIVE") == "0"
        if unwanted or (compiler := find_compiler()) is None:
            why = "LOWRANK_NATIVE=0" if unwanted else "no C++20 compiler found"
            print(f"lowrank: {why}: installing pure Python, the reference serves every op", file=sys.stderr)
            package.mkdir(parents=True, exist_ok=True)
            for module in package.glob("*.so"):
                module.unlink()
            (package / "_build.json").write_text(json.dumps({"compiler": None, "reason": why}, indent=2) + "\n")
            return
        torch_folder, torch_version, torch_cuda = torch_package()
        options = {
            "CMAKE_CXX_COMPILER": compiler,
            "LOWRANK_OPS": "ON",
            "LOWRANK_OUTPUT": package,
            "LOWRANK_TORCH": torch_folder,
            "LOWRANK_TORCH_VERSION": torch_version,
            "LOWRANK_PYTHON_INCLUDE": sysconfig.get_path("include"),
            **cuda_options(torch_folder, torch_cuda),
        }
        if "LOWRANK_NVCC" not in options:
            (package / "_cuda.abi3.so").unlink(missing_ok=True)  # an earlier build's
        if in_tree:  # _host is for the tests and, unlike _C, good for one version of Python
            import pybind11

            options |= {
                "LOWRANK_HOST": "ON",
                "LOWRANK_PYBIND11_INCLUDE": pybind11.get_include(),
                "LOWRANK_HOST_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            }
        build = ROOT / "build" / ("native-in-tree" if in_tree else "native-wheel")
        # cmake and ninja of this environment, activated or not
        environment = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])}
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        for command in (["--fresh", "-G", "Ninja", "-S", ROOT, "-B", build, *definitions], ["--build", build, "--parallel", jobs]):
            subprocess.run(["cmake", *command], check=True, env=environment)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


def label():
    """Local version of a build that must have CUDA, which sets its wheel apart: +cu13."""
    cuda = torch_package()[2] if os.environ.get("LOWRANK_CUDA") == "1" else None
    return f"+cu{cuda.partition('.')[0]}" if cuda else ""


setup(
    ext_modules=[Extension("lowrank_sys._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "egg_info": {"tag_build": label()}},
)
