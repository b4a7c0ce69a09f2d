"""The files of a zoo, as docs/zoo_format.md specifies them: names, headers, layouts, seals, and their checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from mole.errors import CorruptFileError, MoleError
from mole.files import file_digest, is_sealed, read_sealed, sealed, write_json
from mole.reading.guard import check_file
from mole.reading.tensors import safetensors_header
from mole.reading.text import read_json
from mole.representations import WeightSpec

FORMAT = 3

Dtype = Literal["float32", "float16", "bfloat16"]
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

RESERVED = ("run", "step", "layout", "diverged", "digest", "source", "content")
"""Columns whose meaning is fixed."""

INDEX_KEYS = ("run", "step", "layout", "diverged")
"""Columns that every index has; the others are factors (what was varied or given) and metrics."""


def plain(value: Any) -> Any:
    """A value that a column can hold: larger whole numbers as texts, and texts without what UTF-8 lacks."""
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        value = str(value)
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def column_names(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The same values; what would have the name of a column with a fixed meaning gets a prefix."""
    return {f"{prefix}.{name}" if name in RESERVED else plain(name): value for name, value in values.items()}


@dataclass(frozen=True)
class Header:
    """What `zoo.json` holds."""

    metric: str
    """The metric that generators are conditioned on; smaller is better."""
    dtype: Dtype
    recipe: dict[str, Any]
    """How the histories came about, in whatever terms their maker has."""

    def __post_init__(self) -> None:
        if self.metric in RESERVED:
            raise MoleError(f"metric {self.metric!r}: this column has another meaning; legal is any other name")
        if self.dtype not in TORCH_DTYPES:
            raise MoleError(f"dtype {self.dtype!r}; legal is {', '.join(TORCH_DTYPES)}")

    def to_json(self) -> dict[str, Any]:
        return sealed({"format": FORMAT, "metric": self.metric, "dtype": self.dtype, "recipe": self.recipe})


@dataclass(frozen=True)
class ShardFiles:
    """The three files of a shard. It is visible once its index, which is written last, stands."""

    folder: Path
    name: str

    @property
    def weights(self) -> Path:
        return self.folder / "shards" / f"{self.name}.safetensors"

    @property
    def seal(self) -> Path:
        return self.folder / "shards" / f"{self.name}.json"

    @property
    def index(self) -> Path:
        return self.folder / "shards" / f"{self.name}.parquet"


def shards(folder: Path) -> list[ShardFiles]:
    """Every visible shard, in order of names."""
    return [ShardFiles(folder, path.stem) for path in sorted((folder / "shards").glob("[!.]*.parquet"))]


def read_header(folder: Path) -> Header:
    """The header of a zoo.

    Raises:
        MoleError: there is no zoo, or one of another format.
        CorruptFileError: `zoo.json` does not hold what was written.
    """
    path = folder / "zoo.json"
    try:
        found = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        hint = f"; there is one in {folder / 'zoo'}" if (folder / "zoo" / "zoo.json").is_file() else ""
        raise MoleError(f"{folder}: no zoo here (zoo.json is missing){hint}") from None
    if isinstance(found, dict) and found.get("format") != FORMAT:
        told = str(found.get("format"))[:20]
        raise MoleError(f"{path}: format {told}; this version reads {FORMAT}: harvest again")
    if not is_sealed(found, {"metric", "dtype", "recipe"}):
        raise CorruptFileError(f"{path}: truncated or altered (its seal differs)")
    metric, dtype, recipe = (found[name] for name in ("metric", "dtype", "recipe"))
    if not isinstance(metric, str) or not isinstance(dtype, str) or not isinstance(recipe, dict):
        raise CorruptFileError(
            f"{path}: no header of a zoo; legal are a metric and a dtype in words, and a recipe by name"
        )
    return Header(metric, cast("Dtype", dtype), recipe)


def layout_path(folder: Path, fingerprint: str) -> Path:
    """Where the layout of this fingerprint lies."""
    return folder / "layouts" / f"{fingerprint[:16]}.json"


def read_layouts(folder: Path) -> dict[str, WeightSpec]:
    """Every layout of a zoo, by the first 16 digits of its fingerprint."""
    found: dict[str, WeightSpec] = {}
    for path in sorted((folder / "layouts").glob("[!.]*.json")):
        try:
            spec = WeightSpec.from_json(read_json(path))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise CorruptFileError(f"{path}: not a layout") from None
        if spec.fingerprint[:16] != path.stem:
            raise CorruptFileError(f"{path}: truncated or altered (its name is not its digest)")
        found[path.stem] = spec
    return found


