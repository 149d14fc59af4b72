"""What a part is told: whether it is a rehearsal, where it may put large files, and until when it has time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Settings"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """`work`: a folder for bundles and weights, which all parts of a run share."""

    work: Path
    rehearse: bool = False

    @property
    def compiler(self) -> str:
        """torch.compile's backend; a rehearsal goes through all but the compiling."""
        return "eager" if self.rehearse else "inductor"

    @property
    def torch_device(self) -> str:
        return "cpu" if self.rehearse else "cuda"
