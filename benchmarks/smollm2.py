"""SmolLM2-135M-Instruct from its GGUF file: tokens per second, peak memory and perplexity, beside llama.cpp's.

llama-cpp-python is measured where it is installed, on the same file, tokens and threads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import interleaved, machine, print_table, repeated, save, settle, shown, spread

import quantcore
from quantcore_examples import llama
from quantcore_examples.fetch import SMOLLM2, fetch_model
from quantcore_examples.generate import perplexity
from quantcore_examples.language_model import LanguageModel
from quantcore_examples.llama import Cache

PREFILL, DECODE = 256, 32
WINDOWS, WINDOW = 24, 256
PROMPT = "The history of the printing press begins long before Gutenberg, in workshops where letters were cut in wood. "

Call = Callable[[], Any]


def prefill(model: LanguageModel, ids: list[int], precision: Any) -> Call:
    """Feeds a prompt."""

    def run() -> None:
        with quantcore.use_precision(precision):
            model.logits(ids, [])

    return run


def decode(model: LanguageModel, ids: list[int], precision: Any) -> Call:
    """Writes tokens after a prompt of 8, which was read before."""
    with quantcore.use_precision(precision):
        start: Cache = []
        first = model.logits(ids[:8], start)

    def run() -> None:
        logits, cache = first, list(start)
        with quantcore.use_precision(precision):
            for _ in range(DECODE):
                logits = model.logits([int(np.argmax(logits[-1]))], cache)

    return run


def llama_cpp(file: Path, ids: list[int]) -> dict[str, Call]:
    """The same from llama-cpp-python; empty where it isn't installed."""
    try:
        from llama_cpp import Llama
    except ImportError as error:
        print(f"left out: llama-cpp-python: {error}")
        return {}
    threads = machine()["cores"]
    model = Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def read() -> None:
        model.reset()
        model.eval(ids)

    def write() -> None:
        model.n_tokens = 8  # what is evaluated next replaces what came after these
        for _ in range(DECODE):
            model.eval([model.sample(temp=0.0)])

    read()
    return {"prefill": read, "decode": write}


def measured(file: Path, repeats: int, libraries: list[str]) -> dict[str, dict[str, Any]]:
    """Tokens per second of reading a prompt and of writing, for each way."""
    packed = {library: LanguageModel.load(file, library) for library in {"numpy", *libraries}}
    ids = packed["numpy"].tokenizer.encode(PROMPT * 20)[:PREFILL]
    ways: dict[str, tuple[LanguageModel, str]] = {
        "numpy": (packed["numpy"], "default"),
        "numpy, fast": (packed["numpy"], "fast"),
        "numpy, highest": (packed["numpy"], "highest"),
        "numpy, dense float32": (packed["numpy"].dequantize(), "default"),
        **{library: (packed[library], "default") for library in libraries},
    }
    peer = llama_cpp(file, ids)
    found: dict[str, dict[str, Any]] = {name: {} for name in (*ways, *(["llama.cpp"] if peer else []))}
    for what, make, tokens in (("prefill", prefill, PREFILL), ("decode", decode, DECODE)):
        calls = {name: repeated(make(model, ids, precision)) for name, (model, precision) in ways.items()}
        if peer:
            calls["llama.cpp"] = repeated(peer[what])
        taken = interleaved(calls, repeats, 0.5, settle)
        for name, seconds in taken.items():
            found[name][what] = spread([tokens / value for value in seconds])
            if peer:
                found[name][f"{what}_over_llama_cpp"] = spread(np.divide(taken["llama.cpp"], seconds).tolist())
    return found


_MEMORY = """
import sys
import numpy as np
import quantcore
from pathlib import Path
from quantcore_examples.language_model import LanguageModel
from quantcore_examples.generate import generate

def used(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

for bits in (4, 8):  # what Numba and its kernels take isn't the model's
    for rows in (1, 32):
        weight = quantcore.quantize(np.eye(576, dtype=np.float32), bits=bits, group_size=32)
        quantcore.dot(np.ones((rows, 576), np.float32), weight)
before = used("VmRSS")
model = LanguageModel.load(Path(sys.argv[1]))
prompt = model.tokenizer.encode("Once upon a time")
positions = len(prompt) + len(list(generate(model, prompt, 256)))
packed = sum(w.nbytes for w in model.weights.values())
c = model.config
cache = 2 * c.layers * c.kv_heads * (c.width // c.heads) * positions * 4
print(used("VmHWM") - before, packed, cache)
"""


