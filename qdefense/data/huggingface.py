"""Hugging Face style parquet: a folder of ``{split}-*.parquet`` shards, or one file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qdefense.data.decoding import ImageArray, decode
from qdefense.data.images import DataError, Images, ImageSet, Labels, NoSplitError, first_line, folder_name, quoted
from qdefense.data.resizing import Resize
from qdefense.data.selection import choose_rows, numbered_names, order_notes, to_labels, track_groups

LABEL_NAMES = ("label", "labels", "fine_label", "ClassId")
ROWS_PER_BATCH = 512
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
# Where Hugging Face copies of GTSRB keep the track: split/class/TRACK_FRAME.png
_TRACK = re.compile(r"[^/]+/\d{5}/(\d{5})_\d{5}\.png")


def load_parquet(
    path: Path, *, split: str | None, limit: int | None, seed: int, resize: Resize | None = None
) -> ImageSet:
    """Read one split of a parquet folder, or a parquet file; only the chosen rows are decoded.

    Args:
        path: a folder with ``{split}-*.parquet`` in it or in ``data/``, or one ``.parquet`` file.
        split: ``None`` means "test" for a folder, and whatever it holds for a file.
        limit: read this many rows, drawn by ``seed``; ``None`` reads all.
        seed: of the draw.
        resize: to one size; ``None`` where the images have one.

    Raises:
        DataError: no such split, an unreadable file, no or several image or label columns, a broken image,
            sizes that differ.
    """
    shards, source = _find_shards(path, split)
    with ExitStack() as stack:
        files = [stack.enter_context(_open_shard(shard)) for shard in shards]
        stack.enter_context(_readable(source))
        columns = _find_columns(files[0].schema_arrow, source)
        _require_equal_schemas(files, shards)
        labels = np.concatenate([_read_labels(file, columns.label, source) for file in files])
        if not len(labels):
            raise DataError(f"{source}: holds no rows")
        rows = choose_rows(len(labels), limit=limit, seed=seed)
        images, notes = _decode_rows(files, columns, rows, resize, source)
        tracks = _read_tracks(files, columns)
        if tracks is not None and len(tracks) != len(labels):
            raise DataError(f"{source}: {len(labels)} labels but {len(tracks)} image paths; fetch it again")
    names = columns.class_names or numbered_names(labels, source)
    return ImageSet(
        images=images,
        labels=labels[rows],
        class_names=names,
        source=source,
        detection=_why(path, shards),
        notes=(*order_notes(names), *notes),
        groups=None if tracks is None else track_groups(labels[rows], tracks[rows]),
    )


def _why(path: Path, shards: list[Path]) -> str:
    if path.is_dir():
        return f"parquet: the folder holds {quoted(shards[0].name)}"
    return "parquet: the file ends in .parquet"


def list_splits(folder: Path) -> dict[str, list[Path]]:
    """The splits of a folder and their shards: the part of each file name before its first dash."""
    splits: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.glob("*.parquet")):
            splits.setdefault(file.stem.partition("-")[0], []).append(file)
        if splits:
            break
    return splits


def _find_shards(path: Path, split: str | None) -> tuple[list[Path], str]:
    if path.is_dir():
        wanted, splits = split or "test", list_splits(path)
        source = f"parquet {folder_name(path)}/{wanted}"
    else:
        wanted, source = split or path.stem.partition("-")[0], f"parquet {path.name}"
        splits = {path.stem.partition("-")[0]: [path]}
    if wanted not in splits:
        raise NoSplitError(f"{source}: no split {wanted!r}; it has {', '.join(map(repr, sorted(splits)))}")
    if path.is_dir():
        _require_all_shards(splits[wanted], source)
    return splits[wanted], source


def _require_all_shards(shards: list[Path], source: str) -> None:
    numbers = [match for match in (_SHARD.search(shard.name) for shard in shards) if match]
    found = sorted(int(match[1]) for match in numbers)
    whole = all(found == list(range(int(match[2]))) for match in numbers)
    if not whole or (len(shards) > 1 and len(numbers) < len(shards)):
        names = ", ".join(repr(shard.name) for shard in shards[:5])
        raise DataError(f"{source}: {names} are not one complete set of shards; add the missing, remove the foreign")


def _open_shard(path: Path) -> Any:
    with _readable(path.name):
        # Without a buffer size a whole column chunk is read before its first row comes out.
        return pq.ParquetFile(path, buffer_size=1 << 20)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{what}: not readable as parquet ({first_line(error)}); fetch it again") from error


@dataclass(frozen=True, kw_only=True)
class _Columns:
    image: str
    image_is_struct: bool
    image_has_path: bool
    label: str
    class_names: tuple[str, ...] | None

    @property
    def leaf(self) -> str:
        """The bytes alone: the path beside them may tell what was done to the image."""
        return f"{self.image}.bytes" if self.image_is_struct else self.image

    @property
    def path_leaf(self) -> str | None:
        """Where the images' file names stand, if they do."""
        return f"{self.image}.path" if self.image_has_path else None


