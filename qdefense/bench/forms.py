"""The head of every table: its title, what its columns mean, and what is said where it has no row."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qdefense.bench.figures import NOTHING
from qdefense.trial import Activity

HEAT_MARKS = (0.6, 0.7, 0.8, 0.9, 0.97)
"""AUROC at which a cell of the matrix gets the next tint."""
_ROW = ("defense", "attack", "file")
_INACTIVE = "attenuated or dormant"
_STATES = ("measured", "not measured", "not applicable", "failed")


@dataclass(frozen=True, kw_only=True)
class Form:
    """A table without its rows; the first ``labels`` columns name the row."""

    id: str
    title: str
    notes: tuple[str, ...]
    empty: str
    columns: tuple[str, ...] = ()
    labels: int = 3


MATRIX = Form(
    id="matrix",
    title="The matrix",
    notes=(
        "AUROC of a scan is of active files against clean networks at the same precision, of all that have a score, "
        "with an answer or without; of a filter it is of inputs, "
        "of a dataset scan of the rows within the label that the poison has, mean over networks (lowest to highest). "
        "TPR is of active files and what belongs to them, FPR of clean: of files and of one network hits/n [Wilson "
        "interval, 95 %], of the rows or inputs of several networks (lowest to highest). A repair has no AUROC: it "
        "shows ASR and clean accuracy before and after. Every cell links to its records.",
        "Few networks say little: 3 of 3 have an interval of [0.44, 1.00], and 0 of 3 one of [0.00, 0.56]. Rows and "
        "inputs of one network are not independent of each other, and the clean ones are the same for all networks: "
        "no interval of theirs is that of another network.",
    ),
    empty="No defense was run.",
    columns=("defense", "attack"),
    labels=2,
)
BEHAVIOUR = Form(
    id="behaviour",
    title="What the files do",
    notes=(
        "On the test images: mean over networks (lowest to highest). ASR is of eligible images, of other classes than "
        "the target (all-to-all: of every class); beside it is how many of them get the wanted class without the "
        "trigger, and how many the clean twin, which never learned it, gives to that class with it: the control. "
        "Dormant: at most 5 points above the confusion without trigger, or above the control, whatever the ASR; "
        "active: any other of at least 90 % (all-to-all: of 90 % of the clean accuracy, which a perfect backdoor "
        "has, where that is above 50 %); attenuated: the rest.",
        "No record: networks of this data, architecture and attack that have none here, asked for or not.",
    ),
    empty="No file was measured.",
    columns=(
        *("attack", "file", "networks", "clean accuracy", "ASR", "without trigger", "on clean twin"),
        *Activity,
        *("size", "integer MACs", "failed", "no record"),
    ),
    labels=2,
)
_ASR = BEHAVIOUR.columns.index("on clean twin") + 1
SOURCE_SPECIFIC = replace(
    BEHAVIOUR,
    notes=(
        *BEHAVIOUR.notes,
        "FPR, of source-specific attacks: how many images of classes that are neither source nor target get a target "
        "with the trigger on them, and do not without it; beside it the same on the clean twin.",
    ),
    columns=(*BEHAVIOUR.columns[:_ASR], "FPR", "FPR on clean twin", *BEHAVIOUR.columns[_ASR:]),
)
"""Of files among which there are source-specific ones."""
SCANS = Form(
    id="scans",
    title="Model scans",
    notes=(
        "TPR: alarms on active files. FPR: alarms on clean networks at the same precision, calibrated on as many clean "
        "images. AUROC: the score of active files against clean ones, with how many there are of each; "
        "a file without an answer counts, too, if it has a score. Target first: the true target has the smallest norm. "
        "Target named: it is among the suspects. All-to-all attacks have none.",
        f"A trial without an answer is in no rate. {NOTHING}: there is no active file, or no clean one, to make a rate "
        "of. Alarms on attenuated and dormant files stand apart.",
    ),
    empty="No model scan was run.",
    columns=(
        *(
            *_ROW,
            "TPR",
            "FPR",
            "AUROC",
            "of active and clean",
            "target first",
            "target named",
            *_STATES,
            _INACTIVE,
            "clean twins",
        ),
        *("alarms, attenuated", "alarms, dormant", "activity unknown", "no record"),
    ),
)
_POOLED = (
    "AUROC: mean over networks (lowest to highest). TPR and FPR: of one network hits/n [Wilson interval, 95 %]; counts "
    "of several are pooled, with the lowest and the highest network. {} of one network are not independent of each "
    "other, so that no interval of theirs is that of another network."
)
DATASET_SCANS = Form(
    id="dataset-scans",
    title="Dataset scans",
    notes=(
        "Rows of the training set, poisoned against clean, of networks whose file is active. " + _POOLED.format("Rows"),
        "Within: only rows with a label that poisons have, each against rows of its own label. Scores are made within "
        "a label: the AUROC of all rows compares what no method claims to compare. Attenuated, dormant: within. Top: "
        "of the rows within, the "
        "rows with the highest scores, 1.5 times as many as there are poisons; recall is the share of the poisons "
        "with a score among them, precision the share of them that is poison: at most 2/3, but for rounding and labels "
        "with fewer rows than that. Rows without a score are in no rate. Alarms: files whose training set was called "
        "poisoned; an attack in the training loop leaves no poison in it to be found, and has none.",
    ),
    empty="No dataset scan was run.",
    columns=(
        *(*_ROW, "AUROC", "AUROC within", "TPR", "FPR", "FPR within", "top recall", "top precision", "alarms"),
        *(
            "alarms, clean",
            "FPR, clean networks",
            *_STATES,
            _INACTIVE,
            "clean twins",
            "AUROC, attenuated",
            "AUROC, dormant",
        ),
        *("activity unknown", "no record"),
    ),
)
FILTERS = Form(
    id="filters",
    title="Input filters",
    notes=(
        "Stamped against clean test images, none of which the filter was fitted on. " + _POOLED.format("Inputs"),
        "ASR after: stamped images that were let in and did what the attacker wants. Inputs unscored are in no rate. "
        "Without a line: files, clean twins among them, on which the boundary is not above the lowest score there is: "
        "their TPR and FPR are 0 whatever the inputs are, and an audit calls the filter NOT_MEASURED there.",
    ),
    empty="No input filter was run.",
    columns=(
        *(
            *_ROW,
            "AUROC",
            "TPR",
            "FPR",
            "FPR, clean networks",
            "without a line",
            "ASR after",
            "inputs unscored",
            *_STATES,
            _INACTIVE,
            "clean twins",
        ),
        *("AUROC, attenuated", "AUROC, dormant", "activity unknown", "no record"),
    ),
)
REPAIRS = Form(
    id="repairs",
    title="Repairs",
    notes=(
        "Clean accuracy and ASR of active files (of clean networks: accuracy) before and after, on images that the "
        "repair did not see; a repair detects nothing. Changes are in percentage points, with the interval of the mean "
        "over networks by Student's t. On clean twin: the ASR of the same trigger on a network that never learned it; "
        "what is left at most 5 points above it is dormant. What became of the backdoor is counted over files of every "
        "activity; without a control as each file alone tells it. "
        "NOT_REPAIRED: files that lost more accuracy than the repair tolerates; they are in all figures.",
    ),
    empty="No repair was run.",
    columns=(
        *(*_ROW, "accuracy before", "accuracy after", "change", "ASR before", "ASR after", "on clean twin"),
        *("change of ASR", "backdoor", "NOT_REPAIRED"),
        *(*_STATES, _INACTIVE, "activity unknown", "no record"),
    ),
)
BUDGETS = Form(
    id="budgets",
    title="Detectability against robustness",
    notes=(
        "Attacks with at least two poison budgets, all other settings equal: what each defense finds of them, and what "
        "ASR is left after a repair. That an attack buys robustness with detectability, and is judged by both at once, "
        "is the claim of Pick your Poison (arXiv 2305.09671).",
        "Files of every activity, on the deployed session: mean over networks (lowest to highest), n of them. Index of "
        "the target: the anomaly index of the true target class, larger where it stands out more. AUROC within: "
        "poisoned rows against clean ones of their label. AUROC: stamped inputs against clean ones. A figure that is "
        "missing was not measured, or there is none, as of a target without a trigger that converged; it is in no "
        "mean, and leaves a gap in the charts.",
        "Poisons: images; of a share of the set, as many as it is of the clean training images (of attacks in the "
        "training loop: in one pass over them). Of a share of one class the count is not recorded.",
    ),
    empty="No attack was measured at two poison budgets.",
    columns=("attack", "poisons", "file", "share of the set", "networks", "ASR"),
)
CONTRASTS = Form(
    id="contrasts",
    title="Quantized minus FP32",
    notes=(
        "Each quantized file against the FP32 file of the same network; of a defense, where both are active (or clean) "
        "and both have an answer. The interval is of the mean over networks, by Student's t: with three networks it "
        "reaches 4.3 standard errors to each side, and a rate of 3 of 3 has a Wilson interval of [0.44, 1] at best. A "
        "bootstrap would look far surer than three networks are.",
        "Alarms lost and gained: networks whose two files got different verdicts; none is counted where a method only "
        "ranks. Answers lost: networks that the defense could measure in FP32 and no longer once quantized. Unpaired: "
        "files that were not made of the FP32 file beside them, as where the network was trained again. Neither are in "
        "any difference.",
    ),
    empty="No network has both an FP32 and a quantized file with a figure.",
    columns=(
        *_ROW,
        "figure",
        "networks",
        "FP32",
        "quantized",
        "difference",
        "alarms lost",
        "alarms gained",
        "answers lost",
    ),
)
GAPS = Form(
    id="gaps",
    title="Where the signal goes: gap decomposition",
    notes=(
        "The same networks, of an attack those whose quantized file is active: the defense on the FP32 file, on the "
        "shadow of the quantized file, on the quantized file itself, and on it without any gradients. Each column: "
        "trials with an answer, alarms, AUROC of all that have a score, and the figure that is lost: a scan's score, "
        "else AUROC per network (of rows within their label).",
        "Signal loss is the fall of that figure from the FP32 session to the quantized session: the numeric loss (to "
        "the shadow) and the runtime loss (from the shadow to the session) together. API loss is what the missing "
        "gradients alone take: files measured on the session and, for want of gradients, no longer. Losses are "
        "positive where the figure falls, with the interval of the mean by Student's t.",
    ),
    empty='Only one access was tried; accesses = ["session", "shadow", "no-gradients"] in the matrix tries all.',
    columns=(
        *(*_ROW, "FP32 session", "shadow", "session", "no gradients"),
        *("numeric loss", "runtime loss", "signal loss", "API loss"),
    ),
)
CRITERIA = Form(
    id="criteria",
    title="Criteria of the published study",
    notes=(
        "The decision rules of the published code of Quantization Blindspots (arXiv 2512.06243), which counts every "
        "exception as not detected. Only its rules are applied below: its networks, its quantizer and its optimisation "
        "were not reproduced, and its final results are not in its repository.",
    ),
    empty="",
    columns=("defense", "detected, says the published code, if", "on these records"),
    labels=1,
)
PUBLISHED = Form(
    id="published",
    title="The same files under the published criteria",
    notes=(
        "Files of every activity, clean ones among them. Decided by the criterion alone: the rule cannot fire whatever "
        "is measured, or there was no answer and the published code writes that down as not detected. Unknown: the "
        "rule looks at what records don't hold, as the norm of a class whose trigger did not converge on the session.",
    ),
    empty="None of the study's five defenses was run.",
    columns=(
        *(*_ROW, "files", "alarms here", "no alarm here", "not measured", "not applicable", "failed"),
        *("detected by the published rule", "counted as missed without an answer", "decided by"),
    ),
)
LATENCY = Form(
    id="latency",
    title="Latency",
    notes=(
        "Single-stream: one image a call, wall clock in milliseconds. Added: the difference of medians to the file "
        "alone, measured in turns, with its 95 % bootstrap interval. Throughput: images per second with many images a "
        "call. Memory: the largest resident size of a process, a filter's fit included, and what of it came after the "
        "libraries of whoever measures (torch among them) were loaded. Of "
        "networks that differ only in seed and attack one is timed. Load: processes that wanted a CPU, before and "
        "after; where it was more than there are CPUs, read the figures with care. Yardstick: the median time in "
        "milliseconds of a fixed product of matrices, in turns with the calls of one image. Files whose yardsticks "
        "differ were timed while the machine ran at different paces: compare multiples of it, not milliseconds.",
    ),
    empty="No latency was measured: `qdefense bench --latency` writes latency.jsonl.",
    columns=(
        *("variant", "attack", "file", "seed", "p50", "p90", "p99", "added", "yardstick"),
        *("images per second", "images a call", "memory", "load", "runtime"),
    ),
)
UNANSWERED = Form(
    id="unanswered",
    title="What has no answer, and why",
    notes=("None of these is counted as a miss, or as clean.",),
    empty="Every trial has an answer.",
    columns=("stage", "defense", "state", "trials", "reason"),
    labels=2,
)
