"""The same draws in every run, and nothing from the network: a failure can be seen again."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; processes of tests inherit it


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
