"""The report for a terminal: verdict and reason first, then what it rests on. Every foreign string is made harmless."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from qdefense.converters.contract import InputContract
from qdefense.converters.inspection import Inspection
from qdefense.converters.runtime_facts import LevelEffect, RuntimeFacts
from qdefense.converters.weighted_operators import INT8_ACTIVATIONS
from qdefense.data.images import first_few
from qdefense.fidelity import FidelityCertificate
from qdefense.findings import (
    DatasetResult,
    FilterBoundary,
    FilterResult,
    Finding,
    RepairResult,
    ScanResult,
    Threshold,
)
from qdefense.rates import rounded_up
from qdefense.report.datasets import describe_flagged, describe_statistics, ranked_classes
from qdefense.report.escaping import harmless
from qdefense.report.model import Accuracy, Environment, Report, Subject
from qdefense.session import SessionProfile

_COLOURS = {"PASSED": "bold green", "FAILED": "bold red", "INCOMPLETE": "bold yellow", "REFUSED": "bold red"}
_VERDICTS = {
    "CLEAN": "green",
    "BACKDOORED": "bold red",
    "NOT_MEASURED": "yellow",
    "NOT_APPLICABLE": "yellow",
    "REPAIRED": "bold",
    "NOT_REPAIRED": "bold red",
}
_CLASSES_SHOWN = 12
_NAMES_SHOWN = 5
_CANDIDATES_SHOWN = 1
_ROWS_SHOWN = 20
_FOLDED = 10
_UNLIMITED = 1_000_000
_INT4 = frozenset({"int4", "uint4"})
_LEVEL_OPTION = "session.qdq_matmulnbits_accuracy_level"


def print_report(report: Report, console: Console) -> None:
    """Show a report; a table that does not fit is wider than the console, since a cropped number looks like another."""
    parts: list[RenderableType] = [_gate(report), Text(), _facts(report.subject, report.environment)]
    if report.certificate is not None:
        parts += [Text(), certificate_table(report.certificate)]
    for finding in report.findings:
        parts += [Text(), _finding(finding)]
    console.print(Group(*parts), highlight=False, crop=False)


def print_outcome(report: Report, console: Console) -> None:
    """Show the outcome and its reasons, where the rest is written to files."""
    console.print(_gate(report), highlight=False)


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
        grid.add_row(Text(harmless(name)), Text(harmless(value)))
    return grid


def _facts(subject: Subject, environment: Environment) -> Table:
    rows = [("file", subject.file)]
    if subject.sha256 is not None:
        rows.append(("sha256", subject.sha256))
    rows += [(f"with {name}", digest) for name, digest in subject.external_files.items()]
    if subject.contract is not None:
        rows += contract_rows(subject.contract)
    if subject.inspection is not None:
        rows += inspection_rows(subject.inspection, subject.runtime_facts)
    if subject.data is not None:
        data = subject.data
        labels = f"{data.classes} classes" if data.labelled else "no labels"
        rows.append(("data", f"{data.source}: {data.images} images, {labels}"))
        rows += [("read as", data.detection)] if data.detection else []
        rows += [("note", note) for note in data.notes]
        rows.append(("clean accuracy", accuracy_text(subject.clean_accuracy)))
    if subject.training_data is not None:
        training = subject.training_data
        labels = f"{training.classes} classes" if training.labelled else "no labels"
        rows.append(("training data", f"{training.source}: {training.images:,} images, {labels}"))
        rows += [("note", note) for note in training.notes]
    if subject.reference is not None:
        rows.append(("reference", f"{subject.reference.file}, sha256 {subject.reference.sha256[:16]}"))
    if subject.inputs is not None:
        rows.append(("inputs", f"{subject.inputs.source}: {subject.inputs.images} images"))
        rows += [("note", note) for note in subject.inputs.notes]
    rows += [
        (
            "other contract",
            f"{entry.accuracy:.2%} of {entry.images}, where this one has {entry.own_accuracy:.2%}: {entry.description}",
        )
        for entry in subject.candidates[:_CANDIDATES_SHOWN]
    ]
    return fact_grid([*rows, *environment_rows(environment, subject.inspection, subject.runtime_facts)])


def contract_rows(contract: InputContract) -> list[tuple[str, str]]:
    """How the file is fed and how its answer is read."""
    shape = ("3", str(contract.height), str(contract.width))
    axes = shape if contract.layout == "NCHW" else (*shape[1:], shape[0])
    fed = f"{contract.dtype} ({', '.join((str(contract.batch or 'N'), *axes))}), {contract.channels}"
    scaling = f"in [{contract.range[0]:g}, {contract.range[1]:g}]"
    if any(contract.mean) or contract.std != (1.0, 1.0, 1.0):
        mean, std = (", ".join(f"{value:g}" for value in triple) for triple in (contract.mean, contract.std))
        scaling += f", minus ({mean}), over ({std})"
    resized = "" if contract.resize == "none" else f", images resized: {contract.resize}"
    fixed = ", ".join(f"{name} = {value:g}" for name, value in contract.fixed_inputs.items())
    return [
        ("input", f"{contract.input_name}: {fed} {scaling}{resized}; contract from the {contract.source}"),
        *([("fixed inputs", fixed)] if fixed else []),
        ("output", f"{contract.output_name}: {contract.head}, {contract.classes} classes"),
    ]


def inspection_rows(found: Inspection, run: RuntimeFacts | None = None) -> list[tuple[str, str]]:
    """The facts of an inspection that a person reads first; where the runtime was asked, what it does."""
    shares: Inspection | RuntimeFacts = found if run is None else run
    source = "predicted" if run is None else "as ONNX Runtime runs it"
    saturating = len(found.saturation_layers)
    return [
        ("scheme", _scheme(found)),
        (
            "integer share",
            f"{_share(shares.integer_mac_share)} of MACs, {_share(shares.integer_weight_share)} of weights, {source}",
        ),
        *(
            [("run in float", f"though stored as integers: {_first(run.float_layers)}")]
            if run and run.float_layers
            else []
        ),
        ("can saturate", f"{_layers(saturating)}, on a CPU without VNNI" if saturating else "no layer"),
        *([("saturates here", _first(run.saturation_layers, "no layer"))] if run and saturating else []),
        ("gradient-blind", _first([f"{node.name} ({node.operator})" for node in found.gradient_blind_nodes])),
        *[("warning", warning) for warning in found.structure_warnings],
        *([("not finite", _first(found.nonfinite_initializers))] if found.nonfinite_initializers else []),
    ]


def accuracy_text(accuracy: Accuracy | None) -> str:
    """The clean accuracy, or that nobody measured it."""
    if accuracy is None:
        return "NOT_MEASURED"
    if accuracy.source == "stated":
        return f"{accuracy.value:.2%}, stated by the user, not measured"
    return f"{accuracy.value:.2%} of {accuracy.images}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _scheme(found: Inspection) -> str:
    """The granularity is the finest of any layer: where others are coarser, in how many of them it is found."""
    if not found.granularity:
        return found.scheme
    weighted = [layer for layer in found.layers if layer.weights]
    count = sum(layer.granularity == found.granularity for layer in weighted)
    blocks = sorted({layer.block_size for layer in found.layers if layer.block_size is not None})
    sizes = f" of {', '.join(map(str, blocks))}" if blocks else ""
    share = f" in {count} of {_layers(len(weighted))}" if count < len(weighted) else ""
    return f"{found.scheme}, {found.granularity}{sizes}{share}"


def optimization_rows(found: Inspection, run: RuntimeFacts) -> list[tuple[str, str]]:
    """What each level of graph optimization changes."""
    levels = [(f"level {effect.level}", _effect(effect)) for effect in run.levels]
    return [*_packed_rows(found, run), ("nodes shipped", str(sum(found.operators.values()))), *levels]


def _packed_rows(found: Inspection, run: RuntimeFacts) -> list[tuple[str, str]]:
    """At which accuracy MatMulNBits multiplies: part of the logits, and the session's choice where it made the node."""
    groups = Counter(
        (ran.accuracy_level, layer.operator == "MatMulNBits")
        for layer, ran in zip(found.layers, run.layers, strict=True)
        if ran.accuracy_level is not None
    )
    return [
        (
            "INT4 products",
            f"{_layers(n)} at accuracy level {level}{_ACTIVATIONS.get(level, '')}; {_source(level, shipped)}",
        )
        for (level, shipped), n in groups.items()
    ]


