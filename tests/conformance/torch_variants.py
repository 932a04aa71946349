"""The torch backend under the kit in two more ways: compiled, and on the path that serves every device but the CPU."""

from collections.abc import Callable
from typing import Any

import torch

import quantcore as qc
from quantcore.testing.bench import Bench
from quantcore_backends.torch_backend import TorchBackend, tiles

TRACED = ("dequantize", "dot", "matmul", "tensordot", "take", "gather_dot")


class CompiledBench(Bench):
    """Every call that the kit makes goes through ``torch.compile(fullgraph=True)``."""

    compiler = "aot_eager"

    def run(self, op: str, call: Callable[[str], Any], *asked: Any, **told: Any) -> Any:
        def compiled(backend: str) -> Any:
            torch._dynamo.reset()
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            result = torch.compile(call, fullgraph=True, backend=self.compiler)(backend)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1, "nothing was compiled"
            return result

        refused = op not in TRACED or (
            op != "tensordot" and self.refusal(op, *asked, precision=told.get("precision")) != ""
        )
        return super().run(op, call if refused else compiled, *asked, **told)


class Tiles(TorchBackend):
    """The torch backend with the CPU's kernels left out."""

    @qc.hookimpl
    def backend_info(self) -> qc.BackendInfo:
        return qc.BackendInfo(
            api_version=1, name="torch-tiles", library="torch", array_types=("torch:Tensor",), priority=-1
        )

    @qc.hookimpl
    def prepare(self) -> None:
        self._ops = self._products = tiles
