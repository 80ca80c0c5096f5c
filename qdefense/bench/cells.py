"""The cells of a matrix: names looked up, defaults filled in, the axes multiplied, duplicates merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, product
from typing import Any, Literal

from qdefense.bench.datasets import PinnedData
from qdefense.bench.matrix import DataTable, Grid, Matrix, MatrixError
from qdefense.bench.records import FP32, Access, Calibration, Network, digest_of
from qdefense.converters.quantize import MINIMUM_IMAGES, Settings, settings_of
from qdefense.converters.runtime_graph import Arithmetic
from qdefense.registry import SpecError, flat_settings

Kind = Literal["scan", "dataset", "filter", "repair"]
_BEHAVIOUR = "behaviour"
_AT_INFERENCE = ("inference", "test_multiple")
"""In the names of settings that scale what is stamped, and no poison."""
_EIGHT_BIT_PRODUCTS = frozenset({"int8-static", "int8-dynamic", "int4-a8"})


@dataclass(frozen=True, kw_only=True)
class DefenseSpec:
    """A defense with its settings; ``text`` is how the matrix writes it."""

    text: str
    name: str
    kind: Kind
    revision: int
    settings: dict[str, Any]
    needs_gradients: bool


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """An attacked network whose trigger is put on what its clean twin is shown."""

    network: Network
    recipe_sha256: str
    attack: str
    source_specific: bool


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One trial of one file: what it does, what a defense says of it, or what another network's trigger does to it."""

    title: str
    arithmetic: Arithmetic
    access: Access = "session"
    defense: DefenseSpec | None = None
    attacker: Attacker | None = None
    grid: int = 0
    """Number of the first grid that names it: work is done in their order."""

    @property
    def stage(self) -> Literal["behaviour", "control", "defense"]:
        """Which kind of record it leaves."""
        if self.defense is not None:
            return "defense"
        return "behaviour" if self.attacker is None else "control"


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """A network at one precision, and the cells that need the file."""

    network: Network
    quantization: Settings | None
    calibration: Calibration | None
    calibration_data: PinnedData | None
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The full name of the quantization."""
        return FP32 if self.quantization is None else self.quantization.name

    @property
    def scheme(self) -> str:
        """Its scheme."""
        return FP32 if self.quantization is None else self.quantization.scheme

    def recipe(self, network_sha256: str) -> dict[str, Any]:
        """What decides the bytes of the quantized file.

        Networks of equal bytes may have triggers that differ at inference alone, which some calibration images carry.
        """
        recipe = {
            "network_sha256": network_sha256,
            "quantization": None if self.quantization is None else dataclasses.asdict(self.quantization),
            "calibration": None
            if self.calibration is None
            else self.calibration.model_dump(mode="json", exclude={"name"}),
            "calibration_sha256": None if self.calibration_data is None else self.calibration_data.facts.sha256,
        }
        made = self.network
        trigger = {
            key: value for key, value in made.attack_settings.items() if any(part in key for part in _AT_INFERENCE)
        }
        trigger |= made.attack_revisions
        seen = self.calibration is not None and self.calibration.triggered > 0
        return {**recipe, "trigger": trigger} if seen and trigger else recipe


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """A network and its files; ``title`` names it as the first grid writes it, and no other of the matrix."""

    title: str
    network: Network
    attack: str | None
    train: PinnedData
    test: PinnedData
    attack_data: tuple[PinnedData, ...] = ()
    files: dict[str, FilePlan] = field(default_factory=dict)

    @cached_property
    def recipe_sha256(self) -> str:
        """Its identity."""
        return digest_of(network=self.network.model_dump(mode="json"))

    @cached_property
    def trigger_shows_images(self) -> bool:
        """Whether a training image can be recognised in its trigger: no picture of it is drawn, nor its state kept."""
        from qdefense.attacks import ATTACKS  # noqa: PLC0415 (torch stays off the way to --help)
        from qdefense.attacks.interfaces import trigger_shows_images  # noqa: PLC0415

        return self.attack is not None and trigger_shows_images(ATTACKS.create(self.attack))

    @cached_property
    def source_specific(self) -> bool:
        """Whether its trigger has bystanders, and so an FPR."""
        from qdefense.attacks import ATTACKS  # noqa: PLC0415 (torch stays off the way to --help)
        from qdefense.attacks.interfaces import is_source_specific  # noqa: PLC0415

        return self.attack is not None and is_source_specific(ATTACKS.create(self.attack))

    @property
    def grid(self) -> int:
        """Number of the first grid that names one of its cells."""
        return min((cell.grid for _, cell in self.cells), default=0)

    @property
    def cells(self) -> Iterator[tuple[FilePlan, Cell]]:
        """Every cell with its file."""
        return ((file, cell) for file in self.files.values() for cell in file.cells.values())


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where `plan_cells` gets the digests of images from: the manifest, or the images themselves."""

    train: Callable[[str], PinnedData]
    test: Callable[[str], PinnedData]
    calibration: Callable[[str, str], PinnedData]


