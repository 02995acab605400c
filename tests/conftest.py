"""What every test runs under."""

import os

import pytest
import torch
from transformers.utils import logging

if not torch.cuda.is_available():
    # read when triton is imported, which nothing has done yet
    os.environ["TRITON_INTERPRET"] = "1"
# as many processes as cores run side by side
torch.set_num_threads(1)
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
