"""Results as ``python -m bench.gpu`` wrote them, read again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import OURS

Record = dict[str, Any]
KEY = ("section", "what", "group", "op", "axis", "value", "shape", "batch", "attention", "precision", "step", "table",
       "loader", "device", "zero", "kind")  # fmt: skip


class Records:
    """All results of one machine; of two with the same name the later one counts."""

    def __init__(self, records: Iterable[Record], machine: Record, commands: Sequence[str]) -> None:
        self.all = list({tuple(str(r.get(k)) for k in KEY): r for r in records}.values())
        self.machine, self.commands = machine, commands

    def of(self, section: str, **values: Any) -> list[Record]:
        return [r for r in self.all if r["section"] == section and all(r.get(k) == v for k, v in values.items())]

    def find(self, section: str, what: str, **values: Any) -> Record | None:
        """The result of that name that was measured; None if there is none."""
        found = [r for r in self.of(section, what=what, **values) if not {"error", "skipped"} & r.keys()]
        return found[-1] if found else None

    def base(self, section: str) -> str:
        """What the other results of a section are compared with: ours, the easy case, what is chosen here."""
        if section == "attention":
            return (self.find("attention", "chosen") or {"auto": OURS})["auto"]
        return "Gaussian" if section == "vectors" else OURS

    def groups(self, section: str) -> list[str]:
        return list(dict.fromkeys(r["group"] for r in self.of(section) if "group" in r and "wall_ms" in r))


def read(files: Sequence[Path]) -> Records:
    """Raises ValueError: a file is none of these results, or they come from different machines."""
    records: list[Record] = []
    machines: dict[tuple, Record] = {}
    commands: list[str] = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                section, what = record["section"], record["what"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: no result of python -m bench.gpu ({error})") from error
            if what == "machine":
                machines[tuple(record.get(k) for k in ("device", "torch", "tiny"))] = record
            elif what == "plan" and section == "run":
                commands.append(record["command"])
            elif section != "run":
                records.append(record)
    if len(machines) != 1:
        names = ", ".join(f"{m['device']}, torch {m['torch']}{', tiny' * m['tiny']}" for m in machines.values())
        raise ValueError(f"a report is of one machine; these results are of: {names or 'none'}. Make one for each.")
    return Records(records, next(iter(machines.values())), list(dict.fromkeys(commands)))


def device_ms(record: Record) -> float:
    """The device's time of a call; without a GPU the wall's."""
    return record.get("gpu_ms") or record.get("graph_ms") or record["wall_ms"]
