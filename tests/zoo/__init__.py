"""Every model type of the installed Transformers, tried: `python -m tests.zoo`, which `make zoo` runs."""
