"""Coverage-guided fuzzing of one reader with Atheris (``pip install atheris``); not part of the suite.

    python tests/fuzz/guided.py gguf -max_total_time=600

The first argument is a format of seeds.py, the others are libFuzzer's. What it finds is written to ``crash-*`` in the
current folder; reproduce it with the same command and that file as the last argument.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["quantcore"]):
    import quantcore.formats.awq
    import quantcore.formats.compressed_tensors
    import quantcore.formats.gguf
    import quantcore.formats.gptq
    import quantcore.formats.hqq
    import quantcore.formats.mlx
    import quantcore.formats.onnx
    import quantcore.formats.reading
    import quantcore.formats.safetensors  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))

from seeds import SEEDS, Files, write
from subject import exercise

_SPLIT = b"\xff\xfe--next file--\xff\xfe"
"""What stands between the files of a checkpoint, so that a fuzzer's bytes can change them all."""


def joined(files: Files) -> bytes:
    """The files of a checkpoint as one string of bytes."""
    return _SPLIT.join(files[name] for name in sorted(files))


def main() -> None:
    """Fuzz the format that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in SEEDS:
        raise SystemExit(f"usage: guided.py {'|'.join(SEEDS)} [libFuzzer's options]")
    seed = SEEDS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name) / "checkpoint", Path(name) / "corpus"
        corpus.mkdir()
        (corpus / "seed").write_bytes(joined(seed))

        def once(data: bytes) -> None:
            parts = data.split(_SPLIT)
            exercise(write(folder, dict(zip(sorted(seed), parts, strict=False))))

        atheris.Setup([*sys.argv, str(corpus)] if all(a.startswith("-") for a in sys.argv[1:]) else sys.argv, once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
