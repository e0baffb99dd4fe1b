"""Package metadata of megafish: the one place of it (tool settings stand in pyproject.toml)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version, which stands in megafish/__init__.py: importing the package here would need its dependencies."""
    text = (HERE / "megafish" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


setup(
    name="megafish",
    version=version(),
    description="Pretrain language models that cannot recite their training data, and prove it",
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
    # kernels/, configs/ and launch/ stand beside the package in the repository; installed, presets, profiles and
    # scripts lie inside it.
    packages=[
        *find_packages(include=["megafish", "megafish.*"]),
        *find_packages("kernels"),
        "megafish.configs",
        "megafish.launch",
    ],
    package_dir={
        "megafish_kernels": "kernels/megafish_kernels",
        "megafish.configs": "configs",
        "megafish.launch": "launch",
    },
    package_data={
        "megafish": ["py.typed", "audit/templates/*", "sweep/templates/*", "unlearn/bench/templates/*"],
        "megafish_kernels": ["py.typed"],
        "megafish.configs": ["*.yaml", "**/*.yaml"],
        "megafish.launch": ["*"],
    },
    entry_points={"console_scripts": ["megafish=megafish.cli:main"]},
    install_requires=[
        "torch>=2.8",
        "deepspeed>=0.19.4",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6",
        "typer>=0.12",
        "rich>=13",
        "sentencepiece>=0.2.3",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "pyarrow>=15",
        "zstandard>=0.22",
        "rouge-score>=0.1.2",
        "rapidfuzz>=3.6",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "tensorboard>=2.16",
        "psutil>=5.9",
    ],
    extras_require={
        # flash-attn compiles against the torch that is installed: pip install --no-build-isolation 'megafish[cuda]'
        "cuda": ["flash-attn>=2.6"],
        "wandb": ["wandb>=0.17"],
        "hf": ["transformers>=4.45"],
        "eval": ["lm-eval>=0.4.13"],
        "judges": ["sentence-transformers>=6"],
        "duplicates": ["tokengrams>=0.3.3"],
        # What benchmarks/kernels_static.py compiles beside our own kernels; Liger imports transformers.
        "bench": [
            "liger-kernel>=0.8.5; platform_system == 'Linux'",
            "cut-cross-entropy>=25.1.1; platform_system == 'Linux'",
            "transformers>=4.45",
        ],
        "dev": [
            # torch's CUDA wheel brings its own. For its interpreter and compiler on machines without a GPU.
            "triton>=3.7; platform_system == 'Linux'",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff",
            "mypy",
            "types-PyYAML",
            "transformers>=4.45",
            "wandb>=0.17",
            "lm-eval>=0.4.13",
            "sentence-transformers>=6",
            # Its wheels end with Python 3.11; from source it needs a Rust compiler.
            "tokengrams>=0.3.3; python_version < '3.12'",
            "accelerate>=1.1",  # lm-eval's own class for Hugging Face models, which the tests compare with
        ],
    },
)