def plan_cells(matrix: Matrix, sources: Sources) -> tuple[NetworkPlan, ...]:
    """Every cell of the matrix once, by network and file, in the order of the matrix.

    Raises:
        MatrixError: an architecture or precision is unknown, calibrations are missing or too small, an attack reads
            images that are no data set of the matrix, or training and test images are the same.
        SpecError: an attack or a defense is unknown or has no such setting.
        DataError: the images cannot be read.
    """
    networks: dict[str, NetworkPlan] = {}
    for number, grid in enumerate(matrix.grid):
        for data, architecture, attack, seed in product(grid.data, grid.architectures, grid.attacks, grid.seeds):
            made = _network_plan(matrix, sources, data, architecture, attack, seed)
            known = networks.setdefault(made.recipe_sha256, made)
            _add_files(matrix, sources, number, known)
    for network in networks.values():
        _add_controls(matrix, network, networks)
    return tuple(networks.values())


def chosen(
    plan: Sequence[NetworkPlan], *, only: str | None, limit: int | None, at_hand: Callable[[str], bool]
) -> tuple[NetworkPlan, ...]:
    """The part of the plan whose titles contain ``only``, and of it the first ``limit`` cells.

    Without the controls of networks that are neither in it nor ``at_hand``, by the digest of their recipes.
    """
    found = [
        _part(network, (cell.title for _, cell in network.cells if (only or "") in cell.title)) for network in plan
    ]
    found = _without_orphans(found, at_hand)  # before the limit, which counts what can be done
    if limit is not None:
        found = _without_orphans(list(_first(found, limit)), at_hand)
    return tuple(network for network in found if network.files)


def _part(network: NetworkPlan, titles: Iterable[str]) -> NetworkPlan:
    wanted = frozenset(titles)
    files = {
        name: dataclasses.replace(file, cells={key: cell for key, cell in file.cells.items() if cell.title in wanted})
        for name, file in network.files.items()
    }
    return dataclasses.replace(network, files={name: file for name, file in files.items() if file.cells})


def _first(networks: Sequence[NetworkPlan], limit: int) -> Iterator[NetworkPlan]:
    for network in networks:
        titles = [cell.title for _, cell in islice(network.cells, limit)]
        limit -= len(titles)
        yield _part(network, titles)


def _without_orphans(networks: Sequence[NetworkPlan], at_hand: Callable[[str], bool]) -> list[NetworkPlan]:
    there = {network.recipe_sha256 for network in networks if any(network.cells)}

    def can_be_made(attacker: Attacker | None) -> bool:
        return attacker is None or attacker.recipe_sha256 in there or at_hand(attacker.recipe_sha256)

    return [
        _part(network, (cell.title for _, cell in network.cells if can_be_made(cell.attacker))) for network in networks
    ]


def _network_plan(
    matrix: Matrix, sources: Sources, data: str, architecture: str, attack: str, seed: int
) -> NetworkPlan:
    from qdefense.attacks import ATTACKS  # noqa: PLC0415 (torch stays off the way to --help)
    from qdefense.attacks.interfaces import data_read_by, revisions_of  # noqa: PLC0415
    from qdefense.zoo import default_width, recipe_for  # noqa: PLC0415

    table = matrix.data[data]
    name, width = _architecture(architecture)
    recipe = recipe_for(name)
    recipe = dataclasses.replace(recipe, epochs=table.epochs or recipe.epochs, flip=table.flip)
    spec = None if attack == "none" else _with_target(attack, table)
    attacker = None if spec is None else ATTACKS.create(spec)
    read = [_pinned(matrix, sources, attack, name) for name in data_read_by(attacker)]
    train = sources.train(data)
    _require_classes(attack, {} if attacker is None else flat_settings(attacker), data, train.facts.classes)
    network = Network(
        data=data,
        train_sha256=train.facts.sha256,
        architecture=name,
        width=default_width(name) if width is None else width,
        attack=None if attacker is None else attacker.name,
        attack_settings={} if attacker is None else flat_settings(attacker),
        attack_data={one.request.name: one.facts.sha256 for one in read},
        attack_revisions={} if attacker is None else revisions_of(attacker),
        seed=seed,
        recipe=dataclasses.asdict(recipe),
    )
    title = f"{data}/{architecture}/{attack}/seed {seed}"
    test = sources.test(data)
    return NetworkPlan(title=title, network=network, attack=spec, train=train, test=test, attack_data=tuple(read))


