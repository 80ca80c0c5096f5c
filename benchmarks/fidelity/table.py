"""The page: README.md from preface.md and the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cells import NETWORKS, passes, schemes
from parting import inexact

Record = dict[str, Any]


def write_page(folder: Path, records: Sequence[Record], training: Sequence[Record], missing: int) -> None:
    """Write README.md beside ``preface.md``."""
    preface = (folder / "preface.md").read_text(encoding="utf-8").rstrip()
    ordered = in_order(records)
    measured = [record for record in ordered if not record["refused"]]
    parts = [
        preface,
        "## State\n\n" + state(ordered, missing),
        "## Marks\n\n" + "\n".join(marks(measured)),
        "## Cells that miss their mark\n\n" + "\n".join(failures(measured)),
        "## Cells that were refused\n\n" + "\n".join(refusals(ordered)),
        *(f"## {network.name}\n\n" + "\n".join(table(ordered, network.name)) for network in NETWORKS),
        "## Training\n\n" + "\n".join(trained(training)),
        "## Machine\n\n" + "\n".join(machines(ordered)),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def in_order(records: Iterable[Record]) -> list[Record]:
    """By network, scheme and batch as the benchmark names them; of a cell measured twice the newer record."""
    networks = {network.name: place for place, network in enumerate(NETWORKS)}
    places = {name: place for place, name in enumerate(schemes())}
    newest = {(r["network"], r["scheme"], r["batch"]): r for r in records if r["scheme"] in places}
    return sorted(newest.values(), key=lambda r: (networks[r["network"]], places[r["scheme"]], r["batch"] or 0))


def state(records: Sequence[Record], missing: int) -> str:
    """How much of the table is there."""
    refused = [record for record in records if record["refused"]]
    failed = sum(not passes(record) for record in records if not record["refused"])
    reached = len(records) - len(refused) - failed
    rest = f"{missing} are missing: the command goes on with them." if missing else "None is missing."
    return f"{reached} cells reach their mark, {failed} miss it, {len(refused)} were refused. {rest}"


def marks(records: Sequence[Record]) -> list[str]:
    """Cells that reach their mark, of those measured, by network and mark."""
    columns = ("bit-exact", "top-1 and the operator named", "top-1", "logits")
    lines = [f"| network | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for network in NETWORKS:
        mine = [record for record in records if record["network"] == network.name]
        counts = []
        for column in columns:
            those = [record for record in mine if record["expectation"] == column]
            counts.append(f"{sum(map(passes, those))} of {len(those)}" if those else "")
        lines.append(f"| {network.name} | {' | '.join(counts)} |")
    return lines


def failures(records: Sequence[Record]) -> list[str]:
    """One line for each cell that misses its mark."""
    return [
        f"- {named(record)}: expected {record['expectation']}; bit-exact rows {record['bit_exact_rows']:.4f}, top-1 "
        f"{record['top1_agreement']:.4f}, difference {number(record['relative_difference'])} of the largest logit; "
        f"{where(record) or 'no operator was found'}"
        for record in records
        if not passes(record)
    ] or ["None."]


def refusals(records: Sequence[Record]) -> list[str]:
    """One line for each cell that was refused, with the reason."""
    return [f"- {named(record)}: {record['refused']}" for record in records if record["refused"]] or ["None."]


def table(records: Sequence[Record], network: str) -> list[str]:
    """Every measured cell of one network."""
    lines = [
        "| scheme | expected | reached | top-1 | bit-exact rows | max difference / largest logit | accuracy "
        "| float operators before a Quantize | first operator apart |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {record['scheme']}{batch(record)} | {record['expectation']} | {'yes' if passes(record) else '**no**'} "
        f"| {record['top1_agreement']:.4f} | {record['bit_exact_rows']:.4f} | {number(record['relative_difference'])} "
        f"| {record['accuracy']:.4f} | {counted(inexact(record['float_operators_before_a_quantize']))} "
        f"| {where(record)} |"
        for record in records
        if record["network"] == network and not record["refused"]
    )
    return lines


def named(record: Record) -> str:
    return f"{record['network']}, {record['scheme']}{batch(record)}"


def batch(record: Record) -> str:
    return "" if record["batch"] is None else f", batch {record['batch']}"


def number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return "0" if value == 0 else f"{value:.1e}"


def counted(operators: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in operators.items())


def where(record: Record) -> str:
    found = record["parts_at"]
    if found is None:
        return ""
    through = "" if found["rounded_by"] is None else ", rounded by the Quantize after it"
    return f"{found['operator']} `{found['node']}`{through} ({found['different']:.1e} of the values)"


def trained(training: Sequence[Record]) -> list[str]:
    lines = [
        "| network | optimizer | epochs | parameters' file, bytes | CPU s | s | load |",
        "|---|---|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {r['network']} | {r['recipe']['optimizer']} | {r['recipe']['epochs']} | {r['size_bytes']} "
        f"| {r['cpu_seconds']} | {r['seconds']} | {r['load'][0]:.1f} |"
        for r in training
    )
    return lines


def machines(records: Sequence[Record]) -> list[str]:
    """Each machine and set of versions that gave a record."""
    return sorted(
        {
            f"- {r['runtime']['machine']} {' '.join(r['runtime']['isa'])}; "
            + ", ".join(f"{name} {version}" for name, version in r["versions"].items())
            for r in records
        }
    )
