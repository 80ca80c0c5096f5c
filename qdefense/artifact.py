"""Artifact: the file that ships, its bytes read once, with its contract and the facts read off its graph."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from qdefense.converters.contract import InputContract, StatedContract, read_contract
from qdefense.converters.external_data import with_external_data
from qdefense.converters.inspection import Inspection, inspect_parsed
from qdefense.converters.narrowing import fixed_values
from qdefense.converters.reading import every_graph, parse_model, read_file, safe_text
from qdefense.converters.runtime_facts import RuntimeFacts, runtime_facts


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """The bytes of one ONNX file and what follows from them alone; the path is kept for people only.

    ``sha256`` and ``size_bytes`` are those of the file itself. ``data`` holds the weights of external files, too;
    ``external_files`` are their names and digests.
    """

    data: bytes
    sha256: str
    size_bytes: int
    contract: InputContract
    inspection: Inspection
    external_files: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, path: Path, stated: StatedContract | None = None) -> Artifact:
        """Read, check and describe a file; neither it nor its external files are ever opened again.

        Raises:
            OSError: the file cannot be read.
            FileRefusedError: it is not an ONNX file that may be loaded.
            ContractError: its input or output is nothing this tool can drive.
        """
        return cls.from_bytes(read_file(path), stated, folder=path.parent)

    @classmethod
    def from_bytes(cls, data: bytes, stated: StatedContract | None = None, *, folder: Path | None = None) -> Artifact:
        """The same for bytes that are at hand; external files are looked for in ``folder``."""
        whole, external = (data, {}) if folder is None else with_external_data(data, folder)
        model = parse_model(whole)
        contract = read_contract(model, stated)
        fixed_values(model, contract)  # a value that its input cannot hold is told before anything runs
        return cls(
            data=whole,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            contract=contract,
            inspection=inspect_parsed(model, size_bytes=len(whole)),
            external_files=tuple(sorted(external.items())),
        )

    def rewritten(self, data: bytes) -> Artifact:
        """Another file with this one's graph and contract, and other numbers in it, all of them in ``data``."""
        inspection = inspect_parsed(parse_model(data), size_bytes=len(data))
        digest = hashlib.sha256(data).hexdigest()
        return Artifact(data=data, sha256=digest, size_bytes=len(data), contract=self.contract, inspection=inspection)

    @property
    def integer(self) -> bool:
        """Whether any of it runs in integers."""
        return self.inspection.scheme != "fp32"

    @property
    def batch_coupled(self) -> bool:
        """Whether one image's logits depend on the others in its batch."""
        return bool(self.batch_coupled_layers)

    @cached_property
    def fixed_inputs(self) -> dict[str, NDArray[np.generic]]:
        """What is fed to the inputs that are no image."""
        return fixed_values(onnx.load_from_string(self.data), self.contract) if self.contract.fixed_inputs else {}

    @cached_property
    def batch_coupled_layers(self) -> tuple[str, ...]:
        """Names of the quantizers, in branches too, that take one scale from a whole batch."""
        graphs = every_graph(onnx.load_from_string(self.data).graph)
        nodes = [node for graph in graphs for node in graph.node if node.op_type in _BATCH_COUPLED]
        return tuple(safe_text(node.name or next(iter(node.output), "")) for node in nodes)

    @cached_property
    def runtime_facts(self) -> RuntimeFacts:
        """What ONNX Runtime makes of it on this CPU.

        Raises:
            FileRefusedError: ONNX Runtime can't load the file.
        """
        return runtime_facts(onnx.load_from_string(self.data), self.inspection.layers)


_BATCH_COUPLED = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul"})
