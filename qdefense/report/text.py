"""The report for a terminal: verdict and reason first, then what it rests on. Every foreign string is made harmless."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qdefense.converters.inspection import Inspection
from qdefense.fidelity import FidelityCertificate
from qdefense.findings import Finding, ScanResult, Threshold
from qdefense.report.escaping import harmless
from qdefense.report.model import Environment, Report, Subject

_COLOURS = {"PASSED": "bold green", "FAILED": "bold red", "INCOMPLETE": "bold yellow", "REFUSED": "bold red"}
_VERDICTS = {"CLEAN": "green", "BACKDOORED": "bold red", "NOT_MEASURED": "yellow", "NOT_APPLICABLE": "yellow"}
_CLASSES_SHOWN = 12
_NAMES_SHOWN = 5


def print_report(report: Report, console: Console) -> None:
    """Show a report."""
    parts: list[RenderableType] = [_gate(report), Text(), _facts(report.subject, report.environment)]
    if report.certificate is not None:
        parts += [Text(), certificate_table(report.certificate)]
    for finding in report.findings:
        parts += [Text(), _finding(finding)]
    console.print(Group(*parts), highlight=False)


def _gate(report: Report) -> RenderableType:
    gate = report.gate
    title = Text.assemble((gate.outcome, _COLOURS[gate.outcome]), f"  (exit code {gate.exit_code})")
    return Group(title, *(_indented(Text(harmless(reason))) for reason in gate.reasons))


def _indented(content: RenderableType) -> Padding:
    return Padding(content, (0, 0, 0, 2), expand=False)


def fact_grid(rows: Iterable[tuple[str, str]]) -> Table:
    """Labels and values in two columns; only the values give way."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(name), Text(harmless(value)))
    return grid


def _facts(subject: Subject, environment: Environment) -> Table:
    rows = [("file", subject.file)]
    if subject.sha256 is not None:
        rows.append(("sha256", subject.sha256))
    if subject.inspection is not None:
        rows += inspection_rows(subject.inspection)
    if subject.data is not None:
        data = subject.data
        rows.append(("data", f"{data.source}: {data.images} images, {data.classes} classes"))
    if subject.clean_accuracy is not None:
        rows.append(("clean accuracy", f"{subject.clean_accuracy.value:.2%} of {subject.clean_accuracy.images}"))
    return fact_grid([*rows, *_environment_rows(environment)])


def inspection_rows(found: Inspection) -> list[tuple[str, str]]:
    """The facts of an inspection that a person reads first."""
    saturating = len(found.saturation_layers)
    return [
        ("scheme", f"{found.scheme}, {found.granularity}" if found.granularity else found.scheme),
        (
            "integer share",
            f"{_share(found.integer_mac_share)} of MACs, {_share(found.integer_weight_share)} of weights",
        ),
        ("can saturate", f"{saturating} layers, on a CPU without VNNI" if saturating else "no layer"),
        ("gradient-blind", _first([f"{node.name} ({node.operator})" for node in found.gradient_blind_nodes])),
        *[("warning", warning) for warning in found.structure_warnings],
        *([("not finite", _first(found.nonfinite_initializers))] if found.nonfinite_initializers else []),
    ]


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _first(names: Sequence[str]) -> str:
    if not names:
        return "no node"
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _environment_rows(environment: Environment) -> list[tuple[str, str]]:
    runtime = environment.runtime
    rows = [("runtime", f"onnxruntime {runtime.onnxruntime}, {runtime.machine} {' '.join(runtime.isa)}")]
    if environment.profile is not None:
        profile = environment.profile
        rows.append(
            ("session", f"optimization {profile.optimization}, {profile.threads} threads, batch {profile.batch}")
        )
        operators = ", ".join(environment.saturating_operators)
        rows.append(("this CPU", f"saturates in int16: {operators}" if operators else "no operator saturates in int16"))
    if environment.memory_limited is False:
        rows.append(("memory", "the file ran without a memory limit, which only Linux has"))
    return rows


