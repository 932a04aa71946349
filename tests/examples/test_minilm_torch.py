"""MiniLM as a torch module: dense, quantized by rules, compiled."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from quantcore.torch import quantize_module
from quantcore_examples.minilm_torch import RULES, SentenceEncoder
from quantcore_examples.sentence_model import SentenceModel
from quantcore_examples.sentences import SENTENCES

SOME = SENTENCES[:6]


@pytest.fixture(scope="module")
def dense(model: SentenceModel) -> SentenceEncoder:
    return SentenceEncoder.from_weights(model.config, model.weights)


@pytest.fixture(scope="module")
def quantized(dense: SentenceEncoder) -> SentenceEncoder:
    made = copy.deepcopy(dense)
    report = quantize_module(made, RULES)
    assert sum(layer.scheme is not None for layer in report.layers) == 37
    return made


def embed(encoder: torch.nn.Module, model: SentenceModel) -> np.ndarray:
    with torch.no_grad():
        return encoder(*map(torch.from_numpy, model.tokenize(SOME))).numpy()  # type: ignore[no-any-return]


def test_it_is_the_model_that_array_api_code_computes(dense: SentenceEncoder, model: SentenceModel) -> None:
    np.testing.assert_allclose(embed(dense, model), model.embed(SOME), atol=1e-5)


def test_quantized_by_rules_it_gives_the_same_as_on_numpy(quantized: SentenceEncoder, model: SentenceModel) -> None:
    wanted = model.quantize(4, 64, backend="numpy").embed(SOME)
    np.testing.assert_allclose(embed(quantized, model), wanted, atol=1e-4)


def test_compiled_whole_with_every_product_an_operator(quantized: SentenceEncoder, model: SentenceModel) -> None:
    torch._dynamo.reset()
    names: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: object) -> object:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    backend = aot_autograd(fw_compiler=look)
    compiled = torch.compile(quantized, fullgraph=True, backend=backend)
    np.testing.assert_allclose(embed(compiled, model), embed(quantized, model), atol=1e-5)
    assert names.count("quantcore.dot.default") == 36
    assert names.count("quantcore.take.default") == 1


def test_the_gradient_of_the_embeddings_reaches_the_norms(quantized: SentenceEncoder, model: SentenceModel) -> None:
    encoder = copy.deepcopy(quantized)
    encoder(*map(torch.from_numpy, model.tokenize(SOME))).sum().backward()
    assert encoder.embeddings.LayerNorm.weight.grad.abs().sum() > 0