def memory(file: Path) -> dict[str, float]:
    """Peak memory beyond that of the libraries while 256 tokens are written, in MiB, beside weights and KV cache."""
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(file)], capture_output=True, text=True, check=True)
    peak, packed, cache = (int(part) / 2**20 for part in done.stdout.split())
    return {"peak": round(peak, 1), "weights": round(packed, 1), "cache": round(cache, 1)}


PARTS = ("dot", "rms_norm", "weighted", "silu")
"""Functions of the decoder that are timed, each with what it calls."""


def profile(model: LanguageModel, ids: list[int], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a token, and of a prompt, in parts of the decoder on NumPy arrays; the timers take some too."""
    own = {part: getattr(llama, part) for part in PARTS}
    spent: dict[str, float] = {}

    def timed(part: str) -> Call:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = own[part](*args)
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - start
            return result

        return run

    def split(call: Call, count: int) -> dict[str, float]:
        runs = []
        for _ in range(repeats + 1):
            spent.clear()
            start = time.perf_counter()
            call()
            runs.append({"all": time.perf_counter() - start, **spent})
        return {part: round(1e3 / count * float(np.median([run[part] for run in runs[1:]])), 2) for part in runs[-1]}

    calls = decode(model, ids, "default"), prefill(model, ids, "default")
    try:
        for part in PARTS:
            setattr(llama, part, timed(part))
        return {"token": split(calls[0], DECODE), "prompt": split(calls[1], 1)}
    finally:
        for part, function in own.items():
            setattr(llama, part, function)


def perplexities(file: Path, text: Path) -> dict[str, float]:
    """Perplexity of the packed model at each precision, and of the dense one, on the text's first windows."""
    model = LanguageModel.load(file)
    ids = model.tokenizer.encode(text.read_text(encoding="utf-8"))[: WINDOWS * WINDOW]
    found = {}
    for precision in ("default", "fast", "highest"):
        with quantcore.use_precision(precision):
            found[precision] = perplexity(model, ids, WINDOW)
    found["dense float32"] = perplexity(model.dequantize(), ids, WINDOW)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--libraries", nargs="*", default=["torch"], help="beside numpy; mlx takes minutes on a CPU")
    parser.add_argument("--text", type=Path, help="an English text for the perplexity, such as lee_background.cor")
    options = parser.parse_args()
    file = fetch_model(source=SMOLLM2) / SMOLLM2.files[0].name

    results: dict[str, Any] = {"tokens_per_second": measured(file, options.repeats, options.libraries)}
    columns = list(next(iter(results["tokens_per_second"].values())))
    rows = [[name, *(shown(way[column]) for column in columns)] for name, way in results["tokens_per_second"].items()]
    headings = [column.replace("_", " ") for column in columns]
    print_table(f"tokens per second, prompt of {PREFILL}, {DECODE} written", ["", *headings], rows)
    model = LanguageModel.load(file)
    results["profile_ms"] = profile(model, model.tokenizer.encode(PROMPT * 20)[:PREFILL], options.repeats)
    rows = [[of, part, f"{ms:.2f}"] for of, parts in results["profile_ms"].items() for part, ms in parts.items()]
    print_table("ms of a token and of a prompt, in parts, numpy", ["", "", "ms"], rows)
    if sys.platform == "linux":
        results["memory_mib"] = memory(file)
        print_table("peak memory in MiB", ["", "MiB"], [[k, f"{v:.1f}"] for k, v in results["memory_mib"].items()])
    if options.text:
        results["perplexity"] = perplexities(file, options.text)
        print_table("perplexity", ["", ""], [[k, f"{v:.4f}"] for k, v in results["perplexity"].items()])
    save("smollm2", results)


if __name__ == "__main__":
    main()
