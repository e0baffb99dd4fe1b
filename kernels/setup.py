"""megafish_kernels on its own, without the trainer: `pip install ./kernels`. The trainer's package holds it as well."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent  # pip starts this file by a relative path


def version() -> str:
    """The trainer's, which stands in megafish/__init__.py beside this folder; in an sdist, that of its metadata."""
    beside = HERE.parent / "megafish" / "__init__.py"
    path, pattern = (
        (beside, r'^__version__ = "([^"]+)"$') if beside.exists() else (HERE / "PKG-INFO", r"^Version: (.+)$")
    )
    return re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)[1]


setup(
    name="megafish-kernels",
    version=version(),
    description="The goldfish mask and a linear cross-entropy that skips dropped tokens, for any PyTorch training loop",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(),
    package_data={"megafish_kernels": ["py.typed"]},
    install_requires=["torch>=2.8", "numpy>=1.26"],
    # torch's CUDA wheel brings triton. Named for machines without a GPU, to compile for one.
    extras_require={"triton": ["triton>=3.7; platform_system == 'Linux'"]},
)
