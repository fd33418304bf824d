"""Build of the C++ extension and the list of packages; all metadata are in pyproject.toml.

Environment:
    HSWQ_BUILD_CPP=0  leave the extension out; hswq then computes with its torch reference.
    HSWQ_WERROR=1     compiler warnings are errors.
"""

from __future__ import annotations

import os
import platform
import shutil
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}

# One loop must give the same bits at every instruction set, so no contraction into fused
# multiply-add. -fno-trapping-math and -fno-math-errno change no value; they let selects between
# floats be vectorised and rounding to an integer be one instruction.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wpedantic",
    "-Wshadow",
]

ISA_FLAGS = {"baseline": []}
if IS_X86:
    ISA_FLAGS["avx2"] = ["-mavx2"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


class BuildExtension(build_ext):
    """Compiles each ISA file with its own flags, then the rest as usual."""

    def build_extension(self, extension: Extension) -> None:
        self._check_compiler()
        for isa, flags in ISA_FLAGS.items():
            extension.extra_objects += self.compiler.compile(
                [f"csrc/isa_{isa}.cpp"],
                output_dir=self.build_temp,
                extra_postargs=extension.extra_compile_args + flags,
                depends=extension.depends,
            )
        super().build_extension(extension)

    def _check_compiler(self) -> None:
        cure = (
            "Install GCC 9 or newer or Clang (Debian: apt install g++), or set HSWQ_BUILD_CPP=0 "
            "to install hswq without its compiled kernels; it is then many times slower on the CPU."
        )
        if self.compiler.compiler_type != "unix":
            raise PlatformError(
                f"hswq's C++ kernels need GCC or Clang, not '{self.compiler.compiler_type}'. {cure}"
            )
        program = self.compiler.compiler_cxx[0]
        if shutil.which(program) is None:
            raise PlatformError(f"the C++ compiler '{program}' was not found. {cure}")


def extensions() -> list[Extension]:
    """The extension, or nothing with HSWQ_BUILD_CPP=0."""
    if os.environ.get("HSWQ_BUILD_CPP", "1") == "0":
        return []
    import pybind11

    # As system headers, so that their warnings are not ours.
    flags = [*FLAGS, "-isystem", pybind11.get_include()]
    if os.environ.get("HSWQ_WERROR", "0") == "1":
        flags.append("-Werror")
    return [
        Extension(
            "hswq.kernels._cpp",
            sources=[name for name in sorted(glob("csrc/*.cpp")) if "/isa_" not in name],
            # Changed flags rebuild too.
            depends=["setup.py", *sorted(glob("csrc/*.h")), *sorted(glob("csrc/*.inl"))],
            define_macros=[("HSWQ_X86", "1")] if IS_X86 else [],
            extra_compile_args=flags,
            extra_link_args=["-pthread", "-ldl"],
            language="c++",
        )
    ]


# The tests read the flags above from this file.
if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["hswq", "hswq.*"]), "hswq.kernels.triton_backend"],
        # The folder is not called hswq/kernels/triton_backend, since kernels/ is the source tree of
        # all Triton kernels and must not be a package of its own: one named `kernels` exists on
        # PyPI.
        package_dir={"hswq.kernels.triton_backend": "kernels/triton_backend"},
        package_data={
            "hswq": ["py.typed"],
            "hswq.calibration": ["prompts.txt"],
            "hswq.models": ["assets/**/*"],
        },
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
    )
