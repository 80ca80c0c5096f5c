"""What an outcome means, what to do next, and what the checks that ran cannot see: the words beside the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from qdefense.fidelity import MAX_RELATIVE_RMS, MIN_ROWS, MIN_TOP1_AGREEMENT
from qdefense.findings import DatasetResult, FilterResult, Finding, ScanResult, Suspect, Verdict
from qdefense.rates import MIN_SKILL, skill
from qdefense.report.model import MISREAD_MARGIN, Report

_NAMED = 5
_VERDICTS = frozenset({Verdict.CLEAN, Verdict.BACKDOORED})

HEADLINES = {
    "PASSED": "Every required check ran on this file, and none raised an alarm.",
    "FAILED": "A check found signs of a backdoor. Do not ship this file.",
    "INCOMPLETE": "Something required was not measured. This is not a pass: do not ship on it.",
    "REFUSED": "The file was not let in, so nothing about it was measured. Do not ship it.",
}

MEANINGS = {
    "PASSED": (
        "The answer rests on forward passes of this exact file, on the runtime and CPU named below. It covers what was "
        "checked and nothing else; the next section says what was not."
    ),
    "FAILED": (
        "The alarm rests on forward passes of this exact file, on the runtime and CPU named below. It is "
        "evidence, not proof: clean networks have natural triggers too, and where the threshold is not calibrated "
        "nobody knows how often they raise this alarm."
    ),
    "INCOMPLETE": (
        "What was not measured cannot be called clean, whatever else was found. Treat the file as one that nobody has "
        "audited."
    ),
    "REFUSED": (
        "It is damaged, is not what it claims to be, or is nothing that this version can drive as an image classifier. "
        "No check ran on it."
    ),
}


class Step(NamedTuple):
    """Something to do, and the words of the command or option for it."""

    text: str
    command: tuple[str, ...] = ()


class Gap(NamedTuple):
    """Something that this report leaves open, and why."""

    what: str
    why: str


_LIMITS = {
    "neural-cleanse": (
        Gap(
            "Triggers beyond the reach of neural-cleanse",
            "It looks for one small patch that turns images of every class into one class. Blended or full-size "
            "patterns, warps, triggers that differ from image to image (dynamic) or work on some classes only "
            "(source-specific), and clean-label attacks with a large pattern can stay unseen.",
        ),
        Gap(
            "What no gradient can reach",
            "A branch that looks at the image and passes no gradient could hide a trigger. Nodes that never pass one "
            "are listed under The file, and stand in the way of CLEAN; a ReLU or Clip that is shut on clean images "
            "hides a trigger, too, and is not listed.",
        ),
    ),
    "activation-clustering": (
        Gap(
            "Poison that activation-clustering does not tell apart",
            "It looks for a label whose images fall in two parts. Poison that looks like its class to the network "
            "(clean-label, blended or warping triggers, few samples), a backdoor that came by another way than this "
            "training data, and data that was not given stay unseen.",
        ),
        Gap(
            "Poison that is a fifth or more of its label",
            "By default the rule is the silhouette of whitened features, which a part that stands out in one direction "
            "can't bring above 0.15 once it is a fifth of its label: plain poisoning of a tenth of ten classes stays "
            "unseen, however well the two parts are told apart.",
        ),
    ),
    "spectral-signatures": (
        Gap(
            "Poison that spectral-signatures does not tell apart",
            "It compares how far the images of each label spread in one direction, under a threshold of the user's. "
            "Blended or warping triggers, and a backdoor that came by another way than this data, stay unseen.",
        ),
    ),
    "strip": (
        Gap(
            "Inputs that strip was not given",
            "It judges the inputs that it was shown, and not the model: a trigger that none or a few of them carry "
            "stays unseen.",
        ),
        Gap(
            "Triggers that an overlay breaks",
            "It looks for inputs whose prediction no overlay changes. A trigger over the whole image (blended, warped),"
            " one that works on some classes only (source-specific), and one that was trained together with overlays "
            "change as clean inputs do.",
        ),
    ),
}

_CAUSES = {
    "saturation": (
        "The file's 8-bit kernels overflow 16-bit sums on this CPU, so it answers otherwise than the numbers in it "
        "say. Quantize it again with --reduce-range, or audit it with --arithmetic exact if it runs "
        "on CPUs with VNNI."
    ),
    "batch": (
        "The file's answers depend on what else is in the batch. Export it with a dynamic batch or a batch of 1, "
        "quantize it again and audit that file."
    ),
    "optimization-level": (
        "ONNX Runtime rewrites this graph into one that answers otherwise. Quantize the file again with this version "
        "of ONNX Runtime, or audit it with the version that it will run on."
    ),
    "unsupported-operator": (
        "The shadow does not know an operator of this file. Export it without that operator, or report it so that it "
        "can be added; a check that needs no gradient can be required in its place."
    ),
    "numerics": (
        "Shadow and file disagree for a reason that is not known. Export and quantize the file again; if it stays so, "
        "report it with this page: an unexplained difference may be the very thing to look for."
    ),
}


def next_steps(report: Report) -> tuple[Step, ...]:
    """What a release engineer does now, in order."""
    steps = {"PASSED": _after_pass, "FAILED": _after_alarm, "INCOMPLETE": _after_gap, "REFUSED": _after_refusal}
    return tuple(steps[report.gate.outcome](report))


def not_checked(report: Report) -> tuple[Gap, ...]:
    """What this report leaves open, whatever its verdict."""
    if report.gate.outcome == "REFUSED":
        return (Gap("Everything", "No check ran on this file."),)
    return (
        *_unanswered(report),
        *_vouched_for(report),
        *(limit for name in _measured(report) for limit in _LIMITS.get(name, (_unknown_limits(name),))),
        *_censored_classes(report),
        *_uncalibrated(report),
        *_other_evidence(report),
        _elsewhere(report),
    )


def _vouched_for(report: Report) -> Iterator[Gap]:
    data, accuracy = report.subject.data, report.subject.clean_accuracy
    if data is not None and not data.labelled:
        said = "stated by the user" if accuracy is not None else "not known"
        yield Gap(
            "Whether the file is driven as it was trained",
            f"The images have no labels: the clean accuracy is {said}, and no other reading of the file was compared.",
        )
    contract = report.subject.contract
    if contract is not None and (contract.pixels_from or contract.source) == "metadata":
        yield Gap(
            "Whether your product feeds the file as it says",
            "Range, mean, deviation and channels are the file's own word, and it was judged on such pixels alone. "
            "State --range, --mean, --std and --channels as they are where it runs: the audit then judges that.",
        )


def known_limits() -> frozenset[str]:
    """The defenses whose limits this module can tell."""
    return frozenset(_LIMITS)


# --- after each outcome -----------------------------------------------------------------------------------------------


def _after_pass(report: Report) -> Iterator[Step]:
    yield Step(
        "Ship this very file, by its sha256 and those of any files beside it. Exporting, quantizing or repairing it "
        "again makes another file, which needs an audit of its own."
    )
    yield Step(
        "Keep report.json with the release. Audit again when the version of ONNX Runtime or the kind of CPU changes."
    )
    yield from _calibrate(report)


def _after_alarm(report: Report) -> Iterator[Step]:
    yield Step("Stop the release, and keep the file and report.json as evidence.")
    for finding in report.findings:
        if isinstance(finding.result, ScanResult) and finding.result.suspects:
            yield _look(finding.result.suspects)
            yield from _more_work(
                finding, "Audit once more with more work and another seed. A planted trigger should be found again."
            )
        if isinstance(finding.result, DatasetResult) and finding.verdict is Verdict.BACKDOORED:
            yield Step(
                f"Look at the flagged training images of {finding.defense}: report.json lists their rows under "
                "flagged. A common mark on images that belong to another class is the sign of poison. Where poison is "
                "the larger part of a class, the flagged images are the clean ones."
            )
        if isinstance(finding.result, FilterResult) and finding.verdict is Verdict.BACKDOORED:
            yield Step(
                f"Look at the inputs that {finding.defense} rejected, listed below: what they share may be the "
                "trigger. Where they are only of another kind than the clean images (night, blur), give clean ones of "
                "that kind and audit again."
            )
    yield from _calibrate(report)
    yield Step(
        "Find out where the weights and the training data come from. Train again on data that you trust, and audit the "
        "new file."
    )
    yield from _hints(report)


def _look(suspects: Sequence[Suspect]) -> Step:
    named = ", ".join(f"{one.target_class} ({one.class_name})" for one in suspects[:_NAMED])
    more = f" and {len(suspects) - _NAMED} more" if len(suspects) > _NAMED else ""
    return Step(
        f"Look at the trigger of class {named}{more} below. A few pixels in one place that turn any image into that "
        "class are the mark of a backdoor; a faint pattern all over, or a piece of the class itself, can be natural."
    )


def _after_gap(report: Report) -> Iterator[Step]:
    yield from _hints(report) or (Step("Put right what the reasons name."),)
    yield Step("Audit again. Only PASSED, exit code 0, is a pass.")


def _after_refusal(_report: Report) -> Iterator[Step]:
    yield Step("Compare the file's size and sha256 with what was exported: it may have been cut short or replaced.")
    yield Step("Put right what the reason names, or export the model again, and audit the new file.")
    yield Step("If the file came from someone else, open it with nothing before you know why it was refused.")


def _more_work(finding: Finding, text: str) -> Iterator[Step]:
    if finding.settings.get("budget") != "exhaustive" or "scheduler" in finding.settings:
        yield Step(text, ("--defense", f"{finding.defense}:budget=exhaustive", "--seed", str(finding.seed + 1)))


def _calibrate(report: Report) -> Iterator[Step]:
    if any(finding.kind == "scan" for finding in _guessing(report)):
        yield Step(
            "Calibrate the threshold on clean models of this architecture, data and precision: until then nobody knows "
            "how often it is wrong.",
            ("qdefense", "calibrate", "--help"),
        )


# --- what is missing, and how to get it -------------------------------------------------------------------------------


def _hints(report: Report) -> tuple[Step, ...]:
    """Read off the figures of the report, never off the words of its reasons."""
    return tuple(step for hint in _HINTS for step in hint(report))


def _ended_early(report: Report) -> Iterator[Step]:
    answered = {finding.defense for finding in report.findings}
    silent = [name for name in report.gate.required if name not in answered]
    if silent:
        yield Step(
            f"The audit ended before {', '.join(silent)} gave an answer. Where the reasons speak of an error or a "
            "kill, run it again with -v, and with fewer images or less beside it if memory ran out."
        )


def _few_images(report: Report) -> Iterator[Step]:
    data = report.subject.data
    if data is not None and data.images < MIN_ROWS:
        yield Step(
            f"Give more clean images: {data.images} were there, {MIN_ROWS} are needed, and 500 or more are better. "
            "Raise --limit, or name a larger split with --split."
        )


def _no_numbers(report: Report) -> Iterator[Step]:
    subject = report.subject
    labelled = subject.data is not None and subject.data.labelled
    if labelled and report.certificate is not None and subject.clean_accuracy is None:
        yield Step(
            "The file answers clean images with values that are no numbers (NaN or infinite). Look for damaged weights "
            "under The file, and export the model again."
        )


def _misread(report: Report) -> Iterator[Step]:
    best = next(iter(report.subject.candidates), None)
    if best is not None and best.accuracy > best.own_accuracy + MISREAD_MARGIN:
        yield Step(
            f"The model is right more often ({best.accuracy:.1%}) when it is driven otherwise: {best.description}. If "
            "it was trained that way, say so to the audit."
        )


def _near_chance(report: Report) -> Iterator[Step]:
    accuracy, data = report.subject.clean_accuracy, report.subject.data
    if accuracy is None or accuracy.source == "stated" or data is None or data.classes < 2:
        return
    if skill(accuracy.value, 1 / data.classes) < MIN_SKILL:
        yield Step(
            "The model is hardly better than chance on these images. Check that they are of the model's own task, that "
            "the labels are numbered as its classes are, and that pixels reach it as in training."
        )


def _uncertified(report: Report) -> Iterator[Step]:
    certificate = report.certificate
    if certificate is None or certificate.certified:
        return
    if certificate.cause is not None:
        yield Step(_CAUSES[certificate.cause.kind])
    elif certificate.gradients is not None and not certificate.gradients.passes:
        yield Step(
            "The shadow has no usable gradients (see Fidelity certificate). A model that clips or rounds its own "
            "input, or ends in a hard decision, gives none: export it without such steps and with logits at its end."
        )


def _blind(report: Report) -> Iterator[Step]:
    inspection = report.subject.inspection
    if inspection is not None and inspection.gradient_blind_nodes:
        yield Step(
            "Have someone explain the gradient-blind nodes under The file: a comparison or a branch on the image is "
            "also how a backdoor is built into a graph. Where they serve no purpose, export the model without them."
        )


def _censored(report: Report) -> Iterator[Step]:
    for finding, result in _open_scans(report):
        censored = sum(entry.norm is None for entry in result.classes)
        if censored and result.score is None:
            text = (
                f"For {censored} of {len(result.classes)} classes {finding.defense} found no trigger that works on the "
                "file. Give it more work; more clean images help too."
            )
            yield from _more_work(finding, text)


def _equal_norms(report: Report) -> Iterator[Step]:
    for finding, result in _open_scans(report):
        if result.mad == 0:
            yield from _more_work(
                finding, "At least half of the classes have the same norm, so none can stand out. Give it more work."
            )


def _replay_differs(report: Report) -> Iterator[Step]:
    for _, result in _open_scans(report):
        agreement, rms = result.replay_agreement, result.replay_relative_rms
        if agreement is not None and (agreement < MIN_TOP1_AGREEMENT or rms is None or rms > MAX_RELATIVE_RMS):
            yield Step(
                "The shadow was certified, but does not follow the file on the stamped images: its triggers say "
                "nothing of the file. Export and quantize it again; if it stays so, report it with this page."
            )


def _not_applicable(report: Report) -> Iterator[Step]:
    names = [one.defense for one in report.findings if one.verdict is Verdict.NOT_APPLICABLE]
    if names:
        yield Step(
            f"{', '.join(names)} cannot judge this file with what was given. Require a check that can.",
            ("qdefense", "defenses"),
        )


def _open_scans(report: Report) -> Iterator[tuple[Finding, ScanResult]]:
    for finding in report.findings:
        if finding.verdict is Verdict.NOT_MEASURED and isinstance(finding.result, ScanResult):
            yield finding, finding.result


_HINTS: tuple[Callable[[Report], Iterator[Step]], ...] = (
    *(_misread, _ended_early, _few_images, _no_numbers, _near_chance, _uncertified, _blind, _censored, _equal_norms),
    *(_replay_differs, _not_applicable),
)


# --- what stays open --------------------------------------------------------------------------------------------------


def _guessing(report: Report) -> Iterator[Finding]:
    """Findings with a verdict, of defenses whose false-alarm rate nobody knows."""
    for finding in report.findings:
        if finding.verdict in _VERDICTS and finding.threshold and finding.threshold.false_alarm_rate is None:
            yield finding


def _measured(report: Report) -> tuple[str, ...]:
    names = (one.defense for one in report.findings if one.verdict in _VERDICTS)
    return tuple(dict.fromkeys(names))


def _unanswered(report: Report) -> Iterator[Gap]:
    measured = _measured(report)
    for name in dict.fromkeys((*report.gate.required, *(finding.defense for finding in report.findings))):
        if name not in measured:
            yield Gap(f"Whatever {name} looks for", "It gave no verdict on this file.")


def _unknown_limits(name: str) -> Gap:
    return Gap(f"What is beyond the reach of {name}", "This version has no description of it.")


def _censored_classes(report: Report) -> Iterator[Gap]:
    for finding in report.findings:
        if finding.verdict is not Verdict.CLEAN or not isinstance(finding.result, ScanResult):
            continue
        censored = [entry for entry in finding.result.classes if entry.norm is None]
        if censored:
            yield Gap(
                f"{len(censored)} of {len(finding.result.classes)} classes as targets",
                f"{finding.defense} found no trigger for them that works on the file, so that none of them was judged.",
            )


def _uncalibrated(report: Report) -> Iterator[Gap]:
    for finding in _guessing(report):
        yield Gap(
            f"How often {finding.defense} is wrong",
            "Its threshold was not calibrated on clean models like this one, so its false-alarm rate is unknown.",
        )


def _other_evidence(report: Report) -> Iterator[Gap]:
    kinds = {finding.kind for finding in report.findings}
    if "dataset" not in kinds:
        yield Gap("The training data", "No check of it ran.")
    if "filter" not in kinds:
        yield Gap("The inputs in production", "No filter of what the model is given was judged.")


def _elsewhere(report: Report) -> Gap:
    runtime = report.environment.runtime
    isa = " ".join(runtime.isa) or "instruction sets not known"
    return Gap(
        "Other runtimes and CPUs",
        f"There the same file can answer otherwise than under ONNX Runtime {runtime.onnxruntime} on {runtime.machine} "
        f"({isa}).",
    )