_ACTIVATIONS = {0: " (the runtime's choice)", 1: " (float32)", INT8_ACTIVATIONS: " (INT8 activations)"}


def _source(level: int, shipped: bool) -> str:
    if shipped:
        return "the file says so"
    return f"ONNX Runtime's own is {INT8_ACTIVATIONS} (INT8 activations), so deploy with {_LEVEL_OPTION}={level}"


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _effect(effect: LevelEffect) -> str:
    signed = (("-", effect.removed), ("+", effect.added))
    changes = [f"{sign}{count} {name}" for sign, counts in signed for name, count in counts.items()]
    return f"{effect.nodes} nodes: {', '.join(changes) or 'nothing changes'}"


def _first(names: Sequence[str], none: str = "no node") -> str:
    if not names:
        return none
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def environment_rows(
    environment: Environment, inspection: Inspection | None, run: RuntimeFacts | None = None
) -> list[tuple[str, str]]:
    """Runtime, session and CPU, as a person reads them."""
    runtime = environment.runtime
    rows = [("runtime", f"onnxruntime {runtime.onnxruntime}, {runtime.machine} {' '.join(runtime.isa)}")]
    if environment.profile is not None:
        profile = environment.profile
        threads = f"{profile.threads} thread{'s' * (profile.threads != 1)}"
        session = f"optimization {profile.optimization}, {profile.arithmetic} arithmetic, {threads}"
        rows.append(("session", f"{session}, batch {profile.batch}"))
        rows.append(("this CPU", _saturation(environment.saturating_operators, profile)))
        rows += _int4_products(profile, inspection, run)
    if environment.memory_limited is False:
        rows.append(("memory", "the file ran without a memory limit, which only Linux has"))
    return rows


