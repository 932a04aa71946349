"""Products of torch tensors on a CPU: quantcore eager and compiled, beside NumPy's, dense ones and other quantizers.

And MiniLM as a torch module: whole, and its products compiled into one graph beside the same calls made directly.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from common import interleaved, print_table, repeated, save, settle, shown, spread
from torch import nn

import quantcore as qc
from quantcore.testing import oracle
from quantcore.torch import QuantizedLinear, quantize_module
from quantcore_examples.fetch import fetch_model
from quantcore_examples.minilm_torch import RULES, SentenceEncoder
from quantcore_examples.sentence_model import SentenceModel
from quantcore_examples.sentences import SENTENCES

SIDE, GROUP = 4096, 64
ROWS = (1, 8, 128)
Call = Callable[[], Any]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile with its default compiler."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def peers(dense: torch.Tensor) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers of torchao and bitsandbytes on that weight, and why there is none."""
    made: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    for name, make in (
        ("torchao Int4WeightOnly (opaque)", _torchao_int4),
        ("torchao IntxWeightOnly int4", _torchao_intx),
        ("torchao Int8DynamicActivationInt8Weight", _torchao_int8),
        ("bitsandbytes Linear4bit nf4", _bitsandbytes),
    ):
        try:
            layer = make(dense)
            layer(torch.zeros(1, SIDE))
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            made[name] = layer
    return made, missing


def _linear(dense: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(SIDE, SIDE, bias=False)
    layer.weight = nn.Parameter(dense.clone(), requires_grad=False)
    return layer


def _torchao_int4(dense: torch.Tensor) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig

    return _torchao(dense, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="opaque"))


def _torchao_intx(dense: torch.Tensor) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return _torchao(dense, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))


def _torchao_int8(dense: torch.Tensor) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(dense, Int8DynamicActivationInt8WeightConfig())


