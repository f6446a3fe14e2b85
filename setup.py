"""Builds `uvc_kernels._C` from csrc/ (PyTorch's stable ABI only); everything else stands in pyproject.toml.

Without a C++ compiler the install still succeeds: plain PyTorch then serves, and `uvc doctor` says so.
"""

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

PROBE = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>{}.size()); }\n"
# The oldest torch whose stable ABI the sources may use: 2.10.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


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


def extensions() -> list:
    """The extension, or nothing (and one warning) when no C++ compiler works here."""
    if (error := compiler_error()) is not None:
        print(
            f"WARNING: no working C++ compiler ({error}); uvc_kernels is installed without its C++ kernels "
            "and runs on plain PyTorch. Install g++ and reinstall to get them.",
            file=sys.stderr,
        )
        return []
    sources = sorted(str(p) for p in Path("csrc").rglob("*.cpp"))
    headers = sorted(str(p) for pattern in ("*.h", "*.inc") for p in Path("csrc").rglob(pattern))
    flags = [
        "-O3",
        "-std=c++20",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-Wno-psabi",
    ]
    return [
        CppExtension(
            "uvc_kernels._C",
            sources,
            depends=headers,
            include_dirs=[str(Path("csrc").resolve())],
            extra_compile_args={"cxx": [*flags, STABLE_ABI]},
            extra_link_args=["-s"] if sysconfig.get_platform().startswith("linux") else [],
            py_limited_api=True,
        )
    ]


setup(
    packages=[
        "uvc",
        *find_packages(include=["uvc.*"]),
        "uvc_kernels",
        "uvc_kernels.packed",
        "uvc_kernels.triton",
    ],
    package_dir={"uvc_kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
