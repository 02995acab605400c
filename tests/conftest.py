"""What every test runs under."""

import pytest
import torch
from transformers.utils import logging

# as many processes as cores run side by side
torch.set_num_threads(1)
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
