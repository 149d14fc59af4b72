"""Exports a pair: every graph with its weights, tokenizers and scheduler, into the staging folder of a bundle.

Parts are made one by one, checked, and journaled, so an interrupted export goes on with the first unfinished part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ..bundle import GraphEntry, ModelEntry, Staging, TensorEntry, TokenizerEntry, hash_file, link_or_copy
from ..errors import IncompatibleError, MissingError
from ..recipe import Recipe, Target
from ..tensor_names import LARGE, SMALL, TEXT_ENCODERS, VAE_DECODER
from .check import check_clip, check_glue, check_structure, check_t5, check_transformer, check_vae
from .glue import glue_graphs, join_text_graph
from .graph import GraphBuilder
from .sources import check_stitchable, read_config, resolve_pair
from .text import clip_text_graph, t5_encoder_graph
from .transformer import transformer_graph
from .vae import vae_decoder_graph
from .weights import WeightStore

__all__ = ["ExportedPair", "PairExporter"]

_HASHED_UP_TO = 2**30

_NUMPY_NAMES = {1: "float32", 10: "float16", 16: "bfloat16", 7: "int64", 6: "int32", 2: "uint8", 9: "bool"}


@dataclass(frozen=True)
class _Part:
    name: str
    inputs: str  # a hash of all it is made from
    make: Callable[[Path], tuple[list[Path], dict[str, Any]]]  # staging folder -> files, and what the manifest says of them


@dataclass(frozen=True)
class ExportedPair:
    """What an export left in the staging folder."""

    parts: dict[str, dict[str, Any]]

    @property
    def graphs(self) -> dict[str, GraphEntry]:
        graphs = {name: g for part in self.parts.values() for name, g in part.get("graphs", {}).items()}
        return {name: GraphEntry.model_validate(entry) for name, entry in graphs.items()}

    @property
    def tokenizers(self) -> tuple[TokenizerEntry, ...]:
        return tuple(TokenizerEntry.model_validate(entry) for entry in self.parts["tokenizers"]["tokenizers"])


class PairExporter:
    """Exports the pair of a recipe for a target.

    Args:
        recipe: the pair; its models are found, and refused if they do not fit, at once.
        target: decides the precision.
    """

    def __init__(self, recipe: Recipe, target: Target, *, download: bool = True) -> None:
        self.recipe, self.target = recipe, target
        self.folders = resolve_pair(recipe, download=download)
        check_stitchable(self.folders)
        self.configs = {
            LARGE: read_config(self.folders.large / "config.json"),
            SMALL: read_config(self.folders.small / "config.json"),
        }
        self._encoders = self._text_encoder_folders()
        vae = self.folders.component("vae")
        if vae is None:
            raise MissingError(f"{self.folders.root} has no VAE", fix="give the directory of a complete diffusers model")
        self._vae = vae
        self._parts = [
            self._tokenizers(),
            self._scheduler(),
            self._glue(),
            *(self._text_encoder(name, folder) for name, folder in self._encoders.items()),
            self._vae_decoder(),
            self._transformer(SMALL, self.folders.small, cached=False),
            self._transformer(LARGE, self.folders.large, cached=True),
        ]

    def _text_encoder_folders(self) -> dict[str, Path]:
        found = {name: path for name in TEXT_ENCODERS if (path := self.folders.component(name)) is not None}
        if not self.recipe.t5:
            found.pop("text_encoder_3", None)
        missing = [name for name in TEXT_ENCODERS[:2] if name not in found]
        if missing:
            raise MissingError(f"{self.folders.root} lacks {', '.join(missing)}", fix="SD3 needs both CLIP text encoders")
        return found

    @property
    def inputs(self) -> dict[str, str]:
        """For each part a hash of what it is made from."""
        return {part.name: part.inputs for part in self._parts}

    def run(self, staging: Staging, on_part: Callable[[str, bool], None] = lambda name, made: None) -> ExportedPair:
        """Makes all parts that the staging folder does not hold yet.

        Args:
            on_part: called with a part's name before it is made (True) or taken over from an interrupted export (False).

        Raises:
            HstError: a check failed, or the disk is full.
        """
        results = {}
        for part in self._parts:
            result = staging.part(part.name, part.inputs)
            on_part(part.name, result is None)
            if result is None:
                files, result = part.make(staging.path)
                staging.finish(part.name, part.inputs, files, result)
            results[part.name] = result
        return ExportedPair(results)

    def models(self) -> dict[str, ModelEntry]:
        """What the manifest says of the two transformers."""
        keys = [
            "in_channels",
            "out_channels",
            "patch_size",
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "joint_attention_dim",
            "pooled_projection_dim",
            "pos_embed_max_size",
            "dual_attention_layers",
            "qk_norm",
            "sample_size",
        ]
        return {
            name: ModelEntry(
                source=source.source,
                revision=source.revision,
                component=source.component,
                config={key: self.configs[name].get(key) for key in keys},
            )
            for name, source in ((LARGE, self.recipe.large), (SMALL, self.recipe.small))
        }

    @property
    def vae_scale(self) -> int:
        return 2 ** (len(read_config(self._vae / "config.json")["block_out_channels"]) - 1)

    # -- parts -------------------------------------------------------------------------------------------------------
    def _part(self, name: str, inputs: Any, make: Callable[[Path], tuple[list[Path], dict[str, Any]]]) -> _Part:
        content = {"from": inputs, "exporter": _own_hash(), "precision": self.target.precision, "cache": self._cache_rows}
        return _Part(name, hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest(), make)

    def _graph_part(
        self,
        name: str,
        folder: Path,
        build: Callable[[dict[str, Any], WeightStore], GraphBuilder],
        check: Callable[[Path, dict[str, Any]], float],
        settings: Any = None,
    ) -> _Part:
        """A graph with weights: written beside links to its weight files, then checked there.

        Args:
            settings: what else decides the graph.
        """
        config = read_config(folder / "config.json")
        weights = WeightStore(folder)

        def make(staging: Path) -> tuple[list[Path], dict[str, Any]]:
            home = staging / "graphs" / name
            linked = [home / file.name for file in weights.files]
            for source, target in zip(weights.files, linked, strict=True):
                link_or_copy(source, target)
            path = home / "model.onnx"
            model = build(config, weights).save(path)
            check_structure(path, self.target.precision)
            described = [home / file.name for file in folder.glob("*.json")]  # the check loads the folder as a model
            try:
                for file in described:
                    file.write_bytes((folder / file.name).read_bytes())
                worst = check(home, config)
            finally:
                for file in described:
                    file.unlink(missing_ok=True)
            entry = _graph_entry(model, path, linked, staging, worst)
            return [path, *linked], {"graphs": {name: entry.model_dump()}}

        return self._part(name, [config, [_identity(file) for file in weights.files], settings], make)

    def _transformer(self, name: str, folder: Path, *, cached: bool) -> _Part:
        settings: dict[str, Any] = {"cached": cached, "cache_rows": self._cache_rows}
        if name == LARGE:
            settings["float32_blocks"] = self.recipe.float32_blocks
        return self._graph_part(
            name,
            folder,
            lambda config, weights: transformer_graph(config, weights, self.target.precision, **settings),
            lambda where, config: check_transformer(where, config, cached=cached, static=self._cache_rows is not None),
            settings,
        )

    @property
    def _cache_rows(self) -> tuple[int, int] | None:
        """TensorRT's KV-cache layer wants a cache of static length: long enough for the largest image of the recipe."""
        if self.target.backend == "onnxruntime":
            return None
        side = self.recipe.limits.max_side // (self.vae_scale * self.configs[LARGE]["patch_size"])
        return self._clip_length + self.recipe.max_sequence_length, side * side

    def _text_encoder(self, name: str, folder: Path) -> _Part:
        if name == "text_encoder_3":
            # T5 overflows in float16; a float16 target computes it in float32.
            precision = "float32" if self.target.precision == "float16" else self.target.precision
            length = self.recipe.max_sequence_length
            return self._graph_part(
                name,
                folder,
                lambda config, weights: t5_encoder_graph(config, weights, precision, length),
                lambda where, config: check_t5(where, config, length),
            )
        return self._graph_part(
            name,
            folder,
            lambda config, weights: clip_text_graph(config, weights, self.target.precision, self._clip_length),
            lambda where, config: check_clip(where, config, self._clip_length),
        )

    def _vae_decoder(self) -> _Part:
        patch = self.configs[LARGE]["patch_size"]
        return self._graph_part(
            VAE_DECODER,
            self._vae,
            lambda config, weights: vae_decoder_graph(config, weights, self.target.precision, patch_size=patch),
            lambda where, config: check_vae(where, config, patch),
        )

    def _glue(self) -> _Part:
        clip = [read_config(self._encoders[name] / "config.json") for name in TEXT_ENCODERS[:2]]
        settings = (
            tuple(config["hidden_size"] for config in clip),
            tuple(config["projection_dim"] for config in clip),
            self.configs[LARGE]["joint_attention_dim"],
            self._clip_length,
            self.recipe.max_sequence_length,
            "text_encoder_3" in self._encoders,
        )

        def make(staging: Path) -> tuple[list[Path], dict[str, Any]]:
            builders = glue_graphs() | {"join_text": join_text_graph(*settings)}
            paths = {name: staging / "graphs" / "glue" / f"{name}.onnx" for name in builders}
            models = {name: builder.save(paths[name]) for name, builder in builders.items()}
            for path in paths.values():
                check_structure(path, "float32")
            worst = check_glue(paths)
            entries = {name: _graph_entry(models[name], paths[name], [], staging, worst).model_dump() for name in builders}
            return list(paths.values()), {"graphs": entries}

        return self._part("glue", settings, make)

    @property
    def _clip_length(self) -> int:
        return int(read_config(self._encoders["text_encoder"] / "config.json")["max_position_embeddings"])

    def _tokenizers(self) -> _Part:
        names = {"tokenizer": self._clip_length, "tokenizer_2": self._clip_length}
        if "text_encoder_3" in self._encoders:
            names["tokenizer_3"] = self.recipe.max_sequence_length

        def make(staging: Path) -> tuple[list[Path], dict[str, Any]]:
            from transformers import AutoTokenizer

            files, entries = [], []
            for name, length in names.items():
                tokenizer = AutoTokenizer.from_pretrained(self.folders.root / name, use_fast=True)
                backend = getattr(tokenizer, "backend_tokenizer", None)
                if backend is None:
                    raise IncompatibleError(
                        f"{self.folders.root / name} is not a fast tokenizer", fix="save it with transformers 4 or 5"
                    )
                backend.no_truncation()
                backend.no_padding()
                path = staging / "tokenizers" / f"{name}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(json.loads(backend.to_str()), ensure_ascii=False, sort_keys=False), encoding="utf-8")
                files.append(path)
                relative = path.relative_to(staging).as_posix()
                entries.append({"path": relative, "length": length, "pad_id": tokenizer.pad_token_id})
            return files, {"tokenizers": entries}

        sources = [_identity(file) for name in names for file in sorted((self.folders.root / name).iterdir())]
        return self._part("tokenizers", [names, sources], make)

    def _scheduler(self) -> _Part:
        from ..schedule import FlowMatchEuler

        config = read_config(self.folders.root / "scheduler" / "scheduler_config.json")
        FlowMatchEuler.from_config(config)  # refuses what the loop cannot run

        def make(staging: Path) -> tuple[list[Path], dict[str, Any]]:
            path = staging / "scheduler.json"
            path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
            return [path], {}

        return self._part("scheduler", config, make)


def _graph_entry(model: onnx.ModelProto, path: Path, weights: list[Path], root: Path, worst: float) -> GraphEntry:
    def tensors(values: Any) -> tuple[TensorEntry, ...]:
        return tuple(
            TensorEntry(
                name=value.name,
                dtype=_NUMPY_NAMES[value.type.tensor_type.elem_type],
                shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    return GraphEntry(
        path=path.relative_to(root).as_posix(),
        weights=tuple(file.relative_to(root).as_posix() for file in weights),
        inputs=tensors(model.graph.input),
        outputs=tensors(model.graph.output),
        worst_error=worst,
    )


def _identity(file: Path) -> list[Any]:
    """Enough to notice that a file is another one, without hashing many gigabytes first.

    The hub's cache names large files by their hash; other large files are told apart by size and time.
    """
    real = file.resolve()
    stat = real.stat()
    if real.parent.name == "blobs":
        return [file.name, real.name]
    return [file.name, stat.st_size, stat.st_mtime_ns] if stat.st_size > _HASHED_UP_TO else [file.name, hash_file(real)]


def _own_hash() -> str:
    """A hash of this package's exporting code: a changed exporter makes every part anew."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
