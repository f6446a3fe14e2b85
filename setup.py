"""Builds `uvc_kernels._C` from csrc/ (PyTorch's stable ABI only); everything else stands in pyproject.toml.

Without a C++ compiler the install still succeeds: plain PyTorch then serves, and `uvc doctor` says so. CUDA
is built where nvcc is found; no GPU is needed. From the environment:
    UVC_BUILD_CUDA=0|1      never build CUDA; fail when it cannot be built
    TORCH_CUDA_ARCH_LIST    for which GPUs, e.g. "8.0;9.0+PTX". Default: those that are visible; else machine
                            code for 9.0, and PTX that the driver of any other GPU from 8.0 on compiles
    UVC_SANITIZE=1          AddressSanitizer and UndefinedBehaviorSanitizer in the C++, without CUDA
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, get_cxx_compiler

PROBE = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>{}.size()); }\n"
# The oldest torch whose stable ABI the sources may use: 2.10.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# What `nvcc` compiles; the other .cu files are parts of these.
CUDA_SOURCES = ["most.cu", "attention_backward.cu"]
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
]


def compiler_error() -> str | None:
    """None when a C++ compiler can build and link a small program, else one line that says why not."""
    compiler = get_cxx_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        try:
            command = [*compiler.split(), str(source), "-o", str(Path(folder, "probe"))]
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"{compiler}: {error.strerror}"
    return (
        None if done.returncode == 0 else f"{compiler}: {(done.stderr.strip() or 'failed').splitlines()[0]}"
    )


def architectures() -> list[str]:
    """nvcc's flags for the GPUs to build for; [] when none of those asked for can run the kernels."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted:
        found = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", wanted)
    else:
        visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        found = [(str(major), str(minor), "", "") for major, minor in sorted(visible)]
    if not found:
        # The kernels use nothing that came after 8.0, so its PTX is all that another GPU needs.
        return ["-gencode=arch=compute_80,code=[compute_80,sm_90]"]
    flags = []
    for major, minor, suffix, ptx in found:
        number = f"{major}{minor}{suffix}"
        if int(major) >= 8:
            codes = f"[compute_{number},sm_{number}]" if ptx else f"sm_{number}"
            flags.append(f"-gencode=arch=compute_{number},code={codes}")
    return flags


def nvcc() -> Path | None:
    """The compiler that torch's build tools use."""
    found = Path(CUDA_HOME or "/nonexistent", "bin", "nvcc")
    return found if found.exists() else None


def cuda_runtime() -> list[str]:
    """The linker's flags for the CUDA runtime: static, so that the library loads where there is no CUDA."""
    # nvcc may be a link or a script; what it would do names the folders of its libraries.
    command = [nvcc(), "--dryrun", "-x", "cu", "/dev/null"]
    plan = subprocess.run(command, capture_output=True, text=True).stderr
    folders = (Path(name) for name in re.findall(r'"-L([^"]+)"', plan))
    found = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    return [] if found is None else [f"-L{found.resolve()}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def cuda_error() -> str | None:
    """None when the CUDA sources can be built, else one line that says why not."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    compiler, major = nvcc(), torch.version.cuda.split(".")[0]
    if compiler is None:
        return "no nvcc was found; install the CUDA toolkit, or set CUDA_HOME"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    if f"release {major}." not in version:
        return f"{compiler} is not of CUDA {major}, for which this torch is built"
    if not cuda_runtime():
        return f"libcudart_static.a was not found beside {compiler}"
    if not architectures():
        return "the kernels need GPUs of compute capability 8.0 or later"
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "probe.cu"), Path(folder, "probe.o")
        source.write_text("#include <vector>\n__global__ void probe() {}\n")
        command = [compiler, "-std=c++20", *architectures(), "-c", source, "-o", out]
        done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line]
    return None if done.returncode == 0 else f"{compiler}: {(lines or ['failed'])[0]}"


def cuda_sources() -> list[str]:
    """The CUDA sources to build: none where that cannot be done; SystemExit when it was asked for."""
    choice = os.environ.get("UVC_BUILD_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"UVC_BUILD_CUDA must be 0 or 1, got {choice!r}")
    error = "UVC_BUILD_CUDA=0" if choice == "0" else cuda_error()
    if error is None:
        return [f"csrc/cuda/{name}" for name in CUDA_SOURCES]
    if choice == "1":
        raise SystemExit(f"UVC_BUILD_CUDA=1 asks for the CUDA kernels, which cannot be built: {error}")
    print(f"uvc_kernels is built without its CUDA kernels: {error}", file=sys.stderr)
    return []


def extensions() -> list:
    """The extension, or nothing (and one warning) when no C++ compiler works here."""
    if (error := compiler_error()) is not None:
        print(
            f"WARNING: no working C++ compiler ({error}); uvc_kernels is installed without its C++ kernels "
            "and runs on plain PyTorch. Install g++ and reinstall to get them.",
            file=sys.stderr,
        )
        return []
    sanitize = SANITIZE if os.environ.get("UVC_SANITIZE") == "1" else []
    cuda = [] if sanitize else cuda_sources()
    sources = sorted(str(p) for p in Path("csrc").rglob("*.cpp")) + cuda
    headers = sorted(str(p) for pattern in ("*.h", "*.inc", "*.cu") for p in Path("csrc").rglob(pattern))
    flags = [
        "-O1" if sanitize else "-O3",
        "-std=c++20",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
        *sanitize,
    ]
    link = sanitize or (["-s"] if sysconfig.get_platform().startswith("linux") else [])
    cuda_flags = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", STABLE_ABI]
    return [
        CppExtension(
            "uvc_kernels._C",
            sources,
            depends=headers,
            include_dirs=[str(Path("csrc").resolve())],
            extra_compile_args={
                "cxx": [*flags, STABLE_ABI],
                "nvcc": [*cuda_flags, *(architectures() if cuda else [])],
            },
            extra_link_args=[*link, *(cuda_runtime() if cuda else [])],
            py_limited_api=True,
        )
    ]


setup(
    packages=[
        "uvc",
        *find_packages(include=["uvc.*"]),
        "uvc_kernels",
        "uvc_kernels.compile_check",
        "uvc_kernels.packed",
        "uvc_kernels.triton",
    ],
    package_dir={"uvc_kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
