"""The version, and how this package is installed."""

__version__ = "0.1.0"
# no package index has it: the name there is free for anybody to take, so that nobody is told to install it from one
HOW_TO_INSTALL = (
    f"Needs the package sparse_hf, {__version__} or later, installed from its source: `pip install path/to/sparse_hf`."
)
