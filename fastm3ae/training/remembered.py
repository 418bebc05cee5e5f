"""The micro-batches that were found on GPUs, so that the next run of the kind need not search.

They stand in a JSON file in the user's cache folder, which may be deleted at any time. What is wrong with it is said,
and stops nothing: the search is made again.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastm3ae
from fastm3ae.config import RunConfig
from fastm3ae.config.files import to_dict
from fastm3ae.training.distributed import Processes

__all__ = ["find_once", "forget"]

FILE = "fastm3ae/micro_batch.json"

Entries = Mapping[str, Mapping[str, Any]]
"""By key: micro_batch; gpus, the kinds that it was found on; date."""


def find_once(find: Callable[[], int], config: RunConfig, most: int, processes: Processes) -> int:
    """Returns how many pairs every process can train on at once: what an earlier run of the kind found, or this one.

    All processes must call this. On a CPU nothing is remembered.

    Args:
        find: Returns it for this process, after trying.
        config: The run, resolved.
        most: Pairs of a process in a step, at most.
        processes: Those that train together.
    """
    if processes.device.type != "cuda":
        return min(processes.gather(find()))
    gpus = sorted(set(processes.gather(_kind(processes.device))))
    key, entries = _key(config, gpus, most, processes.number), processes.from_first(_read)
    if key in entries:
        number, date = entries[key]["micro_batch"], entries[key]["date"]
        if processes.is_first:
            tqdm.write(f"micro_batch {number}, as found before on {date}; delete {_file()} to search anew")
        return number
    number = min(processes.gather(find()))
    if processes.is_first:
        entry = {"micro_batch": number, "gpus": gpus, "date": str(datetime.date.today())}
        if _write({**entries, key: entry}):
            tqdm.write(f"micro_batch {number}: so many pairs fit at once, which {_file()} remembers")
    return number


def forget(device: torch.device, micro_batch: int) -> bool:
    """Forgets that so many pairs fit on a device of this kind, for any run, and returns whether that was remembered."""
    if device.type != "cuda":
        return False
    entries, kind = _read(), _kind(device)
    kept = {key: of for key, of in entries.items() if of["micro_batch"] != micro_batch or kind not in of["gpus"]}
    return len(kept) < len(entries) and _write(kept)


def _kind(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory} bytes"


def _key(config: RunConfig, gpus: list[str], most: int, num_processes: int) -> str:
    """Returns a hash of all on which it depends how many pairs fit."""
    sections = {name: to_dict(getattr(config, name)) for name in ("model", "masking", "task") if hasattr(config, name)}
    matters = {
        **sections,
        **config.step_options(),
        "cuda_graphs": config.train.cuda_graphs,
        "precision": config.train.precision,
        "parallel": config.train.parallel,
        "max_text_tokens": config.data.max_text_tokens,
        "most": most,
        "num_processes": num_processes,
        "gpus": gpus,
        "torch": torch.__version__,
        "fastm3ae": fastm3ae.__version__,
    }
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()


def _read() -> Entries:
    """Returns what is remembered: nothing where the file is missing, or cannot be used, which is said."""
    try:
        entries = json.loads(_file().read_text(encoding="utf-8"))
        if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
            raise ValueError("its entries are not as they were written")
        return entries
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:
        tqdm.write(f"{FILE} in the cache folder cannot be used, so that micro_batch is searched for: {error}")
        return {}


def _is_entry(entry: Any) -> bool:
    kinds = {"micro_batch": int, "gpus": list, "date": str}
    return (
        isinstance(entry, dict)
        and {name: type(value) for name, value in entry.items()} == kinds
        and entry["micro_batch"] > 0
    )


def _write(entries: Entries) -> bool:
    """Puts a file with these entries in the place of the one before, whole; returns whether it could, else says why."""
    try:
        path = _file()
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return True
    except (OSError, RuntimeError) as error:
        tqdm.write(f"{FILE} in the cache folder cannot be written, so that micro_batch is not remembered: {error}")
        return False


def _file() -> Path:
    """Returns where the entries stand; a RuntimeError where the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / FILE