def _torchao(dense: torch.Tensor, config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    model = nn.Sequential(_linear(dense))
    quantize_(model, config)
    return model


def _bitsandbytes(dense: torch.Tensor) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(SIDE, SIDE, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(dense.clone(), requires_grad=False, quant_type="nf4", blocksize=GROUP)
    moved: nn.Module = layer.to("cpu")
    return moved


def products(repeats: int, seconds: float) -> dict[str, Any]:
    """Times, errors against float64 and ratios to NumPy's backend."""
    dense = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    qn = qc.quantize(dense.numpy(), bits=4, group_size=GROUP)
    qt = qn.to("torch")
    exact = oracle.exact_weight(qn.packed, qn.scales, qn.biases, qn.scheme, SIDE)
    of_peers, missing = peers(dense)
    for name, why in missing.items():
        print(f"left out: {name}: {why}")
    dot = compiled(lambda x: qc.dot(x, qt))
    linear = nn.functional.linear
    dense_compiled = compiled(lambda x: linear(x, dense))
    results: dict[str, Any] = {"left out": missing}
    for rows in ROWS:
        x = torch.randn(rows, SIDE, generator=torch.Generator().manual_seed(1))
        xn = x.numpy()
        calls: dict[str, Call] = {
            "NumPy, quantcore.dot": lambda xn=xn: qc.dot(xn, qn),
            "torch, quantcore.dot": lambda x=x: qc.dot(x, qt),
            "torch, quantcore.dot compiled": lambda x=x: dot(x),
            "torch, dense float32": lambda x=x: linear(x, dense),
            "torch, dense float32 compiled": lambda x=x: dense_compiled(x),
        } | {name: (lambda x=x, layer=layer: layer(x)) for name, layer in of_peers.items()}
        with torch.inference_mode():
            errors = {name: _error(call, name, xn, exact, dense) for name, call in calls.items()}
            taken = interleaved({name: repeated(call) for name, call in calls.items()}, repeats, seconds, settle)
        base = taken["NumPy, quantcore.dot"]
        results[f"M={rows}"] = table = {
            name: {
                "ms": spread(times, 1e3),
                "ratio to NumPy": spread([a / b for a, b in zip(times, base, strict=True)]),
                "nmse": errors[name],
            }
            for name, times in taken.items()
        }
        print_table(
            f"{rows} x {SIDE} by {SIDE} x {SIDE}, int4 in groups of {GROUP}, float32 x",
            ("call", "ms", "ratio to NumPy's quantcore.dot", "NMSE"),
            [
                (name, shown(row["ms"]), shown(row["ratio to NumPy"]), f"{row['nmse']:.0e}")
                for name, row in table.items()
            ],
        )
    return results


def _error(call: Call, name: str, x: np.ndarray[Any, Any], exact: np.ndarray[Any, Any], dense: torch.Tensor) -> float:
    """NMSE of the worst row: ours against the weight that the codes stand for, the others' against the dense one."""
    result = call()
    got = result if isinstance(result, np.ndarray) else result.float().numpy()
    weight = exact if "quantcore" in name else dense.double().numpy()
    wanted = x.astype(np.float64) @ weight.T
    return float(f"{oracle.nmse(got.astype(np.float64) - wanted, wanted, x, weight):.2g}")


def minilm(repeats: int, seconds: float) -> dict[str, Any]:
    """The whole encoder, and its products alone, on one sentence and on a batch."""
    source = SentenceModel.load(fetch_model())
    dense = SentenceEncoder.from_weights(source.config, source.weights)
    quantized = copy.deepcopy(dense)
    quantize_module(quantized, RULES)
    results: dict[str, Any] = {}
    for title, sentences in (("one sentence", SENTENCES[:1]), ("16 sentences", SENTENCES[:16])):
        inputs = [torch.from_numpy(array) for array in source.tokenize(sentences)]
        pairs = _recorded(quantized, inputs)
        xs, weights = [x for x, _ in pairs], [w for _, w in pairs]
        together = compiled(lambda xs, weights=weights: [qc.dot(x, w) for x, w in zip(xs, weights, strict=True)])
        on_numpy = [(x.numpy(), w.to("numpy")) for x, w in pairs]
        models = {
            "model, dense": dense,
            "model, dense compiled": compiled(dense),
            "model, quantized": quantized,
            "model, quantized compiled": compiled(quantized),
        }
        calls: dict[str, Call] = {name: (lambda m=m, i=inputs: m(*i)) for name, m in models.items()} | {
            "its products, called directly": lambda p=pairs: [qc.dot(x, w) for x, w in p],
            "its products, in one compiled graph": lambda xs=xs, f=together: f(xs),
            "its products, on NumPy": lambda p=on_numpy: [qc.dot(x, w) for x, w in p],
        }
        with torch.inference_mode():
            taken = interleaved({name: repeated(call) for name, call in calls.items()}, repeats, seconds, settle)
            taken |= inside(models["model, quantized"], models["model, quantized compiled"], inputs, repeats)
        direct = taken["its products, called directly"]
        results[title] = table = {
            name: {"ms": spread(t, 1e3), "ratio": spread([a / b for a, b in zip(t, direct, strict=True)])}
            for name, t in taken.items()
        }
        print_table(
            f"all-MiniLM-L6-v2, {title}, {len(pairs)} products",
            ("what", "ms", "ratio to the products called directly"),
            [(name, shown(row["ms"]), shown(row["ratio"])) for name, row in table.items()],
        )
        inner = [a / b for a, b in zip(taken[IN_COMPILED], taken[IN_EAGER], strict=True)]
        table[IN_COMPILED]["ratio to those in the eager model"] = spread(inner)
        print(f"\n{IN_COMPILED}, over those in the eager model: {shown(spread(inner))}")
    return results


IN_EAGER, IN_COMPILED = "products inside the eager model", "products inside the compiled model"


def inside(eager: nn.Module, compiled_model: Any, inputs: list[torch.Tensor], repeats: int) -> dict[str, list[float]]:
    """Seconds that the products of a run of the model take together, each timed where it is called.

    In the eager model ``quantcore.dot`` is called; in the compiled one the operator, by the code that Inductor wrote.
    """
    places = {
        IN_EAGER: (eager, qc, "dot"),
        IN_COMPILED: (compiled_model, torch.ops.quantcore.dot, "default"),
    }
    taken: dict[str, list[float]] = {name: [] for name in places}
    for _ in range(repeats):
        for name, (model, owner, attribute) in places.items():
            settle()
            runs = []
            with _timed_calls(owner, attribute) as each:
                for _ in range(10):
                    each.clear()
                    model(*inputs)
                    runs.append(sum(each))
            taken[name].append(statistics.median(runs))
    return taken


@contextmanager
def _timed_calls(owner: Any, name: str) -> Iterator[list[float]]:
    """The seconds of each call of a function of a module."""
    function, taken = getattr(owner, name), list[float]()

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **options)
        taken.append(time.perf_counter() - start)
        return result

    setattr(owner, name, timed)
    try:
        yield taken
    finally:
        setattr(owner, name, function)


def _recorded(model: nn.Module, inputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, qc.QuantizedTensor]]:
    """What goes into each quantized layer when the model runs."""
    pairs: list[tuple[torch.Tensor, qc.QuantizedTensor]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: pairs.append((args[0].clone(), layer.weight)))
        for layer in layers
    ]
    with torch.inference_mode():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return [(x.clone(), weight) for x, weight in pairs]


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute, nothing saved")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    repeats, seconds = (3, 0.02) if quick else (15, 0.1)
    results = {"products": products(repeats, seconds), "minilm": minilm(repeats, seconds)}
    if not quick:
        save("torch_cpu", results)


if __name__ == "__main__":
    main()
