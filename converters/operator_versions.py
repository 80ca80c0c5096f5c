"""Which operators a version of a domain has, by what onnx and ONNX Runtime know. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import onnx
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as _native

from qdefense.converters.reading import every_graph, plain_domain

MICROSOFT = "com.microsoft"
_SHOWN = 120
# ONNX Runtime's optimizer makes these, in ONNX's own domain, of a file of any version.
_MADE_BY_RUNTIME = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})


def quoted(text: str) -> str:
    """The text in quotes on one printable line, cut where it is long."""
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def operator_label(node: str, op_type: str, domain: str, version: int) -> str:
    """What an error says of a node: its name, operator, domain and version, 0 where the file states none."""
    stated = f"opset {version}" if version else "no stated opset"
    return f"node {quoted(node)}: operator {quoted(op_type)} of domain {quoted(domain or 'ai.onnx')}, {stated}"


def stated_versions(model: onnx.ModelProto) -> dict[str, int]:
    """The version of each domain that the file says it uses."""
    return {plain_domain(entry.domain): entry.version for entry in model.opset_import}


def version_problem(op_type: str, domain: str, version: int) -> str:
    """Why no runtime has a meaning for the operator in this version of its domain; empty where one has."""
    known = _runtime_domains()
    if domain not in known:
        return f"ONNX Runtime has no operators of this domain, its own are {sorted(filter(None, known))}"
    if version < 1:
        return "the file states no version of this domain"
    if domain == "":
        return _onnx_problem(op_type, version)
    if domain == MICROSOFT and version > 1:
        return "this domain has version 1 only"
    return "" if op_type in known[domain] else "ONNX Runtime has no such operator"


def _onnx_problem(op_type: str, version: int) -> str:
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        return f"onnx {onnx.__version__} knows versions up to {newest}; export the model with one of those"
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        if op_type in _MADE_BY_RUNTIME:
            return ""
        if not onnx.defs.has(op_type):
            return "ONNX has no such operator"
        first = min(
            schema.since_version
            for schema in onnx.defs.get_all_schemas_with_history()
            if schema.name == op_type and schema.domain == ""
        )
        return f"ONNX has it from version {first} on"
    return f"ONNX withdrew it in version {schema.since_version}" if schema.deprecated else ""


def last_change(op_type: str, version: int) -> int:
    """The version in which ONNX last changed the operator up to this one; 0 for one that only ONNX Runtime has."""
    try:
        return int(onnx.defs.get_schema(op_type, version, "").since_version)
    except onnx.defs.SchemaError:
        return 0


@cache
def _runtime_domains() -> Mapping[str, frozenset[str]]:
    names: dict[str, set[str]] = {}
    for schema in _native.get_all_operator_schema():
        names.setdefault(schema.domain, set()).add(schema.name)
    return {domain: frozenset(found) for domain, found in names.items()}


def first_problem(model: onnx.ModelProto) -> str:
    """The first node of a file that no runtime has a meaning for, with the reason; empty where there is none."""
    versions, local = stated_versions(model), {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model):
        domain = plain_domain(node.domain)
        problem = version_problem(node.op_type, domain, versions.get(domain, 0))
        if problem and (node.domain, node.op_type) not in local:
            return f"{_label(node, versions)}: {problem}"
    return ""


def load_refusal(data: bytes, reason: str) -> str:
    """What to say of a file that ONNX Runtime won't load: its reason, and the node at fault if one can be told."""
    try:
        model = onnx.load_from_string(data)
    except DecodeError:
        culprit = ""
    else:
        culprit = first_problem(model) or _named_in(reason, model)
    return f"ONNX Runtime cannot load the file: {reason}" + (f" ({culprit})" if culprit else "")


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in every_graph(model.graph):
        yield from graph.node


def _label(node: onnx.NodeProto, versions: Mapping[str, int]) -> str:
    domain = plain_domain(node.domain)
    named = node.name or next(filter(None, node.output), "")
    return operator_label(named, node.op_type, domain, versions.get(domain, 0))


def _named_in(reason: str, model: onnx.ModelProto) -> str:
    """The node that the runtime's reason names in one of its ways, which leave out operator, domain or version."""
    for node in _nodes(model):
        forms = (f"({node.name})", f'("{node.name}",', f"Name:'{node.name}'", f"with name '{node.name}'")
        if node.name and any(form in reason for form in forms):
            return _label(node, stated_versions(model))
    return ""
