import runpy
from pathlib import Path

from setuptools import find_packages, setup

version = runpy.run_path("sparse_hf/version.py")["__version__"]

train = ["accelerate>=1.10", "datasets>=4.0", "peft>=0.18", "rouge-score>=0.1.2", "scikit-learn>=1.5"]
evaluate = ["datasets>=4.0", "evaluate>=0.4.6", "scikit-learn>=1.5"]
# Transformers reads such files by accelerate
gguf = ["gguf>=0.19", "accelerate>=1.10"]

setup(
    name="sparse-hf",
    version=version,
    description="Sparse attention for Hugging Face Transformers: one pattern language, exact on every backend",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["sparse_hf", "sparse_hf.*"]),
    package_data={"sparse_hf": ["py.typed", "*.pyi"], "sparse_hf.models": ["*.pyi", "derived/*.json"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "transformers>=5.17", "safetensors>=0.5", "huggingface_hub>=1.0", "typer>=0.15", "rich>=13"],
    extras_require={
        "train": train,
        "eval": evaluate,
        "gguf": gguf,
        # run with 4.0.0b16 and 4.0.0b36
        "flash": ["flash-attn-4>=4.0.0b16"],
        "plot": ["matplotlib>=3.9"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings-python>=2.0", "ruff>=0.12"],
        "dev": [
            *train, *evaluate, *gguf, "basedpyright>=1.39", "fastapi>=0.115", "hypothesis>=6.100", "matplotlib>=3.9", "openai>=1.98",
            "parameterized>=0.9", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12", "sentence-transformers>=5.2",
            "triton>=3.6; platform_system == 'Linux'", "uvicorn>=0.30",
        ],
    },
    entry_points={"console_scripts": ["sparse-hf = sparse_hf.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)  # fmt: skip
