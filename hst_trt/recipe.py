"""Recipes (what to build) and targets (what to build it for): TOML files under ``build/``; a copy ships in the wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import MissingError, RequestError
from .plan import BUCKET_RATIOS
from .spec import MAX_COUNT, MAX_IMAGES, MAX_SIDE

__all__ = [
    "Defaults",
    "Limits",
    "ModelSource",
    "PrecisionName",
    "Recipe",
    "Target",
    "departures",
    "load_recipe",
    "load_target",
    "target_names",
]

PrecisionName = Literal["float32", "float16", "bfloat16"]

PACKAGE_PREFIX = "package:"


class _Table(BaseModel):
    """Frozen, and strict about unknown keys: a misspelt key must not be ignored in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSource(_Table):
    """Where a model is: a local directory, a hub id, or ``package:NAME`` for data that ships with this package."""

    source: str
    revision: str | None = None
    component: str = "transformer"


# Upper ends of the two are those of the bundle format, with which no size of a tensor passes 63 bits.
class Limits(_Table):
    max_side: int = Field(gt=0, le=MAX_SIDE)  # pixels
    max_images: int = Field(gt=0, le=MAX_IMAGES)


class Defaults(_Table):
    num_inference_steps: int = Field(gt=0, le=MAX_COUNT)
    guidance_scale: float = Field(ge=0)
    height: int = Field(gt=0, le=MAX_SIDE)
    width: int = Field(gt=0, le=MAX_SIDE)


class Recipe(_Table):
    """A pair of models. Everything but the small transformer comes from the large model's directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    large: ModelSource
    small: ModelSource
    t5: bool = True
    max_sequence_length: int = Field(gt=0, le=512)
    limits: Limits
    defaults: Defaults
    resolutions: tuple[tuple[int, int], ...] = ()  # height and width in pixels that engines are tuned for
    float32_blocks: tuple[int, ...] = ()  # of the large transformer, computed in float32 in graphs of half precision
    given_as: str = Field(default="", exclude=True)  # what `load_recipe` was called with, for messages that name a command

    @property
    def pinned_resolutions(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels; the default size where the recipe names none."""
        return self.resolutions or ((self.defaults.height, self.defaults.width),)


class Target(_Table):
    """A kind of machine, and what engines are tuned for on it."""

    name: str
    backend: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    precision: PrecisionName
    default_recipe: str
    sms: tuple[int, ...] = ()
    images: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(1,), min_length=1)  # in one batch
    bucket_ratios: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=BUCKET_RATIOS, min_length=1)


_Model = TypeVar("_Model", bound=_Table)


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or by the path of a TOML file.

    A relative local directory in a recipe file is taken from the file's own folder.
    """
    path = Path(name)
    if path.suffix != ".toml":
        recipe = _load(_folder("recipes") / f"{name}.toml", Recipe, "recipe", _names("recipes"))
        return recipe.model_copy(update={"given_as": name})
    recipe = _load(path, Recipe, "recipe", _names("recipes"))
    beside = {
        role: model.model_copy(update={"source": str((path.parent / model.source).resolve())})
        for role in ("large", "small")
        if (path.parent / (model := getattr(recipe, role)).source).is_dir()
    }
    return recipe.model_copy(update={"given_as": name} | beside)


def load_target(name: str) -> Target:
    return _load(_folder("targets") / f"{name}.toml", Target, "target", target_names())


def departures(target: Target) -> dict[str, str]:
    """What was chosen instead of what the target's file says: `backend`, `precision`, or neither."""
    own = load_target(target.name)
    return {key: getattr(target, key) for key in ("backend", "precision") if getattr(target, key) != getattr(own, key)}


def target_names() -> list[str]:
    return _names("targets")


def _folder(kind: str) -> Path:
    """The wheel carries a copy of ``build/``; an editable install reads the checkout's own."""
    here = Path(__file__).resolve().parent
    packaged = here / "data" / "build" / kind
    return packaged if packaged.is_dir() else here.parent / "build" / kind


def _names(kind: str) -> list[str]:
    return sorted(path.stem for path in _folder(kind).glob("*.toml"))


def _load(path: Path, model: type[_Model], what: str, names: list[str]) -> _Model:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise MissingError(
            f"there is no {what} {path.name!r}",
            found=f"the {what}s {', '.join(names)}",
            fix=f"use one of them, or give the path of a {what} file that ends in .toml",
        ) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise RequestError(f"{path} is not valid TOML", found=str(exc)) from exc
    try:
        return model.model_validate(table)
    except ValidationError as exc:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        raise RequestError(
            f"{path} is not a valid {what}", found=problems, fix="compare it with the ones under build/"
        ) from exc
