"""`python -m sparse_hf` is the command `sparse-hf`."""

from .cli import main

if __name__ == "__main__":
    main()