def _saturation(operators: Sequence[str], profile: SessionProfile) -> str:
    if not operators:
        return "no operator saturates in int16"
    spared = "; the session does not, its arithmetic is exact" if profile.arithmetic == "exact" else ""
    return f"saturates in int16: {', '.join(operators)}{spared}"


def _int4_products(
    profile: SessionProfile, inspection: Inspection | None, run: RuntimeFacts | None
) -> list[tuple[str, str]]:
    """What was seen to run; where that is not known, what the session would do with such products."""
    if inspection is not None and run is not None:
        return _packed_rows(inspection, run)
    if inspection is None or _INT4.isdisjoint(inspection.weight_types):
        return []
    level = profile.matmulnbits_accuracy_level
    text = f"accuracy level {level}; ONNX Runtime's own is 4 (INT8 activations), so deploy with {_LEVEL_OPTION}={level}"
    return [("INT4 products", text)]


def certificate_table(certificate: FidelityCertificate) -> RenderableType:
    """The fidelity certificate: one row per input set, then the gradients."""
    state = "certified" if certificate.certified else "NOT certified"
    title = Text.assemble(("shadow ", "bold"), (state, "green" if certificate.certified else "yellow"))
    title.append(f": {harmless(certificate.reason)}")
    if not certificate.sets:
        return title
    table = plain_table(
        "images", "n", "top-1", "RMS/spread", "max |diff|", "bit-exact rows", left=("images",), indent=2
    )
    for entry in certificate.sets:
        table.add_row(
            entry.name,
            str(entry.n),
            f"{entry.top1_agreement:.4f}",
            "n/a" if entry.relative_rms is None else f"{entry.relative_rms:.2e}",
            "n/a" if entry.max_abs_logit_diff is None else f"{entry.max_abs_logit_diff:.2e}",
            f"{entry.bit_exact_rows:.1%}",
        )
    lines = [describe_gradients(certificate)]
    lines += [] if certificate.arithmetic is None else [certificate.arithmetic.summary]
    return Group(title, table, *(_indented(Text(harmless(line))) for line in lines))


