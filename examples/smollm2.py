"""The command ``quantcore smollm2``: chat with SmolLM2-135M-Instruct, its weights packed, on any backend."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, TextIO, cast, get_args

import typer
from rich.console import Console

import quantcore
from quantcore.hookspecs import Precision

from . import backend_choice, options
from .backend_choice import BackendChoiceError, Choice
from .fetch import SMOLLM2, FetchError, fetch_model
from .generate import Timing, generate
from .gguf_tokenizer import TokenizerError
from .language_model import LanguageModel, ModelError
from .options import OptionError

FAILED = 1
WRONG_USE = 2


def smollm2(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")] = "What is the capital of France?",
    complete: Annotated[bool, typer.Option("--complete", help="Continue the text instead of answering it.")] = False,
    backend: Annotated[str, typer.Option(metavar="NAME", help="numpy, mlx, torch, ...")] = "numpy",
    precision: Annotated[str, typer.Option(metavar="default|highest|fast", help="Of products.")] = "default",
    max_tokens: Annotated[str, typer.Option(metavar="N", help="Tokens to write at most.")] = "128",
    temperature: Annotated[str, typer.Option(metavar="T", help="0 takes the likeliest token.")] = "0",
    seed: Annotated[int, typer.Option(min=0, help="Of the draws where the temperature isn't 0.")] = 0,
    model: Annotated[
        str | None, typer.Option(metavar="FILE", help="GGUF file of SmolLM2.", show_default="fetched into the cache")
    ] = None,
) -> None:
    """Chat with SmolLM2-135M-Instruct, or have it continue a text, streaming; then print tokens per second."""
    messages = Console(stderr=True)
    with _errors_in_one_line(messages), _warnings_in_one_line(messages):
        prompt = options.parse_text(prompt, "prompt")
        count, heat = parse_count(max_tokens), parse_temperature(temperature)
        chosen_precision = parse_precision(precision)
        names = options.parse_names(backend)
        if len(names) != 1:
            raise OptionError(f"--backend must name one backend; got {backend!r}")
        (choice,) = backend_choice.named(names)
        loaded = LanguageModel.load(_model_file(model, messages), choice.library)
        ids = loaded.tokenizer.encode(prompt) if complete else loaded.tokenizer.encode_chat(prompt)
        room = loaded.config.context_length - len(ids)
        if room < count:
            raise OptionError(
                f"the prompt takes {len(ids)} tokens, which with --max-tokens {count} is more than the context of "
                f"{loaded.config.context_length}"
            )
        timing = Timing()
        with _on(choice), quantcore.use_precision(chosen_precision):
            if complete:
                _write(prompt)
            for piece in stream(loaded, generate(loaded, ids, count, heat, seed, timing)):
                _write(piece)
        _write("\n")
        messages.print(summary(choice.backend, timing), markup=False, highlight=False)


def stream(model: LanguageModel, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text of tokens as they come, holding back a character whose bytes aren't all there."""
    ids: list[int] = []
    written = 0
    for token in tokens:
        ids.append(token)
        text = model.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[written:]
            written = len(text)
    yield model.tokenizer.decode(ids)[written:]


def summary(backend: str, timing: Timing) -> str:
    """Say in one line how fast the prompt was read and the answer written, by the median token."""
    parts = []
    if timing.prefill_tokens:
        rate = timing.prefill_tokens / timing.prefill_seconds
        parts.append(f"prefill {timing.prefill_tokens} tokens, {rate:.1f} tokens/s")
    if timing.token_seconds:
        parts.append(f"decode {len(timing.token_seconds)} tokens, {timing.decode_rate:.1f} tokens/s")
    return f"{backend}: {'; '.join(parts)}"


def parse_count(text: str) -> int:
    """Read ``--max-tokens``."""
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 9 and int(text) >= 1):
        raise OptionError(f"--max-tokens must be a whole number from 1; got {text!r}")
    return int(text)


def parse_precision(text: str) -> Precision:
    """Read ``--precision``."""
    if text not in get_args(Precision):
        raise OptionError(f"--precision must be one of {', '.join(get_args(Precision))}; got {text!r}")
    return cast(Precision, text)


def parse_temperature(text: str) -> float:
    """Read ``--temperature``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise OptionError(f"--temperature must be a number from 0; got {text!r}")
    return value


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _model_file(chosen: str | None, messages: Console) -> Path:
    if chosen is None:
        return fetch_model(messages, SMOLLM2) / SMOLLM2.files[0].name
    file = Path(chosen).expanduser()
    if not file.is_file():
        raise OptionError(f"--model must be a GGUF file; there is none at {chosen!r}")
    return file


@contextmanager
def _errors_in_one_line(messages: Console) -> Iterator[None]:
    try:
        yield
    except (OptionError, BackendChoiceError, ModelError, TokenizerError, quantcore.FormatError) as error:
        _fail(messages, error, WRONG_USE)
    except (FetchError, quantcore.QuantcoreError) as error:
        _fail(messages, error, FAILED)


@contextmanager
def _warnings_in_one_line(messages: Console) -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        messages.print(f"Note: {message}", markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _on(choice: Choice) -> AbstractContextManager[None]:
    """Where the backend is the library's own, its arrays choose it, and may fall back with a note."""
    return nullcontext() if choice.backend == choice.library else quantcore.use_backend(choice.backend)


def _fail(messages: Console, error: Exception, code: int) -> None:
    text = " ".join(f"Error: {error}".split())
    messages.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code) from error
