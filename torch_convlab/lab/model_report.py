"""Everything the lab finds out about a model, as one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import torch
from rich.table import Table
from torch import nn

from .. import build_info
from .errors import LabError


@dataclass(frozen=True)
class Block:
    """A piece of a section; `kind` is text, facts, checks, picture or rows, and says which fields are used."""

    kind: str
    text: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)  # name, value
    checks: list[tuple[bool, str]] = field(default_factory=list)
    svg: str = field(default="", repr=False)
    caption: str = ""
    scrolled: bool = False
    title: str = ""
    columns: list[tuple[str, bool]] = field(default_factory=list)  # name, whether flush left
    rows: list[tuple[str, ...]] = field(default_factory=list, repr=False)

    @classmethod
    def of_table(cls, table: Table) -> Block:
        """A table of the command line."""
        columns = [(str(column.header), column.justify == "left") for column in table.columns]
        cells = [[str(cell) for cell in column.cells] for column in table.columns]
        return cls("rows", title=str(table.title or ""), columns=columns, rows=list(zip(*cells)))


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    blocks: list[Block]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(passed for block in self.blocks for passed, _ in block.checks)


@dataclass(frozen=True)
class Report:
    """What was found out about a model. Made by `report`."""

    model: str
    input_size: tuple[int, ...]
    sections: list[Section]

    @property
    def passed(self) -> bool:
        """False if a check of any section failed."""
        return all(section.passed for section in self.sections)

    def html(self, path: str | Path) -> Path:
        """Write the report as a page that needs nothing else; folders above it are made. Returns the path."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("torch_convlab", "lab"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        page = environment.get_template("model.html.jinja").render(
            report=self,
            build=build_info(),
            threads=torch.get_num_threads(),
            date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        return path


def report(
    model: nn.Module,
    shape: tuple[int, ...],
    name: str = "model",
    seed: int = 0,
    sections: Iterable[str] | None = None,
    track: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> Report:
    """Find out all that the lab can about `model`, section by section.

    Args:
        model: any module that maps one tensor to one tensor; not changed.
        shape: of its input.
        name: of the model.
        seed: of the random input.
        sections: keys of `torch_convlab.lab.sections.SECTIONS`; default: all.
        track: wraps the loop over the sections, for progress.

    A section that cannot be made for this model says why and the others follow.

    Raises:
        LabError: a section that there is not.
    """
    from .sections import SECTIONS, Subject  # imports all of the lab

    keys = list(SECTIONS) if sections is None else list(sections)
    for key in keys:
        if key not in SECTIONS:
            raise LabError(f"unknown section {key!r}: expected one of {', '.join(SECTIONS)}")
    torch.manual_seed(seed)
    subject = Subject(name, model, torch.randn(shape))
    made = []
    for key in track(keys, "sections"):
        title, make = SECTIONS[key]
        start = time.perf_counter()
        try:
            blocks = make(subject)
        except LabError as error:
            blocks = [Block("text", text=f"Not for this model: {error}")]
        made.append(Section(key, title, blocks, time.perf_counter() - start))
    return Report(name, tuple(shape), made)
