"""One small model for all tests of this folder: building it costs more than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from megamoe.integrations.transformers import disable
from megamoe.integrations.weights import Weights, quantize_weights
from megamoe.job.small_model import build_small_model


@pytest.fixture(scope="session")
def shared_model() -> DeepseekV4ForCausalLM:
    return build_small_model(seed=0)


@pytest.fixture(scope="session")
def weights(shared_model: DeepseekV4ForCausalLM) -> Weights:
    """The small model's weights in NVFP4, quantised once."""
    return quantize_weights(shared_model)


@pytest.fixture
def model(shared_model: DeepseekV4ForCausalLM) -> Iterator[DeepseekV4ForCausalLM]:
    """The small model in fp32, plain before and after each test."""
    with torch.no_grad():
        yield shared_model
    disable(shared_model)
