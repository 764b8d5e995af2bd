"""The state of a training in one file: after an interruption it goes on as if there had been none, bit for bit."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import LabError

if TYPE_CHECKING:
    from .train import Recipe, Run

_FORMAT = 1


@dataclass
class State:
    """Everything that the next step depends on, and what names the training it belongs to."""

    run: Run
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    recipe: Recipe
    images: str
    dtype: torch.dtype

    def _identity(self) -> dict[str, object]:
        return {"format": _FORMAT, **asdict(self.recipe), "images": self.images, "dtype": str(self.dtype)}

    def save(self, path: str | Path) -> None:
        """Write all or nothing: an interruption leaves the file of the epoch before."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {
            "identity": self._identity(),
            "model": self.run.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.run.losses,
            "accuracies": self.run.accuracies,
            "predictions": self.run.predictions,
            "seconds": self.run.seconds,
        }
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(parts, unfinished)
        os.replace(unfinished, path)

    def load(self, path: str | Path) -> None:
        """Take over the state in `path`; see `train_lenet`."""
        try:
            parts = torch.load(path, weights_only=True)
            identity = parts["identity"]
        except FileNotFoundError as error:
            raise LabError(f"cannot resume: there is no file {path}") from error
        except Exception as error:  # torch.load raises many kinds
            raise LabError(f"cannot resume: {path} is no checkpoint of a training, or is damaged") from error
        for name, wanted in self._identity().items():
            if identity.get(name) != wanted:
                raise LabError(f"cannot resume: {path} is of {name} {identity.get(name)}, not {wanted}")
        self.run.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])
        self.generator.set_state(parts["generator"])
        for name in ("losses", "accuracies", "predictions", "seconds"):
            setattr(self.run, name, parts[name])
