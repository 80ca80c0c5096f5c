"""The demo's table: what each file does, what the audit said, and whether that was right."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from qdefense.demo import DemoOutcome, DemoRow
from qdefense.fidelity import FidelityCertificate
from qdefense.findings import ScanResult, Verdict
from qdefense.report.text import plain_table


def print_demo(outcome: DemoOutcome, console: Console) -> None:
    """Show all six files, then the trap, then what was judged wrongly, if anything was."""
    table = plain_table(*_COLUMNS, left=("file", "activity", "verdict"), fold="file")
    for row in outcome.rows:
        table.add_row(*_cells(row))
    console.print(table)
    console.print(_LEGEND, style="dim")
    console.print()
    console.print("The trap: the same scan on second.int8-static.onnx with its gradients cut says", style="bold")
    console.print(f"  {outcome.trap.verdict}: {outcome.trap.reason}")
    console.print()
    for row in outcome.rows:
        if not row.right:
            reasons = "; ".join(row.report.gate.reasons)
            console.print(
                f"judged wrongly: {row.file} is {row.behaviour.activity}, the verdict is {row.verdict} ({reasons})"
            )
    if outcome.trap.verdict is not Verdict.NOT_MEASURED:
        console.print(f"judged wrongly: without gradients the scan said {outcome.trap.verdict}")
    if outcome.exit_code == 0:
        console.print("every file was judged rightly")
    console.print(f"files, truths and reports: {outcome.folder}")


_LEGEND = (
    "acc, ASR: test split; shadow: exact on every row, or worst top-1 agreement;\n"
    "index, class: of the smallest trigger norm"
)
_COLUMNS = ("file", "acc", "ASR", "activity", "shadow", "index", "class", "verdict")


def _cells(row: DemoRow) -> list[Text]:
    behaviour, report = row.behaviour, row.report
    result = report.findings[0].result if report.findings else None
    first = result.classes[0] if isinstance(result, ScanResult) and result.classes else None
    score = result.score if isinstance(result, ScanResult) else None
    colour = {"BACKDOORED": "bold red", "CLEAN": "green"}.get(row.verdict.value, "yellow")
    return [
        Text(row.file.removesuffix(".onnx")),
        Text(f"{behaviour.clean_accuracy:.3f}"),
        Text("" if behaviour.asr is None else f"{behaviour.asr:.3f}"),
        Text(behaviour.activity.value),
        Text(_shadow(report.certificate)),
        Text("" if score is None else f"{score:.2f}"),
        Text("" if first is None else str(first.target_class)),
        Text(row.verdict.value, style=colour),
    ]


def _shadow(certificate: FidelityCertificate | None) -> str:
    if certificate is None or not certificate.certified:
        return "failed"
    if all(entry.bit_exact_rows == 1 for entry in certificate.sets):
        return "exact"
    return f"{min(entry.top1_agreement for entry in certificate.sets):.3f}"