class _WholeValues(Table):
    """Wider than the console where its columns are: of a cropped 187k nobody could tell that it is not a 1.

    Only a column that may wrap gives way, and down to `_FOLDED` characters.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        natural = super().__rich_measure__(console, options.update(max_width=_UNLIMITED)).maximum
        spare = sum(max(0, _widest(column) - _FOLDED) for column in self.columns if not column.no_wrap)
        yield from super().__rich_console__(console, options.update(max_width=max(options.max_width, natural - spare)))


def _widest(column: Column) -> int:
    return max(cell_len(str(cell)) for cell in (column.header, *column.cells))


def plain_table(*columns: str, left: tuple[str, ...], fold: str = "", indent: int = 0) -> Table:
    """A table without lines; of what does not fit the width, only the column ``fold`` gives way."""
    table = _WholeValues(box=None, header_style="dim", padding=(0, 2, 0, indent), collapse_padding=True)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name != fold, overflow="fold")
    return table


def describe_gradients(certificate: FidelityCertificate) -> str:
    """What the certificate says of the shadow's gradients."""
    check = certificate.gradients
    if check is None:
        return "gradients: not checked"
    right = "" if check.directional_rows is None else f", {check.directional_rows:.1%} right against differences"
    return f"gradients: finite on {check.finite_rows:.1%}, non-zero on {check.nonzero_rows:.1%} of rows{right}"


def _finding(finding: Finding) -> RenderableType:
    title = Text.assemble(
        (f"{harmless(finding.defense)} ", "bold"), (finding.verdict.value, _VERDICTS[finding.verdict.value])
    )
    title.append(f": {harmless(finding.reason)}")
    lines: list[RenderableType] = [title]
    if finding.threshold is not None:
        lines.append(_indented(Text(harmless(describe_threshold(finding.threshold)), style="dim")))
    if isinstance(finding.result, FilterResult):
        lines += [_indented(Text(harmless(line), style="dim")) for line in describe_filter(finding.result)]
    lines.append(_indented(Text(harmless(describe_cost(finding)), style="dim")))
    if isinstance(finding.result, ScanResult) and finding.result.classes:
        if finding.result.restarts:
            lines.append(_indented(Text(describe_restarts(finding.result), style="dim")))
        lines.append(_classes(finding.result))
    if isinstance(finding.result, DatasetResult):
        lines += _dataset(finding.result)
    if isinstance(finding.result, RepairResult):
        lines.append(_indented(fact_grid(repair_rows(finding.result))))
    return Group(*lines)


def repair_rows(result: RepairResult) -> list[tuple[str, str]]:
    """What a repair did and what it cost; not escaped."""
    rows = [
        (
            name.replace("_", " "),
            f"{value:.2%} before, {result.after[name]:.2%} after" if name in result.after else f"{value:.2%} before",
        )
        for name, value in result.before.items()
    ]
    rows.append(("measured on", f"{result.images} held-out images, each file on a session of its own"))
    if result.pruning is not None:
        pruning = result.pruning
        rows.append(
            ("pruned", f"{len(pruning.pruned)} of {pruning.channels} channels, zeros in {_first(pruning.initializers)}")
        )
        rows.append(("ordered by", f"mean activation of {pruning.tensor}, read off the {pruning.measured_on}"))
    if result.training_agreement is not None:
        rows.append(("trained shadow", f"top-1 agreement {result.training_agreement:.4f} with the new file's session"))
    return [*rows, ("new sha256", result.new_digest)]


def describe_threshold(threshold: Threshold) -> str:
    """Where the line is, who drew it and how often it alarms on clean models; not escaped."""
    known = "false-alarm rate unknown"
    if threshold.n is not None and threshold.false_alarm_rate is not None:
        known = f"n = {threshold.n}, rate = {rounded_up(threshold.false_alarm_rate)}"
    tail = "" if threshold.p_value is None else f" (p = {rounded_up(threshold.p_value)})"
    note = "" if threshold.note is None else f"; {threshold.note}"
    return f"threshold {threshold.value:g}: {threshold.source}, {known}{tail}{note}"


