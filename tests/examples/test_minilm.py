"""The encoder against its published similarities, dense and quantized, on every library at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcore
from quantcore_examples import checkpoint
from quantcore_examples.checkpoint import EMBEDDING_TABLE, CheckpointError
from quantcore_examples.measure import REFERENCE_SIMILARITIES, reference_similarities
from quantcore_examples.minilm import Config, erf, gelu, mean_pool, softmax
from quantcore_examples.search import nearest
from quantcore_examples.sentence_model import SentenceModel
from quantcore_examples.sentences import SENTENCES

LIBRARIES = ("numpy", "mlx", "torch", "array_api_strict")
SOME = SENTENCES[:6]
"""Sentences of different lengths; few, since MLX's CPU build for Linux is slow."""


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip("mlx.core" if name == "mlx" else name, exc_type=ImportError)
    return name


@pytest.fixture(scope="session")
def quantized(model: SentenceModel) -> Callable[[int, int | None], SentenceModel]:
    made: dict[tuple[int, int | None], SentenceModel] = {}

    def quantize(bits: int, group_size: int | None) -> SentenceModel:
        key = (bits, group_size)
        if key not in made:
            made[key] = model.quantize(bits, group_size, backend="numpy")
        return made[key]

    return quantize


def cosines(a: np.ndarray, b: np.ndarray) -> Any:
    return np.sum(a * b, axis=-1)


def test_float32_reproduces_the_published_similarities(model: SentenceModel, library: str) -> None:
    found = reference_similarities(model.to(library))
    assert [round(value, 3) for value in found] == [round(reference, 3) for _, _, reference in REFERENCE_SIMILARITIES]
    np.testing.assert_allclose(found, [0.66596, 0.10458, 0.14114], atol=1e-5)


def test_the_embeddings_are_float32_unit_vectors(model: SentenceModel, library: str) -> None:
    embeddings = model.to(library).embed(SOME)
    assert embeddings.shape == (len(SOME), 384)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, atol=1e-6)


def test_padding_changes_no_embedding(model: SentenceModel, library: str) -> None:
    moved = model.to(library)
    batch = moved.embed(["Hello.", "A sentence of quite a few more words than the other one has."])
    np.testing.assert_allclose(moved.embed(["Hello."])[0], batch[0], atol=1e-6)


def test_a_long_text_is_cut_to_what_the_checkpoint_says(model: SentenceModel) -> None:
    input_ids, attention_mask = model.tokenize(["word " * 1000, "short"])
    assert input_ids.shape == attention_mask.shape == (2, 256)
    assert np.all(attention_mask[0] == 1)
    assert np.sum(attention_mask[1]) == 3


def test_erf_is_exact_enough() -> None:
    x = np.linspace(-6, 6, 20_001)
    exact = np.asarray([math.erf(value) for value in x])
    np.testing.assert_allclose(erf(x), exact, rtol=0, atol=1.6e-7)
    np.testing.assert_allclose(erf(x.astype(np.float32)), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("x", "expected"), [(0.0, 0.0), (1.0, 0.8413447), (-1.0, -0.1586553), (9.0, 9.0), (-9.0, 0.0)])
def test_gelu_is_the_exact_one(x: float, expected: float) -> None:
    np.testing.assert_allclose(gelu(np.asarray([x])), [expected], atol=1e-6)


def test_softmax_survives_large_scores() -> None:
    np.testing.assert_allclose(softmax(np.asarray([[1e4, 1e4, -1e9]])), [[0.5, 0.5, 0.0]])


def test_mean_pool_leaves_padding_out() -> None:
    hidden = np.asarray([[[1.0], [3.0], [100.0]]])
    assert mean_pool(hidden, np.asarray([[1.0, 1.0, 0.0]])) == [[2.0]]


def test_the_36_matrices_and_the_table_are_quantized_and_nothing_else(
    quantized: Callable[[int, int | None], SentenceModel],
) -> None:
    weights = quantized(4, 64).weights
    packed = {name for name, weight in weights.items() if quantcore.is_quantized(weight)}
    assert len(packed) == 37
    assert EMBEDDING_TABLE in packed
    assert packed == {name for name in weights if checkpoint.is_matrix(name)}


