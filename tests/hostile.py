"""Files that nobody should have written: one maker for every kind, used by tests and by benchmarks/faults.py."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

Maker = Callable[[Path], None]


def sparse(size: int, start: bytes = b"") -> Maker:
    """A file that claims `size` bytes and holds nearly none."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def data(content: bytes | str) -> Maker:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content) and None


def link(target: str) -> Maker:
    return lambda path: path.symlink_to(target)


def pipe_behind_a_link(path: Path) -> None:
    os.mkfifo(path.parent / f"{path.name}.pipe")
    path.symlink_to(f"{path.name}.pipe")


NOT_REGULAR: dict[str, Maker] = {
    "pipe": lambda path: os.mkfifo(path),
    "pipe behind a link": pipe_behind_a_link,
    "device": link("/dev/zero"),
    "random device": link("/dev/urandom"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": link("nowhere"),
    "folder": lambda path: path.mkdir(),
}

DEEP = 100_000
TEXTS: dict[str, Maker] = {
    "empty": data(b""),
    "zeros": data(b"\0" * 4096),
    "not UTF-8": data(b"\xff\xfe\x80" * 40),
    "deep lists": data("[" * DEEP + "]" * DEEP),
    "deep mappings": data('{"a":' * DEEP + "1" + "}" * DEEP),
    "six thousand digits": data('{"seed": ' + "9" * 6000 + ', "format": ' + "8" * 6000 + "}"),
    "a long field": data('{"' + "k" * 2_000_000 + '": 1}'),
    "numbers that are none": data('{"format": NaN, "seed": Infinity}'),
    "a list": data("[1, 2, 3]"),
    "a text": data('"text"'),
    "control characters": data('{"name": "a\x1b[2J\x07b", "\x1b]0;x\x07": 1}'),
    "lone surrogates": data('{"name": "\\ud800", "seed": "\\udfff"}'),
    "huge": sparse(2**40),
    "half": data('{"format": 3, "metric": "lo'),
}

ANCHORS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "m0: &m0 {k: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 60))
YAMLS: dict[str, Maker] = {
    "anchor bomb": data(ANCHORS),
    "merge bomb": data(
        "m0: &m0 {k: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 60))
    ),
    "an anchor that holds itself": data("task: &t\n  name: *t\n"),
    "a merge of itself": data("task: &t\n  <<: *t\n"),
    "a merge of a number": data("task:\n  <<: 3\n"),
    "code": data("name: !!python/object/apply:os.system [echo hacked > hacked]\n"),
    "an unknown tag": data("name: !env HOME\n"),
    "a key twice": data("seed: 1\nseed: 2\n"),
    "a list as a key": data("? [a, b]\n: 3\n"),
    "many keys": data("".join(f"k{i}: {i}\n" for i in range(20_000))),
    "sixty": data("seed: " + "1:" * 20_000 + "1\n"),
    "a date": data("name: 2026-13-45\n"),
    "a tab": data("task:\n\tname: digits\n"),
    "colour codes": data('name: "\\e[31mred"\n'),
    "markup": data('name: "[bold]x[/b]"\n'),
    "null": data("task: null\nharvest: ~\n"),
    "two documents": data("seed: 1\n---\nseed: 2\n"),
}


def safetensors(header: object, tail: bytes = b"", length: int | None = None) -> Maker:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return data(struct.pack("<Q", len(text) if length is None else length) + text + tail)


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


SAFETENSORS: dict[str, Maker] = {
    "header longer than the file": safetensors({"a": entry([1], 0, 4)}, b"\0" * 4, 2**40),
    "header of 2**63 bytes": safetensors({}, length=2**63),
    "no header": data(b"\0" * 8),
    "header is a list": safetensors([]),
    "header is text": safetensors(b"hello"),
    "entries are numbers": safetensors({"a": 3}),
    "offsets are texts": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", "y"]}}),
    "offsets run back": safetensors({"a": entry([1], 4, 0)}, b"\0" * 4),
    "offsets are negative": safetensors({"a": entry([1], -4, 0)}, b"\0" * 4),
    "160 GB that are not there": sparse(
        160 * 10**9,
        struct.pack("<Q", 70) + json.dumps({"a": entry([40 * 10**9 - 20], 0, 160 * 10**9 - 78)}).ljust(70).encode(),
    ),
    "promises more than it has": safetensors({"a": entry([10**12], 0, 4 * 10**12)}, b"\0" * 64),
    "a million tensors": safetensors({f"{i}": entry([0], 0, 0) for i in range(1_000_000)}),
    "unknown type": safetensors({"a": entry([1], 0, 4, "F99")}, b"\0" * 4),
    "shape and bytes differ": safetensors({"a": entry([3], 0, 4)}, b"\0" * 4),
    "shape of 2**60": safetensors({"a": entry([2**60, 0], 0, 0)}),
    "deep header": safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "control characters in a name": safetensors({"\x1b[2J": entry([1], 0, 4)}, b"\0" * 4),
    "Git LFS": data("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    "HTML": data("<!doctype html><html><body>404</body></html>"),
}


class Runs:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("echo hacked > hacked",)


def saved(value: object, **options: bool) -> Maker:
    def make(path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        path.write_bytes(buffer.getvalue())

    return make


def flipped(value: object, share: float) -> Maker:
    def make(path: Path) -> None:
        saved(value)(path)
        content = bytearray(path.read_bytes())
        content[int(share * len(content))] ^= 255
        path.write_bytes(content)

    return make


def cut(value: object, share: float, **options: bool) -> Maker:
    def make(path: Path) -> None:
        saved(value, **options)(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return make


def unfolds(path: Path) -> None:
    """A few MB that unfold to 3 GB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        buffer = io.BytesIO()
        torch.save({"w": torch.zeros(4)}, buffer)
        with zipfile.ZipFile(buffer) as small:
            for info in small.infolist():
                if not info.filename.endswith("data/0"):
                    archive.writestr(info.filename, small.read(info))
        with archive.open("archive/data/0", "w", force_zip64=True) as file:
            for _ in range(192):
                file.write(b"\0" * 2**24)


def torchscript(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), str(path.with_suffix(".pt2")))
    path.with_suffix(".pt2").rename(path)


STATE = {"0.weight": torch.arange(24.0).reshape(6, 4), "0.bias": torch.zeros(6)}


def deep_pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")


TORCH: dict[str, Maker] = {
    "runs a command": saved({"model": Runs()}),
    "runs a command, old format": saved({"model": Runs()}, _use_new_zipfile_serialization=False),
    "a bare pickle that runs a command": lambda path: path.write_bytes(pickle.dumps(Runs())) and None,
    "a whole module": saved(torch.nn.Linear(2, 2)),
    "unfolds to 3 GB": unfolds,
    "TorchScript": torchscript,
    "torch.export": exported,
    "nested tensors": saved({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
    "sparse tensors": saved({"a": torch.eye(3).to_sparse()}),
    "expanded tensors": saved({"a": torch.zeros(1).expand(10**13)}),
    "meta tensors": saved({"a": torch.zeros(3, device="meta")}),
    "complex tensors": saved({"a": torch.zeros(3, dtype=torch.complex64)}),
    "quantised tensors": saved({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}),
    "no tensors": saved({"epoch": 3}),
    "a list": saved([1, 2]),
    "keys that are numbers": saved({1: torch.ones(2)}),
    "NaN": saved({"a": torch.full((3,), torch.nan)}),
    "a scalar": saved(torch.tensor(3.0)),
    "deep pickle": deep_pickle,
    "text": data("hello"),
    "Git LFS": data("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    "HTML": data("<!doctype html><html></html>"),
    "gzip": data(b"\x1f\x8b\x08\0" + b"\0" * 60),
    "zip of nothing": lambda path: zipfile.ZipFile(path, "w").close(),
    "a NumPy archive": lambda path: np.savez(path.open("wb"), a=np.ones(3)),
    "a NumPy array": lambda path: np.save(path.open("wb"), np.ones(3)),
    "zeros": data(b"\0" * 4096),
    **{f"flipped at {share}": flipped(STATE, share) for share in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)},
    **{f"cut at {share}": cut(STATE, share) for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)},
    **{f"old, cut at {share}": cut(STATE, share, _use_new_zipfile_serialization=False)
       for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)},
}  # fmt: skip


def npz_of_256_tib(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**45,)})
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("inputs", "x_train"):
            archive.writestr(f"{name}.npy", header.getvalue() + b"\0" * 64)


NPZ: dict[str, Maker] = {
    "256 TiB": npz_of_256_tib,
    "objects": lambda path: np.savez(path.open("wb"), inputs=np.array([{}, 3], dtype=object)),
    "no arrays": lambda path: np.savez(path.open("wb")),
    "texts": lambda path: np.savez(path.open("wb"), inputs=np.array(["a", "b"])),
    "NaN": lambda path: np.savez(path.open("wb"), inputs=np.full((9, 64), np.nan), labels=np.arange(9) % 2),
    "labels of another length": lambda path: np.savez(path.open("wb"), inputs=np.ones((9, 64)), labels=np.arange(3)),
    "no zip": data("hello"),
    "zip of texts": lambda path: zipfile.ZipFile(path, "w").writestr("inputs.npy", "hello"),
}


def parquet(**columns: object) -> Maker:
    return lambda path: pq.write_table(pa.table(columns), path)


RUNS = ["a", "a"]
INDEXES: dict[str, Maker] = {
    "runs are numbers": parquet(run=[1, 2], step=[0, 1], layout=RUNS, diverged=[False, False], digest=RUNS),
    "steps are texts": parquet(run=RUNS, step=["0", "1"], layout=RUNS, diverged=[False, False], digest=RUNS),
    "steps are missing": parquet(run=RUNS, step=pa.array([0, None]), layout=RUNS, diverged=[False, False], digest=RUNS),
    "steps below 0": parquet(run=RUNS, step=[-5, 1], layout=RUNS, diverged=[False, False], digest=RUNS),
    "diverged is a text": parquet(run=RUNS, step=[0, 1], layout=RUNS, diverged=["no", "no"], digest=RUNS),
    "a step twice": parquet(run=RUNS, step=[1, 1], layout=RUNS, diverged=[False, False], digest=RUNS),
    "no columns": parquet(other=[1, 2]),
    "lists": parquet(run=[["a"], ["b"]], step=[0, 1], layout=RUNS, diverged=[False, False], digest=RUNS),
    "nothing but a name": data("PAR1"),
    "zeros": data(b"\0" * 500),
}
