"""Tensors from files of any origin: safetensors, PyTorch's own format, NumPy archives; nothing in them is executed."""

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mole.errors import CorruptFileError
from mole.reading.guard import check_file, check_promise, in_bytes
from mole.reading.text import parse_json

HEADER_BYTES = 10_000_000
"""The longest header of a safetensors file that is read."""
MOST_TENSORS = 100_000
"""In one file."""
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error)
"""What is raised of archives that are no archives."""
LFS = b"version https://git-lfs"


def safetensors_header(path: Path, most: int = HEADER_BYTES) -> dict[str, Any]:
    """The header of a safetensors file, its sizes checked against the file's.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: it is truncated, something else, or promises more than there is.
    """
    size = check_file(path)
    with path.open("rb") as file:
        start = file.read(max(8, len(LFS)))
        if len(start) < 8 or start.startswith(LFS):
            raise CorruptFileError(f"{path}: {what_it_is(start) or 'truncated, or not a safetensors file'}")
        (length,) = struct.unpack("<Q", start[:8])
        if length > size - 8:
            raise CorruptFileError(f"{path}: truncated, or not a safetensors file")
        if length > most:
            raise CorruptFileError(f"{path}: truncated or altered (a header of {length:,} bytes; at most {most:,})")
        file.seek(8)
        text = file.read(length)
    try:
        header = parse_json(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in tensors.values()]
        sizes = [size for entry in tensors.values() for size in (*entry["shape"], *entry["data_offsets"])]
        if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
            raise ValueError("a shape that is none")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        raise CorruptFileError(f"{path}: truncated, or not a safetensors file") from None
    if len(tensors) > MOST_TENSORS:
        raise CorruptFileError(f"{path}: {len(tensors):,} tensors; legal are at most {MOST_TENSORS:,}")
    if max(ends, default=0) != size - 8 - length:
        raise CorruptFileError(f"{path}: truncated, or not a safetensors file")
    return header


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: it is truncated, something else, or larger than memory.
    """
    safetensors_header(path)
    check_promise(path, check_file(path))
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        raise CorruptFileError(f"{path}: truncated, or not a safetensors file") from error


def what_it_is(start: bytes) -> str | None:
    """What a file is by its first bytes, where that is no checkpoint; None if it may be one."""
    if not start:
        return "an empty file"
    if start.startswith(LFS):
        return "a pointer of Git LFS, not the file itself: run git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "a page of HTML or XML, not a checkpoint"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "a compressed file: unpack it first"
    if not start.strip(b"\0"):
        return "a file of zeros"
    return None


def read_torch(path: Path) -> Any:
    """What `torch.save` has written, as far as it is tensors and plain values.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: with the true reason: code would have to be run, it is damaged, or it is something else.
    """
    check_file(path)
    with path.open("rb") as file:
        start = file.read(64)
    if told := what_it_is(start):
        raise CorruptFileError(f"{path}: {told}")
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CorruptFileError(f"{path}: {_why_refused(path)}") from None
    except OSError:
        raise
    except RecursionError:
        raise CorruptFileError(f"{path}: nested too deeply to be a checkpoint") from None
    except MemoryError:
        raise CorruptFileError(f"{path}: promises more than fits into memory") from None
    except Exception:  # PyTorch raises whatever its readers stumble over
        raise CorruptFileError(f"{path}: truncated, or not a checkpoint") from None


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that is no checkpoint, is damaged, or unfolds to more than there is."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            unfolded, stored = sum(info.file_size for info in infos), path.stat().st_size
            if told := _kind_of_archive(names):
                raise CorruptFileError(f"{path}: {told}")
            if unfolded > 10 * stored + 2**20:
                raise CorruptFileError(f"{path}: {in_bytes(stored)} that unfold to {in_bytes(unfolded)}, as no "
                                       "checkpoint of PyTorch does")  # fmt: skip
            check_promise(path, unfolded)
            damaged = archive.testzip()
    except (*DAMAGED, RuntimeError, ValueError):
        raise CorruptFileError(f"{path}: truncated, or not a checkpoint") from None
    if damaged is not None:
        raise CorruptFileError(f"{path}: damaged (a checksum in it differs)")


def _kind_of_archive(names: list[str]) -> str | None:
    """What an archive is, where that is no checkpoint; None if it may be one."""
    parts = {part for name in names for part in name.split("/")}
    if "constants.pkl" in parts or "code" in parts:
        return "a TorchScript program, not a state dict: save module.state_dict()"
    if "archive_format" in parts or any(part.startswith("serialized_exported_program") for part in parts):
        return "a program of torch.export, not a state dict: save module.state_dict()"
    if "data.pkl" not in parts:
        npz = all(name.endswith(".npy") for name in names) and names
        return "a NumPy archive, not a checkpoint" if npz else "a zip archive without a checkpoint of PyTorch"
    return None


def _why_refused(path: Path) -> str:
    """Why PyTorch did not unpickle a file, in few words."""
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the list cannot be read: an old format, or damaged
        needed = _globals_of_pickle(path)
    if needed:
        more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
        return f"needs code to be run ({needed[0]}{more}), which is never done"
    return "truncated, or not a checkpoint"


def _globals_of_pickle(path: Path) -> list[str]:
    """Names that a bare pickle would import, beside those that every checkpoint of PyTorch needs."""
    names, texts = list[str](), list[str]()
    with path.open("rb") as file:
        start = io.BytesIO(file.read(2**20))
    with suppress(Exception):  # whatever is wrong with the rest of it
        while start.tell() < len(start.getbuffer()):  # an old checkpoint is several pickles, one after the other
            for operation, argument, _ in pickletools.genops(start):
                if isinstance(argument, str):
                    texts.append(argument)
                if operation.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL" and len(texts) > 1:
                    names.append(".".join(texts[-2:]))
    return [name for name in dict.fromkeys(names) if not name.startswith(("torch.", "collections.OrderedDict"))]


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of these arrays that a NumPy archive holds.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: it is something else, damaged, holds objects, or promises more than there is.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            wanted = [name for name in names if f"{name}.npy" in members]
            promised = sum(_promised(archive, members[f"{name}.npy"]) for name in wanted)
            check_promise(path, promised)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in wanted}
    except CorruptFileError:
        raise
    except (*DAMAGED, ValueError, KeyError, TypeError, IndexError, RuntimeError, MemoryError, SyntaxError) as error:
        told = "holds objects, which would be code" if "allow_pickle" in str(error) else _short(error)
        raise CorruptFileError(f"{path}: not an archive of numbers ({told})") from None


def _promised(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Bytes that the header of an array promises, which must be in the archive."""
    with archive.open(member) as file:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        promised = int(np.prod([int(size) for size in shape], dtype=object)) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError("allow_pickle")
        if promised < 0 or promised > member.file_size:
            raise ValueError(f"{member.filename} promises {in_bytes(promised)} and has {in_bytes(member.file_size)}")
    return promised


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is no plain tensor whose every number is in memory.

    Raises:
        CorruptFileError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CorruptFileError("tensors that are sparse, nested, quantised or without data")
        if tensor.numel() * tensor.element_size() > 2 * tensor.untyped_storage().nbytes() + 1024:
            raise CorruptFileError(f"tensors that claim more numbers than the file has ({name})")


def _short(error: object) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