def describe_filter(result: FilterResult) -> list[str]:
    """The boundary, then the rows that were not accepted; not escaped."""
    lines = [] if result.boundary is None else [describe_boundary(result.boundary)]
    for decision, word in (("reject", "rejected"), ("unmeasured", "without a score")):
        rows = [str(row) for row, made in enumerate(result.decisions) if made == decision]
        if rows:
            lines.append(f"{word}: rows {first_few(rows, _ROWS_SHOWN)}")
    return lines


def describe_boundary(boundary: FilterBoundary) -> str:
    """Where the line is, and how often it rejects clean inputs; not escaped."""
    low, high = boundary.frr_interval
    note = "" if boundary.note is None else f"; {boundary.note}"
    return (
        f"boundary {boundary.value:.3g}: fitted on {boundary.fitted_on:,} clean images (mean {boundary.mean:.3g}, sd "
        f"{boundary.sd:.3g}) to reject {boundary.nominal_frr:.1%} of clean ones; of {len(boundary.held_out_scores):,} "
        f"held-out ones it rejects {boundary.measured_frr:.1%} (interval {low:.1%} to {high:.1%}){note}"
    )


def describe_cost(finding: Finding) -> str:
    """The work that an answer took; not escaped."""
    cost, settings = finding.cost, finding.settings
    budget = f"budget {settings['budget']}, " if "budget" in settings else ""
    scheduler = f"scheduler {settings['scheduler']}, " if "scheduler" in settings else ""
    return f"{budget}{scheduler}{cost.gradient_steps} gradient steps, {cost.forwards} forward rows, seed {finding.seed}"


def describe_restarts(result: ScanResult) -> str:
    """How far the index depends on where the inversion started: the figure of each start alone, and their spread."""
    scores = [one.score for one in result.restarts]
    known = [score for score in scores if score is not None]
    each = ", ".join("undefined" if score is None else f"{score:.2f}" for score in scores)
    again = sum(len(entry.restart_norms) == len(scores) for entry in result.classes)
    few = f" (from the second on {again} of {len(result.classes)} classes, by the first's median and MAD)"
    spread = f"; lowest {min(known):.2f}, median {median(known):.2f}, highest {max(known):.2f}" if known else ""
    if again < len(result.classes):
        return f"index of each start alone{few}: {each}{spread}"
    first = result.classes[0].target_class
    times = sum(one.lowest_class == first for one in result.restarts)
    return f"index of each start alone: {each}{spread}; class {first} has the smallest norm in {times} of {len(scores)}"


def _classes(result: ScanResult) -> RenderableType:
    table = plain_table(
        *("rank", "class", "norm (px)", "index", "optimised ASR", "held-out ASR"),
        left=("class",),
        fold="class",
        indent=2,
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
    return Group(table, *note)


def _dataset(result: DatasetResult) -> list[RenderableType]:
    columns = ("class", "images", "score", "flagged", "figures")
    table = plain_table(*columns, left=("class", "figures"), fold="figures", indent=2)
    entries = ranked_classes(result)
    for entry in entries[:_CLASSES_SHOWN]:
        figures = entry.reason if entry.score is None else describe_statistics(entry.statistics)
        table.add_row(
            Text(f"{entry.target_class} {harmless(entry.class_name)}"),
            f"{entry.n:,}",
            "none" if entry.score is None else f"{entry.score:.2f}",
            f"{entry.flagged:,}",
            Text(f"{'SUSPICIOUS: ' if entry.suspicious else ''}{harmless(figures)}"),
        )
    hidden = len(entries) - _CLASSES_SHOWN
    note = [Text(f"  and {hidden} more classes; --format json lists them all", style="dim")] if hidden > 0 else []
    return [_indented(Text(describe_flagged(result))), table, *note]
