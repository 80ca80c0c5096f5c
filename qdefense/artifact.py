"""Artifact: the file that ships, its bytes read once, with its contract and the facts read off its graph."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx

from qdefense.converters.contract import InputContract, read_contract
from qdefense.converters.inspection import Inspection, inspect_model
from qdefense.converters.reading import every_graph, parse_model, safe_text
from qdefense.converters.runtime_graph import optimized_model


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """The bytes of one ONNX file and what follows from them alone; the path is kept for people only."""

    data: bytes
    sha256: str
    contract: InputContract
    inspection: Inspection

    @classmethod
    def read(cls, path: Path) -> Artifact:
        """Read, check and describe a file; it is never opened again.

        Raises:
            OSError: the file cannot be read.
            FileRefusedError: it is not an ONNX file that may be loaded.
            ContractError: its input or output is nothing this tool can drive.
        """
        return cls.from_bytes(path.read_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Artifact:
        """The same for bytes that are at hand."""
        model = parse_model(data)
        return cls(
            data=data,
            sha256=hashlib.sha256(data).hexdigest(),
            contract=read_contract(model),
            inspection=inspect_model(data),
        )

    @property
    def integer(self) -> bool:
        """Whether any of it runs in integers."""
        return self.inspection.scheme != "fp32"

    @property
    def batch_coupled(self) -> bool:
        """Whether one image's logits depend on the others in its batch."""
        return bool(self.batch_coupled_layers)

    @cached_property
    def batch_coupled_layers(self) -> tuple[str, ...]:
        """Names of the quantizers, in branches too, that take one scale from a whole batch."""
        graphs = every_graph(onnx.load_from_string(self.data).graph)
        nodes = [node for graph in graphs for node in graph.node if node.op_type in _BATCH_COUPLED]
        return tuple(safe_text(node.name or next(iter(node.output), "")) for node in nodes)

    @cached_property
    def runtime_layers(self) -> tuple[str, ...]:
        """Names of the nodes that ONNX Runtime really runs."""
        graph = onnx.load_from_string(optimized_model(self.data)).graph
        return tuple(node.name for node in graph.node)


_BATCH_COUPLED = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul"})