def _find_columns(schema: Any, source: str) -> _Columns:
    features = _read_features(schema, source)
    image = _only(
        [field for field in schema if _is_image(field.type)], "image column (a struct with bytes)", schema, source
    )
    integers = [field for field in schema if pa.types.is_integer(field.type)]
    class_labels = {field.name: _class_label(features.get(field.name)) for field in integers}
    candidates = [field for field in integers if class_labels[field.name] is not None] or integers
    if len(candidates) > 1:
        candidates = [field for field in candidates if field.name in LABEL_NAMES] or candidates
    label = _only(candidates, "integer label column", schema, source).name
    _require_single((image.name, label), schema, source)
    return _Columns(
        image=image.name,
        image_is_struct=pa.types.is_struct(image.type),
        image_has_path=pa.types.is_struct(image.type) and image.type.get_field_index("path") >= 0,
        label=label,
        class_names=_class_names(class_labels[label], label, source),
    )


def _is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _only(fields: list[Any], what: str, schema: Any, source: str) -> Any:
    if not fields:
        columns = ", ".join(f"{field.name!r} ({field.type})" for field in schema)
        raise DataError(f"{source}: no {what} among {columns or 'no columns'}; save the data with one")
    if len(fields) > 1:
        candidates = ", ".join(repr(field.name) for field in fields)
        raise DataError(f"{source}: which is the {what}? {candidates} all could be; keep one of them")
    return fields[0]


def _require_single(names: tuple[str, ...], schema: Any, source: str) -> None:
    """Columns are read by name."""
    for name in names:
        if schema.names.count(name) > 1:
            raise DataError(f"{source}: several columns are called {name!r}; keep one of them")


def _read_features(schema: Any, source: str) -> dict[str, Any]:
    """The features by column name; the file may hold them as a mapping or as a list of named entries."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: the schema's 'huggingface' metadata is no JSON ({first_line(error)})") from error
    info = described.get("info") if isinstance(described, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    if isinstance(features, list):
        return {str(entry.get("name")): entry for entry in features if isinstance(entry, dict)}
    return features if isinstance(features, dict) else {}


def _class_label(feature: object) -> Mapping[str, Any] | None:
    """What describes the classes: the feature itself, or its ``dtype.class_label`` in the list form."""
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        return feature
    kind = feature.get("dtype")
    described = kind.get("class_label") if isinstance(kind, dict) else None
    return described if isinstance(described, dict) else None


def _class_names(class_label: Mapping[str, Any] | None, column: str, source: str) -> tuple[str, ...] | None:
    names = (class_label or {}).get("names")
    if names is None:
        return None
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{source}: class names of column {column!r} are not a list of strings, one for each of 0 to K-1"
        )
    return tuple(names)


def _require_equal_schemas(files: list[Any], shards: list[Path]) -> None:
    first = files[0].schema_arrow
    for file, shard in zip(files, shards, strict=True):
        if not file.schema_arrow.equals(first):
            raise DataError(f"{shard.name}: columns differ from those of {shards[0].name}; are they one data set?")


def _read_labels(file: Any, column: str, source: str) -> Labels:
    values = file.read(columns=[column]).column(0)
    if values.null_count:
        raise DataError(f"{source}: {values.null_count} rows have no value in column {column!r}; remove them")
    return to_labels(values.to_numpy(), source)


def _read_tracks(files: list[Any], columns: _Columns) -> NDArray[np.int64] | None:
    """The track of every row, where every file name has GTSRB's form; nothing else is taken from the names."""
    tracks: list[int] = []
    if columns.path_leaf is None:
        return None
    for file in files:
        for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=[columns.path_leaf]):
            for name in pc.struct_field(batch.column(0), "path").to_pylist():
                match = _TRACK.fullmatch(name) if isinstance(name, str) else None
                if match is None:
                    return None
                tracks.append(int(match[1]))
    return np.array(tracks, dtype=np.int64)


def _decode_rows(
    files: list[Any], columns: _Columns, rows: NDArray[np.int64], resize: Resize | None, source: str
) -> tuple[Images, tuple[str, ...]]:
    """``(len(rows), H, W, 3) uint8`` in the order of ``rows``, and notes; the file is read once, from front to back."""
    order = np.argsort(rows)
    images = ImageArray(len(rows), resize, source)
    encoded = _encoded_images(files, columns, rows[order])
    for position, (row, data) in zip(order.tolist(), encoded, strict=True):
        name = f"row {row}"
        if data is None:
            raise DataError(f"{source}: {name} has no image bytes; an image kept outside the file is not read")
        images.put(position, decode(io.BytesIO(data), f"{source}: {name}"), name)
    return images.finish(), images.notes


def _encoded_images(
    files: Iterable[Any], columns: _Columns, rows: NDArray[np.int64]
) -> Iterator[tuple[int, bytes | None]]:
    """Row number and encoded image of each of the sorted rows; row groups without one of them are skipped."""
    start = 0
    for file in files:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if len(_between(rows, start, start + count)):
                yield from _encoded_of_group(file, group, columns, rows, start)
            start += count


def _encoded_of_group(
    file: Any, group: int, columns: _Columns, rows: NDArray[np.int64], start: int
) -> Iterator[tuple[int, bytes | None]]:
    batches = file.iter_batches(batch_size=ROWS_PER_BATCH, row_groups=[group], columns=[columns.leaf])
    for batch in batches:
        values = pc.struct_field(batch.column(0), "bytes") if columns.image_is_struct else batch.column(0)
        for row in _between(rows, start, start + len(values)).tolist():
            yield row, values[row - start].as_py()
        start += len(values)


def _between(rows: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    first, last = np.searchsorted(rows, (start, stop))
    return rows[first:last]