def test_quantized_sizes_are_what_the_scheme_implies(
    model: SentenceModel, quantized: Callable[[int, int | None], SentenceModel]
) -> None:
    weights = quantized(4, 64).weights
    packed = {name: weight for name, weight in weights.items() if quantcore.is_quantized(weight)}
    bits = 8 * checkpoint.size_in_bytes(packed) / checkpoint.parameter_count(packed)
    assert bits == 4 + 2 * 32 / 64
    assert checkpoint.parameter_count(weights) == checkpoint.parameter_count(model.weights)


@pytest.mark.parametrize(
    ("bits", "group_size", "mean", "least"),
    [
        (8, 64, 0.9998, 0.9997),
        (6, 64, 0.9975, 0.9965),
        (4, 32, 0.970, 0.960),
        (4, 64, 0.965, 0.950),
        (4, 256, 0.945, 0.930),
        (8, None, 0.9995, 0.9993),
    ],
)
def test_quantized_embeddings_stay_near_the_float32_ones(
    model: SentenceModel,
    quantized: Callable[[int, int | None], SentenceModel],
    bits: int,
    group_size: int | None,
    mean: float,
    least: float,
) -> None:
    packed = quantized(bits, group_size)
    assert packed.weights[EMBEDDING_TABLE].scheme is quantcore.Scheme("affine", bits, group_size)
    found = cosines(packed.embed(SENTENCES), model.embed(SENTENCES))
    assert np.mean(found) >= mean
    assert np.min(found) >= least


@pytest.mark.parametrize("bits", [4, 8])
def test_libraries_agree_on_the_same_packed_weights(
    quantized: Callable[[int, int | None], SentenceModel], library: str, bits: int
) -> None:
    on_numpy = quantized(bits, 64)
    moved = on_numpy.to(library)
    table = moved.weights[EMBEDDING_TABLE]
    assert type(table.packed).__module__.partition(".")[0] == library
    expected, found = on_numpy.embed(SOME), moved.embed(SOME)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    for row in range(len(SOME)):
        hits = [hit.index for hit in nearest(expected[row], expected, 3)]
        assert [hit.index for hit in nearest(found[row], found, 3)] == hits


@pytest.mark.filterwarnings("ignore::quantcore.PerformanceWarning")
def test_a_group_size_that_does_not_divide_the_rows_is_padded(
    quantized: Callable[[int, int | None], SentenceModel], library: str
) -> None:
    on_numpy = quantized(4, 256)
    np.testing.assert_allclose(on_numpy.to(library).embed(SOME[:2]), on_numpy.embed(SOME[:2]), rtol=0, atol=1e-4)


def test_one_function_computes_on_any_array_api_namespace() -> None:
    x = array_api_strict.asarray([[1.0, 2.0], [3.0, 4.0]])
    assert type(gelu(softmax(x))) is type(x)


TINY = Config(
    vocab_size=8,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=12,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """Write the weights and the sizes of a checkpoint that takes no time to read."""
    weights = {name: np.ones(shape, np.float32) for name, shape in checkpoint.weight_shapes(TINY).items()}
    save_file(weights | {"pooler.dense.bias": np.ones(16, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY.__dict__))
    return tmp_path


def test_load_weights_reads_what_the_encoder_uses(tiny_folder: Path) -> None:
    assert checkpoint.load_weights(tiny_folder).keys() == checkpoint.weight_shapes(TINY).keys()


def test_load_weights_names_a_missing_weight(tiny_folder: Path) -> None:
    save_file({"something": np.ones(1, np.float32)}, tiny_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no embeddings\.word_embeddings\.weight"):
        checkpoint.load_weights(tiny_folder)


def test_load_weights_names_a_weight_of_the_wrong_shape(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_text(json.dumps(replace(TINY, vocab_size=9).__dict__))
    with pytest.raises(CheckpointError, match=r"\(8, 16\).*\(9, 16\)"):
        checkpoint.load_weights(tiny_folder)


def test_load_weights_refuses_a_damaged_file(tiny_folder: Path) -> None:
    file = tiny_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load_weights(tiny_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "not a JSON object"),
        ('{"hidden_size": "big"}', "lacks a number for vocab_size, hid"),
    ],
)
def test_load_config_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_config(tmp_path)


def test_load_tokenizer_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        checkpoint.load_tokenizer(tmp_path)