def shard_fault(files: ShardFiles) -> str | None:
    """What is wrong with a shard, or None: every byte of it is read."""
    try:
        seal = read_sealed(files.seal, {"weights", "index"})
    except FileNotFoundError:
        return f"{files.seal}: missing"
    except CorruptFileError as error:
        return str(error)
    try:
        weights_shape(files.weights)  # before a file that claims to be huge is read
        check_table(files.index)
    except FileNotFoundError:
        return f"{files.index}: missing"
    except CorruptFileError as error:
        return str(error)
    for path, wanted in ((files.weights, seal["weights"]), (files.index, seal["index"])):
        if file_digest(path) != wanted:
            return f"{path}: truncated or altered (its digest differs from the one recorded)"
    return None


def verify(folder: str | Path) -> list[str]:
    """Every fault of a zoo, a line each: files that are missing, truncated or altered by as little as a bit.

    Whether what the files say makes sense is for `Zoo` to tell, which checks every index.

    Raises:
        MoleError: there is no zoo.
    """
    folder, faults, layouts = Path(folder), [], {}
    files = shards(folder)
    try:
        read_header(folder)
    except CorruptFileError as error:
        faults.append(str(error))
    try:
        layouts = read_layouts(folder)
    except CorruptFileError as error:
        return [*faults, str(error), *_shard_faults(files)]
    used = {layout for shard in files if (layout := _layout_of(shard.weights))}
    faults += [f"{layout_path(folder, layout)}: missing" for layout in sorted(used - layouts.keys())]
    return faults + _shard_faults(files)


def _shard_faults(files: list[ShardFiles]) -> list[str]:
    return [fault for shard in files if (fault := shard_fault(shard))]


def _layout_of(path: Path) -> str | None:
    """The layout that the header of a weights file names; None if it cannot be read."""
    try:
        layout = safetensors_header(path)["__metadata__"]["layout"]
    except (OSError, CorruptFileError, KeyError, TypeError):
        return None
    return layout if isinstance(layout, str) else None


def weights_shape(path: Path, dtype: Dtype | None = None) -> tuple[int, int]:
    """Rows and parameters that the header of a weights file promises, checked against the file's size.

    Without a dtype, any that a zoo may have is right.

    Raises:
        CorruptFileError: the file is missing, truncated, or holds something else.
    """
    try:
        header = safetensors_header(path)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        weights, stored = tensors["weights"], max(entry["data_offsets"][1] for entry in tensors.values())
        (rows, size), (start, stop) = weights["shape"], weights["data_offsets"]
        code = weights["dtype"] if dtype is None else SAFETENSORS_DTYPES[dtype]
        named = next(name for name, other in SAFETENSORS_DTYPES.items() if other == code)
        expected = rows * size * TORCH_DTYPES[named].itemsize
        if "table" in tensors:
            (many, whole), dtype_of_table = tensors["table"]["shape"], tensors["table"]["dtype"]
            if many != rows or dtype_of_table != "I64":
                raise ValueError(f"a table of {many} rows of {dtype_of_table} where {rows} of I64 belong")
            stored -= many * whole * 8
        if weights["dtype"] != code or stop - start != expected or stored != expected:
            raise ValueError(f"{stored} bytes of {weights['dtype']} weights where {expected} of {named} belong")
    except FileNotFoundError:
        raise CorruptFileError(f"{path}: missing") from None
    except (CorruptFileError, ValueError, KeyError, TypeError, StopIteration, OSError) as error:
        told = str(error).removeprefix(f"{path}: ")
        raise CorruptFileError(f"{path}: truncated or altered ({told})") from None
    return rows, size


def check_table(path: Path) -> None:
    """Refuse a file that cannot be a Parquet table by its first and last bytes.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: it is something else.
    """
    size = check_file(path)
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, size - 4))
        if start != b"PAR1" or file.read(4) != b"PAR1":
            raise CorruptFileError(f"{path}: truncated or altered (it is no Parquet file)")


def write_seal(files: ShardFiles, weights: str, index: str, header: Header, seconds: float) -> None:
    """Write down the digests of a shard's other two files and of the zoo's header, and the seconds it took."""
    rest = {"zoo": header.to_json()["seal"], "seconds": seconds}
    write_json(files.seal, sealed({"weights": weights, "index": index, **rest}))


def belongs(folder: Path, header: Header) -> bool:
    """Whether every shard was written under this header, which a damaged `zoo.json` cannot tell any more."""
    try:
        seals = [read_sealed(files.seal, {"zoo"})["zoo"] for files in shards(folder)]
    except (CorruptFileError, FileNotFoundError):
        return False
    return bool(seals) and set(seals) == {header.to_json()["seal"]}
