"""What Neural Cleanse's statistic makes of its norms: the anomaly index, against the lowest norm over the median.

    python benchmarks/blindspots/norms.py

Both are of the same scans, in the records of this folder, those of benchmarks/attacks and the reports of
benchmarks/calibration (signs, 50 networks, budget `gate`): nothing is inverted anew. Files of one network are told from
clean ones at the same precision, on whatever CPU either was scanned; files that are not active are left out.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median

from qdefense.bench.cohort import Cohort, network_id
from qdefense.bench.records import BehaviourRecord, DefenseRecord
from qdefense.bench.store import RECORDS, read_records
from qdefense.findings import ScanResult
from qdefense.rates import auroc
from qdefense.trial import Activity

HERE = Path(__file__).parent
SIGNS = HERE.parent / "calibration" / "results"
BENCHES = ("blindspots", "attacks")
QUICK, ADAPTED = "quick", 2.0
HEAD = (
    *("networks", "precision", "attack", "active, clean files", "AUROC of the index", "of lowest / median"),
    *("highest of the attacked", "lowest of the clean"),
)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One scan of one file: ``ratio`` is its lowest norm over their median, ``index`` the paper's of the lowest."""

    kind: str
    precision: str
    attack: str
    network: str
    file: str
    activity: str
    index: float | None
    ratio: float


def ratio_of(norms: Iterable[float | None]) -> float | None:
    """The lowest norm over the median, where a class without a trigger ranks above all others; None if that is one."""
    found = [math.inf if norm is None else norm for norm in norms]
    middle = median(found) if found else math.inf
    return min(found) / middle if middle < math.inf else None


def scans_of_records(path: Path) -> Iterator[Scan]:
    """Of the adaptive cost, and of static INT8 calibrated on clean images."""
    records = list(read_records(path))
    judged = map(Cohort(records).judged, (record for record in records if isinstance(record, BehaviourRecord)))
    activity = {record.artifact_sha256: record.activity for record in judged}
    for record in records:
        if not isinstance(record, DefenseRecord) or record.defense != "neural-cleanse" or record.access != "session":
            continue
        result = None if record.finding is None else record.finding.result
        plain = record.calibration is None or record.calibration.name == "clean256"
        usual = (record.settings["budget"], record.settings["multiplier"]) == (QUICK, ADAPTED)
        found = activity.get(record.artifact_sha256)
        if not isinstance(result, ScanResult) or not (plain and usual and found):
            continue
        ratio = ratio_of(entry.norm for entry in result.classes)
        if ratio is not None:
            network = record.network
            yield Scan(
                kind=f"{network.data}, {network.architecture}",
                precision=record.scheme,
                attack=network.attack or "none",
                network=f"{network_id(network)} {record.replica}",
                file=record.artifact_sha256,
                activity=found,
                index=result.score,
                ratio=ratio,
            )


def scans_of_signs() -> Iterator[Scan]:
    """The 50 networks of benchmarks/calibration."""
    lines = (SIGNS / "behaviour.jsonl").read_text(encoding="utf-8").splitlines()
    made = {body["artifact_sha256"]: body for body in map(json.loads, lines)}
    for path in sorted((SIGNS / "reports").glob("*.json")):
        report = json.loads(path.read_bytes())
        told = made[report["subject"]["sha256"]]
        result = ScanResult.model_validate(report["findings"][0]["result"])
        ratio = ratio_of(entry.norm for entry in result.classes)
        if ratio is not None:
            yield Scan(
                kind="signs, resnet8",
                precision=told["scheme"],
                attack="none" if told["attack"] is None else told["attack"].partition(":")[0],
                network=f"signs {told['model'].partition('.')[0]}",
                file=report["subject"]["sha256"],
                activity=told["behaviour"]["activity"],
                index=result.score,
                ratio=ratio,
            )


def area(attacked: list[float | None], clean: list[float | None]) -> str:
    found = [[value for value in side if value is not None] for side in (attacked, clean)]
    return f"{auroc(*found):.3f}" if all(found) else ""


def rows(scans: list[Scan]) -> Iterator[str]:
    """One line for each kind of network, precision and attack."""
    cells: defaultdict[tuple[str, str], defaultdict[str, list[Scan]]] = defaultdict(lambda: defaultdict(list))
    for scan in scans:
        cells[scan.kind, scan.precision][scan.attack].append(scan)
    for (kind, precision), by_attack in sorted(cells.items()):
        clean = by_attack.pop("none", [])
        for attack, found in sorted(by_attack.items()) if clean else ():
            index = area([scan.index for scan in found], [scan.index for scan in clean])
            ratio = area([-scan.ratio for scan in found], [-scan.ratio for scan in clean])
            worst, best = max(scan.ratio for scan in found), min(scan.ratio for scan in clean)
            sides = f"{len(found)}, {len(clean)} | {index} | {ratio} | {worst:.3f} | {best:.3f}"
            yield f"| {kind} | {precision} | {attack} | {sides} |"


def first_of_each_file(scans: Iterable[Scan]) -> Iterable[Scan]:
    """One file is one scan, though it was scanned on two CPUs (`bench --here`) or for two matrices."""
    first: dict[str, Scan] = {}
    for scan in scans:
        first.setdefault(scan.file, scan)
    return first.values()


def main() -> None:
    recorded = chain.from_iterable(scans_of_records(HERE.parent / name / "results" / RECORDS) for name in BENCHES)
    scans = list(first_of_each_file(chain(recorded, scans_of_signs())))
    print(f"| {' | '.join(HEAD)} |")
    print(f"| {' | '.join('---' for _ in HEAD)} |")
    for line in rows([scan for scan in scans if scan.activity in (Activity.CLEAN, Activity.ACTIVE)]):
        print(line)
    attacked, clean = ([one for one in scans if one.activity == kind] for kind in (Activity.ACTIVE, Activity.CLEAN))
    pooled = area([one.index for one in attacked], [one.index for one in clean])
    print(f"\nall together: AUROC of the index {pooled}, of lowest / median", end=" ")
    print(area([-one.ratio for one in attacked], [-one.ratio for one in clean]))
    for activity in (Activity.ACTIVE, Activity.ATTENUATED, Activity.DORMANT, Activity.CLEAN):
        found = [scan for scan in scans if scan.activity == activity]
        ratios = [scan.ratio for scan in found]
        if ratios:
            networks = len({scan.network for scan in found})
            spread = f"lowest / median {min(ratios):.3f} to {max(ratios):.3f}"
            print(f"\n{activity}: {len(found)} files of {networks} networks, {spread}")


if __name__ == "__main__":
    main()