def certificate_table(certificate: FidelityCertificate) -> RenderableType:
    """The fidelity certificate: one row per input set, then the gradients."""
    state = "certified" if certificate.certified else "NOT certified"
    title = Text.assemble(("shadow ", "bold"), (state, "green" if certificate.certified else "yellow"))
    title.append(f": {harmless(certificate.reason)}")
    if not certificate.sets:
        return title
    table = plain_table("images", "n", "top-1", "RMS/spread", "max |diff|", "bit-exact rows", left=("images",))
    for entry in certificate.sets:
        table.add_row(
            entry.name,
            str(entry.n),
            f"{entry.top1_agreement:.4f}",
            "n/a" if entry.relative_rms is None else f"{entry.relative_rms:.2e}",
            "n/a" if entry.max_abs_logit_diff is None else f"{entry.max_abs_logit_diff:.2e}",
            f"{entry.bit_exact_rows:.1%}",
        )
    return Group(title, _indented(table), _indented(_gradient_line(certificate)))


def plain_table(*columns: str, left: tuple[str, ...], fold: str = "") -> Table:
    """A table without lines; of what does not fit the width, only the column ``fold`` gives way."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(
            name, justify="left" if name in left else "right", no_wrap=name != fold, overflow="fold", min_width=1
        )
    return table


def _gradient_line(certificate: FidelityCertificate) -> Text:
    check = certificate.gradients
    if check is None:
        return Text("gradients: not checked")
    right = "" if check.directional_rows is None else f", {check.directional_rows:.1%} right against differences"
    return Text(f"gradients: finite on {check.finite_rows:.1%}, non-zero on {check.nonzero_rows:.1%} of rows{right}")


def _finding(finding: Finding) -> RenderableType:
    title = Text.assemble(
        (f"{harmless(finding.defense)} ", "bold"), (finding.verdict.value, _VERDICTS[finding.verdict.value])
    )
    title.append(f": {harmless(finding.reason)}")
    lines: list[RenderableType] = [title]
    if finding.threshold is not None:
        lines.append(_indented(_threshold_line(finding.threshold)))
    lines.append(_indented(_cost_line(finding)))
    if isinstance(finding.result, ScanResult) and finding.result.classes:
        lines.append(_classes(finding.result))
    return Group(*lines)


def _threshold_line(threshold: Threshold) -> Text:
    alarm = "unknown" if threshold.false_alarm_rate is None else f"{threshold.false_alarm_rate:.1%}"
    return Text(f"threshold {threshold.value:g} ({threshold.source}), false-alarm rate {alarm}", style="dim")


def _cost_line(finding: Finding) -> Text:
    cost, settings = finding.cost, finding.settings
    budget = f"budget {harmless(str(settings['budget']))}, " if "budget" in settings else ""
    work = f"{cost.gradient_steps} gradient steps, {cost.forwards} forward rows"
    return Text(f"{budget}{work}, seed {finding.seed}", style="dim")


def _classes(result: ScanResult) -> RenderableType:
    table = plain_table(
        "rank", "class", "norm (px)", "index", "optimised ASR", "held-out ASR", left=("class",), fold="class"
    )
    for entry in result.classes[:_CLASSES_SHOWN]:
        table.add_row(
            str(entry.rank),
            Text(f"{entry.target_class} {harmless(entry.class_name)}"),
            "censored" if entry.norm is None else f"{entry.norm:.1f}",
            "" if entry.index is None else f"{entry.index:.2f}",
            "" if entry.optimised_asr is None else f"{entry.optimised_asr:.3f}",
            "" if entry.artifact_asr is None else f"{entry.artifact_asr:.3f}",
        )
    hidden = len(result.classes) - _CLASSES_SHOWN
    note = [Text(f"  and {hidden} more classes; --format json lists them all", style="dim")] if hidden > 0 else []
    return Group(_indented(table), *note)