def _require_classes(attack: str, settings: Mapping[str, Any], data: str, classes: int) -> None:
    """Refuse what no training would accept, before others have been trained for hours."""
    for key, value in settings.items():
        if key.rpartition(".")[2] in (_TARGET, _SOURCE) and value >= classes:
            raise MatrixError(
                f"attacks: {attack!r} has the {key.replace('_', ' ')} {value}, but {data} has classes 0 to "
                f"{classes - 1}; name one of them for the attack, or in [data.{data}]"
            )


def _pinned(matrix: Matrix, sources: Sources, attack: str, name: str) -> PinnedData:
    """The images that an attack reads besides: a data set of the matrix, of which records name the digest."""
    table = matrix.data.get(name)
    if table is None:
        raise MatrixError(
            f"attacks: {attack!r} reads the images at {name!r}, whose digest no record names: other images there "
            f"would give another network of the same name; name a data set of this file ({', '.join(matrix.data)}), or "
            "choose an attack that draws them"
        )
    if table.train_limit is not None or table.train_split not in (None, "train"):
        raise MatrixError(
            f"attacks: {attack!r} reads the whole training split of {name!r}, and [data.{name}] names a part of it or "
            "another; give the attack a table of its own, without train_split and train_limit"
        )
    return sources.train(name)


def _architecture(text: str) -> tuple[str, int | None]:
    from qdefense.zoo import architectures  # noqa: PLC0415 (imports torch)

    name, _, tail = text.partition(":")
    if name not in architectures():
        raise MatrixError(f"architectures: there is no {name!r}; known: {', '.join(architectures())}")
    if not tail:
        return name, None
    key, _, value = tail.partition("=")
    if key.strip() != "width" or not value.strip().isdecimal() or int(value) < 1:
        raise MatrixError(f"architectures: {text!r} has no such setting; an architecture takes width=CHANNELS")
    return name, int(value)


def _with_target(attack: str, table: DataTable) -> str:
    """The attack with the data set's target class, where it has one, of its host if need be, and names none itself."""
    name, _, tail = attack.partition(":")
    target = table.target_class.get(name) if isinstance(table.target_class, dict) else table.target_class
    keys = [key for key in _settings_of(attack, target) if key.rpartition(".")[2] == _TARGET]
    named = {part.partition("=")[0].strip().replace("-", "_") for part in tail.split(",")}
    if target is None or not keys or keys[0] in named:
        return attack
    return f"{attack}{',' if tail else ':'}{keys[0]}={target}"


def _settings_of(attack: str, target: int | None) -> dict[str, Any]:
    """All settings; with the data set's target where the attack's own default would be at odds with what it names."""
    from qdefense.attacks import ATTACKS  # noqa: PLC0415 (torch stays off the way to --help)

    try:
        return flat_settings(ATTACKS.create(attack))
    except SpecError:
        for key in (_TARGET, f"host.{_TARGET}") if target is not None else ():
            with suppress(SpecError):
                return flat_settings(ATTACKS.create(f"{attack},{key}={target}"))
        raise


_TARGET, _SOURCE = "target_class", "source_class"


def _add_files(matrix: Matrix, sources: Sources, number: int, plan: NetworkPlan) -> None:
    grid = matrix.grid[number]
    defenses = [defense_spec(text) for text in grid.defenses]
    for text in grid.precisions:
        quantization = _precision(text)
        for calibration in _calibrations(matrix, grid, quantization, plan, text):
            file = _file_plan(matrix, sources, plan, quantization, calibration)
            file = plan.files.setdefault(digest_of(**file.recipe("")), file)
            place = f"{plan.title}/{text}" + ("" if calibration is None else f"/{calibration}")
            for arithmetic in grid.arithmetics if file.scheme in _EIGHT_BIT_PRODUCTS else ("as-run",):
                for cell in _cells(f"{place}/{arithmetic}", arithmetic, defenses, grid.accesses):
                    _add(file, dataclasses.replace(cell, grid=number))


def _add_controls(matrix: Matrix, network: NetworkPlan, networks: Mapping[str, NetworkPlan]) -> None:
    """Put the trigger of an attacked network on its clean twin at every precision that both have.

    A file calibrated on images with the trigger has for its control the clean one that was calibrated without.
    """
    clean = network.network.model_copy(update=_NO_ATTACK)
    twin = networks.get(digest_of(network=clean.model_dump(mode="json")))
    if network.attack is None or twin is None:
        return
    attacker = Attacker(
        network=network.network,
        recipe_sha256=network.recipe_sha256,
        attack=network.attack,
        source_specific=network.source_specific,
    )
    for mine in network.files.values():
        file = twin.files.get(digest_of(**_untriggered(mine).recipe("")))
        theirs = {
            cell.arithmetic: cell.grid
            for cell in mine.cells.values()
            if cell.stage == "behaviour" and matrix.grid[cell.grid].controls
        }
        if file is None:
            continue
        for cell in tuple(file.cells.values()):
            if cell.stage == "behaviour" and cell.arithmetic in theirs:
                title = f"{cell.title.removesuffix(_BEHAVIOUR)}control of {network.attack}"
                grid = max(cell.grid, theirs[cell.arithmetic])
                _add(file, dataclasses.replace(cell, title=title, attacker=attacker, grid=grid))


