"""The native kernel: plain C++17 and Python's stable interface, no torch; the rest of the project is in pyproject.toml.

One build serves every Python from 3.10 on (abi3).  `optional`: where there is no compiler, or it fails, the package
installs without the kernel, and `w8a8 doctor` says so.
"""

from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("src/w8a8/kernels/csrc")

setup(
    ext_modules=[
        Extension(
            "w8a8.kernels._native",
            sources=sorted(str(path) for path in CSRC.rglob("*.cpp")),
            depends=sorted(str(path) for path in CSRC.rglob("*.h")),
            include_dirs=[str(CSRC)],
            # the contract has no fused multiply-add and no shortcut through a reciprocal
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fno-fast-math",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            libraries=["dl"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
