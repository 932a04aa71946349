"""GGUF under Hugging Face's names: what llama.cpp's converter did is undone, and mlx-lm computes the model it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf_models import MODELS, config, weights_of, write_gguf
from mlx_lm.utils import load_model
from safetensors.numpy import save_file
from test_commands import run
from tokenizers import Tokenizer, pre_tokenizers

import quantcore as qc
from quantcore.formats.gguf_tokenizer import write_tokenizer

TOKENS = mx.array([[1, 5, 9, 2, 60, 33] * 12])


def write_folder(folder: Path, model: dict[str, Any], kind: str | None = None) -> Path:
    """The model as the Hub has it; its matrices rounded to a type of GGUF, by rows, whose order is then no matter."""
    folder.mkdir()
    weights = weights_of(model)
    if kind is not None:
        rounded = GGMLQuantizationType[kind]
        weights = {
            name: quants.dequantize(quants.quantize(tensor, rounded), rounded) if tensor.ndim > 1 else tensor
            for name, tensor in weights.items()
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model))
    return folder


def logits(folder: Path) -> np.ndarray[Any, Any]:
    return np.asarray(load_model(folder)[0](TOKENS))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_converted_gguf_is_the_model_that_it_was(tmp_path: Path, model: dict[str, Any]) -> None:
    gguf, original = write_gguf(tmp_path / "m.gguf", model), write_folder(tmp_path / "hub", model)
    code, out, error = run("convert", gguf, tmp_path / "out")
    assert code == 0, error
    assert "mlx-lm doesn't know" not in out
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == model
    expected = logits(original)
    np.testing.assert_array_equal(logits(tmp_path / "out"), expected)
    assert expected.std() > 0.1
    for one in (gguf, original):
        assert run("verify", one, tmp_path / "out")[0] == 0
    assert run("verify", gguf, original)[0] == 0


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3"])
def test_packed_weights_stay_packed(tmp_path: Path, name: str, kind: str) -> None:
    model = MODELS[name]
    gguf, original = write_gguf(tmp_path / "m.gguf", model, kind), write_folder(tmp_path / "hub", model, kind)
    assert run("convert", gguf, tmp_path / "out")[0] == 0
    theirs, ours = qc.load(original), qc.load(tmp_path / "out")
    assert set(theirs) == set(ours)
    for tensor, value in theirs.items():
        assert qc.is_quantized(ours[tensor]) == (value.ndim > 1)
        np.testing.assert_array_equal(qc.dequantize(ours[tensor]) if value.ndim > 1 else ours[tensor], value)
    expected = logits(original)
    np.testing.assert_allclose(logits(tmp_path / "out"), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert run("verify", gguf, tmp_path / "out")[0] == 0


@pytest.mark.parametrize("name", ["llama 3", "llama, scaled linearly"])
def test_scaled_positions_count(tmp_path: Path, name: str) -> None:
    """Else the tests above would pass without the scaling."""
    scaled = write_folder(tmp_path / "scaled", MODELS[name])
    plain = write_folder(tmp_path / "plain", MODELS[name] | {"rope_scaling": None})
    assert np.abs(logits(scaled) - logits(plain)).max() > 1e-2


def test_load_and_save_do_the_same(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf", MODELS["llama"], "Q8_0")
    checkpoint = qc.load(gguf, names="huggingface", library="mlx")
    assert checkpoint.format == "gguf"
    assert dict(checkpoint.config) == MODELS["llama"]
    assert checkpoint.metadata["llama.block_count"] == 2
    qc.save(checkpoint, tmp_path / "saved")
    run("convert", gguf, tmp_path / "converted")
    files = ("model.safetensors", "config.json")
    one, other = ([(tmp_path / folder / file).read_bytes() for file in files] for folder in ("saved", "converted"))
    assert one == other
    renamed = qc.load(gguf, names="huggingface", rename=lambda name: name.removeprefix("model."))
    assert {"layers.0.self_attn.q_proj.weight", "lm_head.weight"} <= set(renamed)
    with pytest.raises(ValueError, match="names must be 'file' or 'huggingface', not 'mlx'"):
        qc.load(gguf, names="mlx")  # type: ignore[arg-type]


def test_the_file_s_own_names(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf", MODELS["llama"])
    assert run("convert", gguf, tmp_path / "out", "--names", "file")[0] == 0
    assert set(qc.load(tmp_path / "out")) == set(qc.load(gguf))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {}
    assert run("verify", gguf, tmp_path / "out")[0] == 0
    code, _, error = run("convert", gguf, tmp_path / "other", "--names", "mine")
    assert code == 2
    assert "names must be 'file' or 'huggingface'" in error


def test_an_unknown_architecture_keeps_its_names_and_that_is_said(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf", MODELS["llama"], **{"general.architecture": None})
    data = gguf.read_bytes()
    gguf.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1))
    code, out, _ = run("convert", gguf, tmp_path / "out")
    assert code == 0
    assert "for the architecture 'gemma' aren't known here, only those for llama, qwen2, qwen3" in out
    assert "The file's own names are kept, which mlx-lm doesn't know" in out
    assert run("verify", gguf, tmp_path / "out")[0] == 0
    code, _, error = run("convert", gguf, tmp_path / "other", "--names", "huggingface")
    assert code == 2
    assert "'gemma'" in error


ONE = np.ones(1, np.float32)
REFUSED = {
    "longrope": ("llama", {"llama.rope.scaling.type": "longrope"}, r"rope.scaling.type is 'longrope'"),
    "attn_factor": ("llama", {"llama.rope.scaling.attn_factor": 0.5}, r"rope.scaling.attn_factor isn't 1"),
    "two scalings": ("llama 3", {"llama.rope.scaling.factor": 2.0}, r"scaled by rope_freqs.weight and linearly, too"),
    "frequencies": ("llama", {"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}, r"isn't what Llama 3"),
    "qwen's frequencies": (
        "qwen2",
        {"rope_freqs.weight": np.ones(16, np.float32)},
        r"no place for the tensor 'rope_fr",
    ),
    "head counts": ("llama", {"llama.attention.head_count_kv": [2, 4]}, r"head_count_kv differs from layer to layer"),
    "part of a head": (
        "llama",
        {"llama.rope.dimension_count": 16},
        r"rope.dimension_count is 16, .* size of a head, 32",
    ),
    "value heads": ("qwen3", {"qwen3.attention.value_length": 32}, r"attention.value_length is 32, .* head, 64"),
    "qwen2's heads": (
        "qwen2",
        {"qwen2.attention.key_length": 48, "qwen2.attention.value_length": 48},
        r"4 heads of 48",
    ),
    "not causal": ("llama", {"llama.attention.causal": False}, r"attention.causal is false"),
    "experts": ("llama", {"blk.1.ffn_gate_inp.weight": ONE}, r"no place for the tensor 'blk.1.ffn_gate_inp.weight'"),
    "some biases": ("llama", {"blk.0.attn_q.bias": np.ones(128, np.float32)}, r"no blk.0.attn_k.bias, .* all or none"),
    "a later bias": ("llama", {"blk.1.attn_q.bias": ONE}, r"no place for the tensor 'blk.1.attn_q.bias'"),
}


@pytest.mark.parametrize(("name", "changes", "why"), REFUSED.values(), ids=REFUSED)
def test_what_mlx_lm_would_compute_otherwise_is_refused(tmp_path: Path, name: str, changes: Any, why: str) -> None:
    gguf = write_gguf(tmp_path / "m.gguf", MODELS[name], **changes)
    with pytest.raises(qc.UnsupportedError, match=rf"m\.gguf: .*{why}"):
        qc.load(gguf, names="huggingface")
    code, out, _ = run("convert", gguf, tmp_path / "out")
    assert code == 0
    assert "The file's own names are kept" in out
    assert set(qc.load(tmp_path / "out")) == set(qc.load(gguf))


MALFORMED = {
    "no width": ({"llama.embedding_length": None}, r"metadata: llama.embedding_length is missing"),
    "a word": ({"llama.block_count": "two"}, r"llama.block_count must be an integer, not 'two'"),
    "a boolean": ({"llama.attention.head_count": True}, r"llama.attention.head_count must be an integer"),
    "none": ({"llama.attention.head_count": 0}, r"llama.attention.head_count is 0"),
    "less": ({"llama.feed_forward_length": -3}, r"llama.feed_forward_length is -3"),
    "too many layers": ({"llama.block_count": 2**31 - 1}, r"llama.block_count is 2147483647, of 21 tensors"),
    "a layer more": ({"llama.block_count": 3}, r"llama.block_count is 3, of 21 tensors"),
    "not a number": (
        {"llama.attention.layer_norm_rms_epsilon": math.nan},
        r"epsilon must be a positive number, not 'nan'",
    ),
    "infinite": ({"llama.rope.freq_base": math.inf}, r"rope.freq_base must be a positive number"),
    "a list": ({"llama.rope.scaling.factor": [1.0, 2.0]}, r"rope.scaling.factor must be a positive number"),
    "heads": ({"llama.attention.head_count_kv": 3}, r"head_count isn't a multiple of head_count_kv"),
    "odd heads": (
        {"llama.attention.key_length": 33, "llama.attention.value_length": 33, "llama.rope.dimension_count": 33},
        r"heads of 33",
    ),
    "a token": ({"tokenizer.ggml.eos_token_id": 64}, r"tokenizer.ggml.eos_token_id is 64, of 64 tokens"),
    "no embedding": ({"token_embd.weight": None}, r"the tensor token_embd.weight is missing"),
    "no tensor": ({"blk.1.ffn_up.weight": None}, r"the tensor blk.1.ffn_up.weight of a model of llama is missing"),
    "a shape": (
        {"blk.1.attn_q.weight": np.ones((64, 128), np.float32)},
        r"'blk.1.attn_q.weight': its shape is \(64, 128\)",
    ),
    "divisors": ({"rope_freqs.weight": np.ones(3, np.float32)}, r"'rope_freqs.weight': expected 16 float32"),
    "no divisors": ({"rope_freqs.weight": np.zeros(16, np.float32)}, r"isn't a positive number"),
}


@pytest.mark.parametrize(("changes", "why"), MALFORMED.values(), ids=MALFORMED)
def test_what_the_keys_don_t_say_rightly(tmp_path: Path, changes: Any, why: str) -> None:
    gguf = write_gguf(tmp_path / "m.gguf", MODELS["llama"], **changes)
    with pytest.raises(qc.FormatError, match=rf"m\.gguf.*{why}"):
        qc.load(gguf, names="huggingface")
    code, _, error = run("convert", gguf, tmp_path / "out")
    assert code == 2
    assert "--names file" in error
    assert not (tmp_path / "out").exists()
    assert run("convert", gguf, tmp_path / "out", "--names", "file")[0] == 0


# --- the tokenizer --------------------------------------------------------------------------------------------

MERGES = ["1 2", "12 3", "123 4", "' S", "! Ċ", "Ġ a", "a b"]
WORDS = [
    *("<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())),
    *(merge.replace(" ", "") for merge in MERGES),
    *("Ġwhole", "<think>"),
]
TEXT = "12345!\n it'S ab whole<think></s>é"
# As llama.cpp splits it (llama_tokenize with add_special and parse_special, vocabulary and merges as here).
PIECES = {
    "smollm": "1 2 3 4 5 ! Ċ Ġ i t ' S Ġa b Ġ w h o l e <think> </s> Ã ©",
    "gpt-2": "1234 5 ! Ċ Ġ i t ' S Ġa b Ġ w h o l e <think> </s> Ã ©",
    "llama-bpe": "<s> 123 4 5 !Ċ Ġ i t 'S Ġa b Ġwhole <think> </s> Ã ©",
    "qwen2": "1 2 3 4 5 !Ċ Ġ i t 'S Ġa b Ġ w h o l e <think> </s> Ã ©",
}


def tokenizer_keys(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(WORDS) - 3), 4],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}é",
    }
    return found | {f"tokenizer.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize("pre", PIECES)
def test_the_tokenizer_splits_text_as_llama_cpp_does(tmp_path: Path, pre: str) -> None:
    model = config(vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1)
    assert run("convert", write_gguf(tmp_path / "m.gguf", model, **tokenizer_keys(pre)), tmp_path / "out")[0] == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode(TEXT).tokens == PIECES[pre].split(" ")
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT.replace("</s>", "")
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}é"
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")


def test_a_tokenizer_beside_the_file_is_the_one_that_is_kept(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_gguf(tmp_path / "m" / "m.gguf", config(vocab_size=len(WORDS)), **tokenizer_keys())
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    assert run("convert", tmp_path / "m", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


NO_TOKENIZER = {
    "none": (dict.fromkeys(tokenizer_keys()), "of kind 'none'"),
    "sentencepiece": (tokenizer_keys(**{"ggml.model": "llama"}), "of kind 'llama'"),
    "another split": (tokenizer_keys("tekken"), "pre-tokenizer 'tekken'"),
    "no merges": (tokenizer_keys(**{"ggml.merges": None}), "tokenizer.ggml.merges isn't a list of strings"),
    "numbers": (tokenizer_keys(**{"ggml.tokens": [1, 2]}), "tokenizer.ggml.tokens isn't a list of strings"),
    "a merge of one": (tokenizer_keys(**{"ggml.merges": ["12"]}), "the tokenizer is malformed"),
    "a merge of none": (tokenizer_keys(**{"ggml.merges": ["Ł Ł"]}), "the tokenizer is malformed"),
    "types": (tokenizer_keys(**{"ggml.token_type": [1]}), "there isn't a type for each token"),
    "twice": (tokenizer_keys(**{"ggml.tokens": [*WORDS[:-1], "a"]}), "a token occurs twice"),
    "an id": (tokenizer_keys(**{"ggml.padding_token_id": 9999}), "tokenizer.ggml.padding_token_id is 9999"),
    "a template": (tokenizer_keys(**{"chat_template": 3}), "tokenizer.chat_template must be a string"),
}


@pytest.mark.parametrize(("changes", "why"), NO_TOKENIZER.values(), ids=NO_TOKENIZER)
def test_without_a_tokenizer_the_weights_are_converted_and_that_is_said(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    model = config(vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1)
    code, out, _ = run("convert", write_gguf(tmp_path / "m.gguf", model, **changes), tmp_path / "out")
    assert code == 0
    assert "No tokenizer was written, which mlx_lm.load needs: " in out
    assert why in out
    assert not {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} & {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert load_model(tmp_path / "out")


def test_without_the_library_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = qc.load(write_gguf(tmp_path / "m.gguf", config(vocab_size=len(WORDS)), **tokenizer_keys()))
    monkeypatch.setattr("quantcore.formats.gguf_tokenizer.find_spec", lambda name: None)
    with pytest.raises(qc.UnsupportedError, match="pip install tokenizers"):
        write_tokenizer(checkpoint.path, checkpoint.metadata, tmp_path)