_NO_ATTACK: dict[str, Any] = {"attack": None, "attack_settings": {}, "attack_data": {}, "attack_revisions": {}}


def _untriggered(file: FilePlan) -> FilePlan:
    if file.calibration is None:
        return file
    return dataclasses.replace(file, calibration=file.calibration.model_copy(update={"triggered": 0.0}))


def _precision(text: str) -> Settings | None:
    """``SCHEME:key=value,...`` in the words of `qdefense quantize`; ``None`` for FP32.

    Raises:
        MatrixError: it is not of that form.
        QuantizationError: no such scheme or setting.
    """
    if text == FP32:
        return None
    scheme, _, tail = text.partition(":")
    asked: dict[str, Any] = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise MatrixError(f"precisions: {text!r}: {item!r} is not key=value")
        asked[key.replace("-", "_")] = _value(value)
    return settings_of(scheme, **asked)


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _calibrations(
    matrix: Matrix, grid: Grid, quantization: Settings | None, plan: NetworkPlan, text: str
) -> tuple[str | None, ...]:
    """The calibrations of a precision: none where it reads no ranges; a clean network has no trigger to put on."""
    if quantization is None or not quantization.calibrated:
        return (None,)
    if not grid.calibrations:
        raise MatrixError(f"precisions: {text!r} needs calibration images; name some in calibrations = [...]")
    clean = plan.network.attack is None
    return tuple(name for name in grid.calibrations if not (clean and matrix.calibrations[name].triggered))


def _file_plan(
    matrix: Matrix, sources: Sources, plan: NetworkPlan, quantization: Settings | None, name: str | None
) -> FilePlan:
    if name is None:
        return FilePlan(network=plan.network, quantization=quantization, calibration=None, calibration_data=None)
    table, data = matrix.calibrations[name], sources.calibration(plan.network.data, name)
    there = data.facts.images
    if table.triggered and not round(table.triggered * there):
        raise MatrixError(
            f"calibrations.{name}: {table.triggered:g} of {there} images come to none with the trigger; raise "
            "triggered, or leave it out"
        )
    if there < MINIMUM_IMAGES:
        raise MatrixError(
            f"calibrations.{name}: {data.facts.source!r} has {there} images, fewer than {MINIMUM_IMAGES}; name a "
            "larger split, or leave the calibration out of the grids of that data"
        )
    calibration = Calibration(
        name=name, images=there, split=table.split, triggered=table.triggered, seed=matrix.bench.seed
    )
    return FilePlan(network=plan.network, quantization=quantization, calibration=calibration, calibration_data=data)


def _cells(
    title: str, arithmetic: Arithmetic, defenses: Sequence[DefenseSpec], accesses: Sequence[Access]
) -> Iterator[Cell]:
    yield Cell(title=f"{title}/{_BEHAVIOUR}", arithmetic=arithmetic)
    for defense, access in product(defenses, accesses):
        # Without gradients a defense that needs none is the one with the session.
        if access != "no-gradients" or defense.needs_gradients:
            full = f"{title}/{defense.text}" + ("" if access == "session" else f"/{access}")
            yield Cell(title=full, arithmetic=arithmetic, defense=defense, access=access)


def _add(file: FilePlan, cell: Cell) -> None:
    defense = None if cell.defense is None else [cell.defense.name, cell.defense.settings]
    attacker = None if cell.attacker is None else cell.attacker.recipe_sha256
    asked = digest_of(arithmetic=cell.arithmetic, defense=defense, access=cell.access, attacker=attacker)
    file.cells.setdefault(asked, cell)


def defense_spec(text: str) -> DefenseSpec:
    """A defense by its text.

    Raises:
        SpecError: there is none, or it has no such setting.
    """
    from qdefense.defenses import DEFENSES, Need  # noqa: PLC0415 (imports torch)
    from qdefense.defenses.interfaces import Calibratable  # noqa: PLC0415

    defense = DEFENSES.create(text)
    # A budget is a name; what the score depends on is the number of steps behind it.
    derived = defense.calibrated_settings if isinstance(defense, Calibratable) else {}
    return DefenseSpec(
        text=text,
        name=defense.name,
        kind=defense.kind,
        revision=defense.revision,
        settings={**dataclasses.asdict(defense), **derived},
        needs_gradients=Need.GRADIENTS in defense.needs,
    )
