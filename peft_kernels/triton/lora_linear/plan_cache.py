"""The tune cache: which plan was the fastest on a kind of GPU, by bucket, in a file.

The file is ``{device key: {bucket: plan}}`` in JSON. Processes that write it take turns by a lock
on a file beside it, and each adds to what stands there then: none loses what another measured.
Readers need no lock, for a new file replaces the old one in one step.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import uuid
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton

try:
    import fcntl
except ImportError:  # not on Windows: there writers don't take turns
    fcntl = None  # type: ignore[assignment]

Plans = dict[str, dict[str, str]]

# A measured bucket is near when its rows are within a factor of two, for the choice is mostly about
# rows, and the other sizes together within a factor of sixteen.
NEAR_ROWS, NEAR_SIZES = 1, 4
_KERNELS = Path(__file__).parents[1]


# ---- the file ----------------------------------------------------------------------------------


def cache_file() -> Path:
    """``$PEFT_KERNELS_CACHE/plans.json``, by default in ``~/.cache/peft_kernels``."""
    return Path(os.environ.get("PEFT_KERNELS_CACHE") or _default_folder()) / "plans.json"


def _default_folder() -> Path:
    try:
        return Path.home() / ".cache" / "peft_kernels"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "peft_kernels"


@functools.cache
def device_key(device: torch.device) -> str:
    """A measurement holds for a kind of device, a version of torch and Triton, and our kernels."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"torch {torch.__version__} | triton {triton.__version__}"
    return f"{name} | {versions} | kernels {sources_hash(_KERNELS)}"


def sources_hash(folder: Path) -> str:
    """Of the kernels, tiles and launchers there: what a measured plan runs."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:8]


# What this process knows, and by which file.
_plans: Plans | None = None
_known_by: tuple[object, ...] | None = None


def load() -> Plans:
    """The measured plans as this process knows them: read once."""
    global _plans, _known_by
    if _plans is None:
        path = cache_file()
        _known_by = _version(path)
        try:
            _plans = _read(path)
        except (OSError, ValueError) as error:
            _plans = {}
            warnings.warn(
                f"{path} is not a tune cache ({error}); the default plans are used. Delete it, or"
                " write it anew with `peft-kernels tune`.",
                stacklevel=2,
            )
    return _plans


def load_again() -> None:
    """Lets `load` read the file again where it is another one than before."""
    if _plans is not None and _version(cache_file()) != _known_by:
        forget()


def forget() -> None:
    """Makes `load` read the file again."""
    global _plans
    _plans = None


def save(measured: Plans) -> Path:
    """Adds ``measured`` to the file in one step; what others wrote stays.

    What this process knows is what the file holds then. A file that can't be read is kept as
    ``plans.json.broken``.

    Raises:
        OSError: it can't be written; this process knows what it measured all the same.
    """
    global _plans, _known_by
    _plans = _merged(load(), measured)
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f"{path.name}.lock")):
        try:
            there = _read(path)
        except ValueError:
            path.replace(path.with_name(f"{path.name}.broken"))
            there = {}
        merged = _merged(there, measured)
        draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            draft.write_text(json.dumps(merged, indent=1, sort_keys=True))
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)  # there where the disk is full
        _plans, _known_by = merged, _version(path)
    return path


def _merged(plans: Plans, added: Plans) -> Plans:
    return {key: plans.get(key, {}) | added.get(key, {}) for key in dict.fromkeys((*plans, *added))}


def _read(path: Path) -> Plans:
    """What the file holds; nothing where there is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict):
        raise ValueError("it must hold an object")
    for buckets in content.values():
        if not isinstance(buckets, dict) or not all(isinstance(p, str) for p in buckets.values()):
            raise ValueError("every device must hold an object of buckets and their plans' names")
    return content


def _version(path: Path) -> tuple[object, ...]:
    try:
        found = path.stat()
    except OSError:
        return (path,)
    return path, found.st_ino, found.st_mtime_ns, found.st_size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the other processes that write."""
    with path.open("w") as file:
        if fcntl is not None:
            # Some network file systems have no locks: writers don't take turns there either.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing unlocks


# ---- looking up --------------------------------------------------------------------------------


class Near(NamedTuple):
    """What was measured for a bucket, and how far that is from the one asked for: 0 is the same."""

    plan: str
    distance: int


def nearest(device: torch.device, bucket: str, plans: Collection[str]) -> Near | None:
    """The one of ``plans`` that was measured for the nearest bucket; None where none is near.

    Both buckets have the same direction, dtypes, dropout, codes and gain. Their distance is the
    sum of ``|log2|`` of the ratios of n, k and r and twice that of m.
    """
    measured = load().get(device_key(device), {})
    if measured.get(bucket) in plans:
        return Near(measured[bucket], 0)
    kind, sizes = _parsed(bucket)
    found = []
    for other, plan in measured.items():
        other_kind, other_sizes = _parsed(other)
        if other_kind != kind or len(other_sizes) != len(sizes) or plan not in plans:
            continue
        rows, *rest = (abs(a - b) for a, b in zip(sizes, other_sizes, strict=True))
        if rows <= NEAR_ROWS and sum(rest) <= NEAR_SIZES:
            found.append((2 * rows + sum(rest), other, plan))
    if not found:
        return None
    distance, _, plan = min(found)
    return Near(plan, distance)


@functools.lru_cache(maxsize=4096)
def _parsed(bucket: str) -> tuple[str, tuple[int, ...]]:
    """What must be equal, and log2 of the sizes m, n, k and r: ``"fwd m8 n16"``, (3, 4)."""
    sizes = tuple(int(size).bit_length() - 1 for size in re.findall(r" [mnkr](\d+)", bucket))
    return re.sub(r" ([mnkr])\d+", r" \1", bucket), sizes
