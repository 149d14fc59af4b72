"""Good and bad bundles, as one table for every reader of the format: what is done to a bundle, and the exit code of opening it.

0 is a bundle that opens; the codes are those of `hst_trt/errors.py`. All files are replaced and never written in place, since
they may be hard links to another bundle's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["CASES", "FIELDS", "Case", "link_copy", "with_field"]

Damage = Callable[[Path], None]
Case = tuple[Damage, int]
Table = dict[str, Any]

SCHEDULER = "scheduler.json"
TOKENIZER = "tokenizers/tokenizer.json"
T5 = "tokenizers/tokenizer_3.json"
MANIFEST = "manifest.json"

COSTS = {
    "machine": "a CPU, 2 CPUs", "backend_version": "1.32.0", "threads": 0, "images": 1, "guided": True, "height": 64,
    "width": 64, "date": "2026-01-01", "large_seconds": {"8": 0.5, "16": 1}, "small_seconds": 0.25, "text_seconds": 0.25,
    "vae_seconds": 1, "step_seconds": 0.001,
}  # fmt: skip
SCHEDULE = {
    "stages": [2, 1, 1], "solver": "ab2", "shift": None, "ratio": 0.3, "correction": 0, "refresh": 0, "ras": False,
    "latents": 0.5,
    "features": 0.5, "confirmed": {"latents": 0.4, "features": 0.6},
}  # fmt: skip
CALIBRATION = {
    "height": 64, "width": 64, "guidance_scale": 3, "prompts": 4, "prompts_hash": "x", "further_prompts": 2,
    "further_hash": "y", "baseline_steps": 28, "converged_steps": 100, "date": "2026-01-01", "schedules": [SCHEDULE],
}  # fmt: skip
ENGINE = {
    "path": SCHEDULER, "profiles": [{"axes": {"B": [1, 1, 4]}}], "activation_bytes": 5, "read_back": "network",
    "seconds": 0.5,
}  # fmt: skip


# -- what is done to a bundle ------------------------------------------------------------------------------------------
def link_copy(bundle: Path, target: Path) -> Path:
    """A copy whose files are links to the same bytes."""
    for file in bundle.rglob("*"):
        if file.is_file():
            (target / file.relative_to(bundle)).parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target / file.relative_to(bundle))
    return target


def put(name: str, content: bytes) -> Damage:
    """Another content, which the manifest does not know of."""

    def done(bundle: Path) -> None:
        (bundle / name).unlink()
        (bundle / name).write_bytes(content)

    return done


def manifest(content: bytes) -> Damage:
    return put(MANIFEST, content)


def rewrite(change: Callable[[bytes], bytes]) -> Damage:
    """Another manifest, as bytes."""
    return lambda bundle: manifest(change((bundle / MANIFEST).read_bytes()))(bundle)


def edit(change: Callable[[Table], Any]) -> Damage:
    """Another manifest, as a table that is changed in place."""

    def changed(content: bytes) -> bytes:
        table = full(json.loads(content))
        change(table)
        return json.dumps(table).encode()

    return rewrite(changed)


def full(table: Table) -> Table:
    """A manifest with every optional part."""
    more = {"costs": [COSTS], "calibrations": [CALIBRATION], "engines": {"large": ENGINE}}
    return table | copy.deepcopy(more) | {"target": table["target"] | {"sms": [90]}}


def swap(old: str, new: str) -> Damage:
    """The first place of a text in the manifest, written in another way."""

    def changed(content: bytes) -> bytes:
        text = json.dumps(full(json.loads(content)))
        assert old in text, old
        return text.replace(old, new, 1).encode()

    return rewrite(changed)


def replace(name: str, content: bytes) -> Damage:
    """Another content, with its hash in the manifest: what a reader must find by reading it."""

    def done(bundle: Path) -> None:
        put(name, content)(bundle)
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        edit(lambda m: m["files"].update({name: entry}))(bundle)

    return done


def change(name: str, changed: Callable[[Table], Any]) -> Damage:
    """A JSON file of the bundle, changed in place, with its hash in the manifest."""

    def done(bundle: Path) -> None:
        table = json.loads((bundle / name).read_bytes())
        changed(table)
        replace(name, json.dumps(table).encode())(bundle)

    return done


def flip(name: str) -> Damage:
    def done(bundle: Path) -> None:
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        put(name, bytes(content))(bundle)

    return done


def listed(name: str) -> Damage:
    """A path that the manifest lists, beside those that it should."""
    return edit(lambda m: m["files"].update({name: m["files"][SCHEDULER]}))


def link_out(name: str) -> Damage:
    """A file or folder that moved outside, with a link in its place."""

    def done(bundle: Path) -> None:
        outside = bundle.parent / "outside"
        (bundle / name).rename(outside)
        (bundle / name).symlink_to(outside)

    return done


def link_in(name: str) -> Damage:
    """A file that moved within the bundle, with a link in its place."""

    def done(bundle: Path) -> None:
        (bundle / name).rename(bundle / "moved")
        (bundle / name).symlink_to("moved" if "/" not in name else "../moved")

    return done


def circle(name: str) -> Damage:
    def done(bundle: Path) -> None:
        (bundle / name).unlink()
        (bundle / name).symlink_to(Path(name).name)

    return done


def pipe(name: str) -> Damage:
    def done(bundle: Path) -> None:
        (bundle / name).unlink()
        os.mkfifo(bundle / name)

    return done


def folder(name: str) -> Damage:
    def done(bundle: Path) -> None:
        (bundle / name).unlink()
        (bundle / name).mkdir()

    return done


def extra(bundle: Path) -> None:
    (bundle / "graphs" / "notes.txt").write_text("nobody asked for these")


def config(**fields: Any) -> Damage:
    return edit(lambda m: m["models"]["large"]["config"].update(fields))


def scheduler(**fields: Any) -> Damage:
    return change(SCHEDULER, lambda config: config.update(fields))


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


LEVELS_ABOVE_CONFIG = 4  # the manifest, models, large, config

# -- the table ---------------------------------------------------------------------------------------------------------
CASES: dict[str, Case] = {
    "nothing": (lambda bundle: None, 0),
    "every optional part": (edit(lambda m: None), 0),
    "a file that is not listed": (extra, 0),
    # the manifest as JSON
    "no manifest": (lambda bundle: (bundle / MANIFEST).unlink(), 6),
    "empty manifest": (manifest(b""), 6),
    "cut after a byte": (rewrite(lambda content: content[:1]), 6),
    "cut at a tenth": (rewrite(lambda content: content[: len(content) // 10]), 6),
    "cut in the middle": (rewrite(lambda content: content[: len(content) // 2]), 6),
    "cut before the last brace": (rewrite(lambda content: content.rstrip()[:-1]), 6),
    "more after the end": (rewrite(lambda content: content + b"{}"), 6),
    "a NUL after the end": (rewrite(lambda content: content + b"\0"), 6),
    "white space around": (rewrite(lambda content: b" \r\n\t" + content + b"\n \t\r"), 0),
    "white space that JSON lacks": (rewrite(lambda content: b"\f" + content), 6),
    "an array": (manifest(b"[1]"), 6),
    "a number": (manifest(b"7"), 6),
    "null": (manifest(b"null"), 6),
    "a comment": (rewrite(lambda content: b"// written by hand\n" + content), 6),
    "a comma too many": (swap('"schema_version": 1', '"schema_version": 1,'), 6),
    "single quotes": (swap('"schema_version"', "'schema_version'"), 6),
    "not UTF-8": (rewrite(lambda content: content.replace(b'"tiny-cpu"', b'"\xff"', 1)), 6),
    "UTF-16": (rewrite(lambda content: content.decode().encode("utf-16")), 6),
    "overlong UTF-8": (rewrite(lambda content: content.replace(b'"tiny-cpu"', b'"\xc0\xaf"', 1)), 6),
    "a surrogate in UTF-8": (rewrite(lambda content: content.replace(b'"tiny-cpu"', b'"\xed\xa0\x80"', 1)), 6),
    "a byte order mark": (rewrite(lambda content: b"\xef\xbb\xbf" + content), 6),
    "a name in other letters": (edit(lambda m: m.update(name="東京 🐧")), 0),
    "two halves of a character": (swap('"tiny-cpu"', '"\\ud83d\\udc27"'), 0),
    "half a character": (swap('"tiny-cpu"', '"\\ud83d"'), 6),
    "half a character in a key": (config(**{"\ud83d": 1}), 6),
    "the other half": (swap('"tiny-cpu"', '"\\udc27"'), 6),
    "half a character in a config": (config(note="\udc27"), 6),
    "halves in the wrong order": (swap('"tiny-cpu"', '"\\udc27\\ud83d"'), 6),
    "an escape that is none": (swap('"tiny-cpu"', '"\\x41"'), 6),
    "an escape that is cut": (swap('"tiny-cpu"', '"\\u12"'), 6),
    "an escape with a sign": (swap('"tiny-cpu"', '"\\u+123"'), 6),
    "a line break in a text": (swap('"tiny-cpu"', '"tiny\n"'), 6),
    "a NUL in a text": (swap('"tiny-cpu"', '"tiny\\u0000"'), 0),
    "a key twice": (swap('"schema_version": 1', '"schema_version": 1, "schema_version": 1'), 6),
    "a key twice in a config": (swap('"in_channels"', '"x": 1, "x": 1, "in_channels"'), 6),
    "a key twice, written in two ways": (swap('"in_channels"', '"x": 1, "\\u0078": 1, "in_channels"'), 6),
    "100 000 levels": (manifest(b"[" * 100_000), 6),
    "100 000 levels of objects": (manifest(b'{"a":' * 100_000), 6),
    "as many levels as there may be": (config(note=nested(200 - LEVELS_ABOVE_CONFIG)), 0),
    "a level too many": (config(note=nested(201 - LEVELS_ABOVE_CONFIG)), 6),
    "NaN": (swap('"guidance_scale": 3.0', '"guidance_scale": NaN'), 6),
    "NaN in a config": (config(note=float("nan")), 6),
    "Infinity": (swap('"guidance_scale": 3.0', '"guidance_scale": Infinity'), 6),
    "minus Infinity in a config": (config(note=float("-inf")), 6),
    "1e999": (swap('"guidance_scale": 3.0', '"guidance_scale": 1e999'), 6),
    "1e999 in a config": (swap('"in_channels"', '"x": 1e999, "in_channels"'), 6),
    "1e-999 in a config": (swap('"in_channels"', '"x": 1e-999, "in_channels"'), 6),
    "0e-999 in a config": (swap('"in_channels"', '"x": 0e-999, "in_channels"'), 0),
    "the least number in a config": (swap('"in_channels"', '"x": 5e-324, "in_channels"'), 0),
    "a whole number of 20 digits in a config": (config(note=10**19), 6),
    "the largest whole number in a config": (config(note=2**63 - 1), 0),
    "the least whole number in a config": (config(note=-(2**63)), 0),
    "a whole number of 5000 digits": (swap('"vae_scale": 8', '"vae_scale": ' + "8" * 5000), 6),
    "a leading zero": (swap('"vae_scale": 8', '"vae_scale": 08'), 6),
    "a plus sign": (swap('"vae_scale": 8', '"vae_scale": +8'), 6),
    "no digits after the point": (swap('"vae_scale": 8', '"vae_scale": 8.'), 6),
    "a whole number with an exponent": (swap('"vae_scale": 8', '"vae_scale": 8e0'), 6),
    "a number without a fraction": (swap('"guidance_scale": 3.0', '"guidance_scale": 3'), 0),
    "hexadecimal": (swap('"vae_scale": 8', '"vae_scale": 0x8'), 6),
    # what the manifest says
    "newer": (edit(lambda m: m.update(schema_version=2)), 3),
    "newer, with fields of its own": (edit(lambda m: m.update(schema_version=2, surprise=1)), 3),
    "newer, and nothing else": (manifest(b'{"schema_version": 2}'), 3),
    "version 0": (edit(lambda m: m.update(schema_version=0)), 6),
    "version -1": (edit(lambda m: m.update(schema_version=-1)), 6),
    "version of 20 digits": (edit(lambda m: m.update(schema_version=10**19)), 6),
    "version as text": (edit(lambda m: m.update(schema_version="2")), 6),
    "version with a fraction": (edit(lambda m: m.update(schema_version=2.0)), 6),
    "unknown field": (edit(lambda m: m.update(surprise=1)), 6),
    "unknown field of the target": (edit(lambda m: m["target"].update(surprise=1)), 6),
    "unknown field of a cost": (edit(lambda m: m["costs"][0].update(surprise=1)), 6),
    "unknown field of a config": (config(surprise={"deep": [1, None, True]}), 0),
    "another state": (edit(lambda m: m.update(state="nearly")), 6),
    "graphs only": (edit(lambda m: m.update(state="graphs")), 3),
    "another backend": (edit(lambda m: m["target"].update(backend="openvino")), 6),
    "another precision": (edit(lambda m: m["target"].update(precision="int8")), 6),
    "another kind of GPU": (edit(lambda m: m["target"].update(name="gh200", sms=[75, 999])), 0),
    "engines for another processor": (edit(lambda m: m["target"].update(backend="tensorrt", arch="riscv64")), 3),
    "engines for another system": (edit(lambda m: m["target"].update(backend="tensorrt-rtx", os="plan9")), 3),
    "graphs of another system": (edit(lambda m: m["target"].update(os="plan9", arch="riscv64")), 0),
    "no tokenizers": (edit(lambda m: m.update(tokenizers=[])), 6),
    "four tokenizers": (edit(lambda m: m["tokenizers"].append(m["tokenizers"][0])), 6),
    "no large model": (edit(lambda m: m["models"].pop("large")), 6),
    "no small model": (edit(lambda m: m["models"].pop("small")), 6),
    "a third model": (edit(lambda m: m["models"].update(middle=m["models"]["large"])), 0),
    "no large graph": (edit(lambda m: m["graphs"].pop("large")), 6),
    "no decoder": (edit(lambda m: m["graphs"].pop("vae_decoder")), 6),
    "no graph for a tokenizer": (edit(lambda m: m["graphs"].pop("text_encoder_2")), 6),
    "older glue": (edit(lambda m: m["graphs"].pop("advance")), 3),
    "more glue": (edit(lambda m: m["graphs"].update(later=m["graphs"]["advance"])), 0),
    "a hash that is too short": (edit(lambda m: m["files"][SCHEDULER].update(sha256="x")), 6),
    "a hash in capitals": (edit(lambda m: m["files"][SCHEDULER].update(sha256="A" * 64)), 6),
    "a hash with a line break": (edit(lambda m: m["files"][SCHEDULER].update(sha256="a" * 64 + "\n")), 6),
    "a length below 0": (edit(lambda m: m["files"][SCHEDULER].update(bytes=-1)), 6),
    "an engine without profiles": (edit(lambda m: m["engines"]["large"].update(profiles=[])), 6),
    "a profile of two lengths": (edit(lambda m: m["engines"]["large"]["profiles"][0]["axes"].update(B=[1, 2])), 6),
    "costs of no call": (edit(lambda m: m["costs"][0].update(large_seconds={})), 6),
    "costs of 0 tokens": (edit(lambda m: m["costs"][0].update(large_seconds={"0": 1})), 6),
    "costs of tokens with a zero in front": (edit(lambda m: m["costs"][0].update(large_seconds={"08": 1})), 6),
    "costs of tokens with a sign": (edit(lambda m: m["costs"][0].update(large_seconds={"+8": 1})), 6),
    "costs of tokens with a space": (edit(lambda m: m["costs"][0].update(large_seconds={" 8": 1})), 6),
    "costs of tokens with a fraction": (edit(lambda m: m["costs"][0].update(large_seconds={"8.0": 1})), 6),
    "costs of tokens with a line": (edit(lambda m: m["costs"][0].update(large_seconds={"1_6": 1})), 6),
    "costs of too many tokens": (edit(lambda m: m["costs"][0].update(large_seconds={"9" * 30: 1})), 6),
    "a call of no time": (edit(lambda m: m["costs"][0].update(large_seconds={"8": 0})), 6),
    "a share of 0": (edit(lambda m: m.update(bucket_ratios=[0])), 6),
    "a share above 1": (edit(lambda m: m.update(bucket_ratios=[1.5])), 6),
    "no shares": (edit(lambda m: m.update(bucket_ratios=[])), 0),
    # numbers from which sizes are made
    "a side of 16384": (edit(lambda m: m["limits"].update(max_side=16384)), 0),
    "a side of 16385": (edit(lambda m: m["limits"].update(max_side=16385)), 6),
    "1025 images": (edit(lambda m: m["limits"].update(max_images=1025)), 6),
    "a default side of 2^40": (edit(lambda m: m["defaults"].update(height=2**40)), 6),
    "2^62 pixels a latent": (edit(lambda m: m.update(vae_scale=2**62)), 6),
    "2^62 text tokens": (edit(lambda m: m.update(t5_length=2**62)), 6),
    "2^62 tokens of a prompt": (edit(lambda m: m["tokenizers"][0].update(length=2**62)), 6),
    "2^62 layers": (config(num_layers=2**62), 6),
    "65537 channels": (config(in_channels=65537), 6),
    "1024 heads of 1024": (config(num_attention_heads=1024, attention_head_dim=1024), 6),
    "no layers": (config(num_layers=0), 6),
    "layers as text": (config(num_layers="2"), 6),
    "layers that are true": (config(num_layers=True), 6),
    "layers with a fraction": (config(num_layers=2.0), 6),
    "a text width that is null": (config(joint_attention_dim=None), 6),
    "dual attention that is null": (config(dual_attention_layers=None), 0),
    "dual attention as text": (config(dual_attention_layers="01"), 6),
    "dual attention that is false": (config(dual_attention_layers=False), 6),
    "dual attention in fractions": (config(dual_attention_layers=[0.5]), 6),
    "a config that is an array": (edit(lambda m: m["models"]["large"].update(config=[])), 6),
    # paths
    **{f"path {name!r}": (listed(name), 6) for name in (
        "", ".", "..", "/", "/etc/passwd", "//etc/passwd", "../other", "graphs/../../x", "graphs/../scheduler.json",
        "./scheduler.json", "graphs//glue", "scheduler.json/", "scheduler.json/.", "a\\b", "..\\a", "a\0b", "scheduler.json\0",
    )},
    "a path of 5000 letters": (listed("a" * 5000), 6),
    "a path through a file": (listed("scheduler.json/inner"), 6),
    "listed but missing": (listed("nowhere"), 6),
    "listed but a folder": (listed("graphs"), 6),
    "unlisted scheduler": (edit(lambda m: m["files"].pop(SCHEDULER)), 6),
    "unlisted tokenizer": (edit(lambda m: m["files"].pop(TOKENIZER)), 6),
    "unlisted graph": (edit(lambda m: m["files"].pop("graphs/large/model.onnx")), 6),
    "unlisted weights": (edit(lambda m: m["graphs"]["large"]["weights"].append("graphs/large/more.safetensors")), 6),
    "unlisted engine": (edit(lambda m: m["engines"]["large"].update(path="engines/large.engine")), 6),
    "a file outside, by a link": (link_out(SCHEDULER), 6),
    "a folder outside, by a link": (link_out("tokenizers"), 6),
    "a link within the bundle": (link_in(TOKENIZER), 0),
    "a link in a circle": (circle(SCHEDULER), 6),
    # files
    "one byte of weights": (flip("graphs/small/diffusion_pytorch_model.safetensors"), 6),
    "one byte of a tokenizer": (flip(TOKENIZER), 6),
    "one byte of the scheduler": (flip(SCHEDULER), 6),
    "one byte of glue": (flip("graphs/glue/score.onnx"), 6),
    "an empty file": (put("graphs/glue/score.onnx", b""), 6),
    "a file that is gone": (lambda bundle: (bundle / "graphs/glue/score.onnx").unlink(), 6),
    "a folder in place of a file": (folder("graphs/glue/score.onnx"), 6),
    "a pipe in place of a file": (pipe("graphs/glue/score.onnx"), 6),
    "a pipe in place of the scheduler": (pipe(SCHEDULER), 6),
    "a pipe in place of the manifest": (pipe(MANIFEST), 6),
    "a folder in place of the manifest": (folder(MANIFEST), 6),
    "another scheduler with the old hash": (put(SCHEDULER, b'{"_class_name": "EulerDiscreteScheduler"}'), 6),
    # the scheduler
    "another scheduler": (scheduler(_class_name="EulerDiscreteScheduler"), 3),
    "a scheduler without a class": (replace(SCHEDULER, b"{}"), 3),
    "stochastic sampling": (scheduler(stochastic_sampling=True), 3),
    "stochastic sampling, as text": (scheduler(stochastic_sampling="false"), 3),
    "karras sigmas of 0": (scheduler(use_karras_sigmas=0), 0),
    "a terminal shift": (scheduler(shift_terminal=0.1), 3),
    "a scheduler that is no JSON": (replace(SCHEDULER, b"{"), 6),
    "an empty scheduler": (replace(SCHEDULER, b""), 6),
    "a scheduler that is an array": (replace(SCHEDULER, b"[]"), 6),
    "a scheduler that is null": (replace(SCHEDULER, b"null"), 6),
    "a scheduler in UTF-16": (replace(SCHEDULER, "{}".encode("utf-16")), 6),
    "a scheduler with NaN": (scheduler(shift=float("nan")), 6),
    "a scheduler with a key twice": (replace(SCHEDULER, b'{"_class_name": "Euler", "_class_name": "Euler"}'), 6),
    "a scheduler of defaults": (replace(SCHEDULER, b'{"_class_name": "FlowMatchEulerDiscreteScheduler"}'), 0),
    "no shift at all": (scheduler(shift=0), 6),
    "a shift of 100": (scheduler(shift=100), 0),
    "a shift above 100": (scheduler(shift=100.5), 6),
    "a shift as text": (scheduler(shift="3.0"), 6),
    "a shift that is true": (scheduler(shift=True), 6),
    "a shift that is null": (scheduler(shift=None), 6),
    "training steps with a fraction": (scheduler(num_train_timesteps=1000.0), 6),
    "training steps as text": (scheduler(num_train_timesteps="1000"), 6),
    "no training steps": (scheduler(num_train_timesteps=0), 6),
    # tokenizers
    "a tokenizer that is no JSON": (replace(TOKENIZER, b'{"model": '), 6),
    "an empty tokenizer": (replace(TOKENIZER, b""), 6),
    "a tokenizer that is an array": (replace(TOKENIZER, b"[]"), 6),
    "a tokenizer without a model": (change(TOKENIZER, lambda t: t.pop("model")), 6),
    "a tokenizer without a vocabulary": (change(TOKENIZER, lambda t: t["model"].pop("vocab")), 6),
    "a merge of unknown tokens": (change(TOKENIZER, lambda t: t["model"]["merges"].append(["~none~", "~such~"])), 6),
    "a token without an id": (change(TOKENIZER, lambda t: t["model"]["vocab"].update(a="x")), 6),
    "an added token without content": (change(TOKENIZER, lambda t: t["added_tokens"][0].pop("content")), 6),
    "no room for a text": (edit(lambda m: m["tokenizers"][0].update(length=1)), 6),
    "a T5 tokenizer without its unknown token": (change(T5, lambda t: t["model"].update(unk_id=10**6)), 6),
    "a T5 tokenizer with a score as text": (change(T5, lambda t: t["model"]["vocab"].__setitem__(5, ["x", "y"])), 6),
}  # fmt: skip

# -- every field, missing or of another type ---------------------------------------------------------------------------
TEXT = (5, True, None, ["a"], {"a": "b"}, 0.5)
WHOLE = ("5", True, False, None, [5], {"a": 5}, 0.5, 5.0, -(2**63))
ANY_WHOLE = ("5", True, None, [5], {"a": 5}, 0.5, 5.0)
NUMBER = ("0.5", True, None, [0.5], {"a": 0.5})
FLAG = (0, 1, "true", None, [True])
ARRAY = ("ab", 5, True, None, {"a": 1}, 0.5)
OBJECT = ("ab", 5, True, None, [], [["a", 1]], 0.5)


def _fields() -> Iterator[tuple[tuple[Any, ...], bool, tuple[Any, ...]]]:
    """Every field of the manifest of `full`: where it is, whether it must be there, and what it cannot be."""

    def of(place: tuple[Any, ...], kind: tuple[Any, ...], names: str, optional: str = "") -> Iterator[Any]:
        for name in names.split():
            yield (*place, name), True, kind
        for name in optional.split():
            yield (*place, name), False, kind

    nullable = lambda kind: tuple(value for value in kind if value is not None)
    yield from of((), TEXT, "name created_by created state recipe scheduler fingerprint")
    yield from of((), WHOLE, "schema_version vae_scale t5_length")
    yield from of((), ARRAY, "tokenizers bucket_ratios", "costs calibrations")
    yield from of((), OBJECT, "target models graphs defaults limits files parts", "engines")
    yield from of(("target",), TEXT, "name backend backend_version precision os arch")
    yield from of(("target",), ARRAY, "", "sms")
    yield ("target", "sms", 0), False, ANY_WHOLE
    yield from of(("models", "large"), TEXT, "source component")
    yield from of(("models", "large"), nullable(TEXT), "revision")
    yield from of(("models", "large"), OBJECT, "config")
    yield from of(
        ("models", "large", "config"),
        WHOLE,
        "num_layers num_attention_heads attention_head_dim joint_attention_dim pooled_projection_dim in_channels patch_size "
        "pos_embed_max_size",
    )
    yield from of(("tokenizers", 0), TEXT, "path")
    yield from of(("tokenizers", 0), WHOLE, "length pad_id")
    yield from of(("graphs", "large"), TEXT, "path")
    yield from of(("graphs", "large"), ARRAY, "inputs outputs", "weights")
    yield from of(("graphs", "large"), nullable(NUMBER), "", "worst_error")
    yield ("graphs", "large", "weights", 0), False, TEXT
    yield from of(("graphs", "large", "inputs", 0), TEXT, "name dtype")
    yield from of(("graphs", "large", "inputs", 0), ARRAY, "shape")
    yield ("graphs", "large", "inputs", 0, "shape", 0), False, (True, None, 0.5, [], {})
    yield from of(("engines", "large"), TEXT, "path read_back")
    yield from of(("engines", "large"), ARRAY, "profiles")
    yield from of(("engines", "large"), NUMBER, "seconds")
    yield from of(("engines", "large"), nullable(ANY_WHOLE), "", "activation_bytes")
    yield from of(("engines", "large", "profiles", 0), OBJECT, "axes")
    yield ("engines", "large", "profiles", 0, "axes", "B"), False, ARRAY
    yield ("engines", "large", "profiles", 0, "axes", "B", 0), False, ANY_WHOLE
    yield from of(("defaults",), WHOLE, "num_inference_steps height width")
    yield from of(("defaults",), NUMBER, "guidance_scale")
    yield from of(("limits",), WHOLE, "max_side max_images")
    yield ("bucket_ratios", 0), False, NUMBER
    yield from of(("files", SCHEDULER), TEXT, "sha256")
    yield from of(("files", SCHEDULER), WHOLE, "bytes")
    yield from of(("parts", "scheduler"), TEXT, "inputs")
    yield from of(("parts", "scheduler"), ARRAY, "", "files")
    yield ("parts", "scheduler", "files", 0), False, TEXT
    yield from of(("costs", 0), TEXT, "machine backend_version date")
    yield from of(("costs", 0), WHOLE, "threads images height width")
    yield from of(("costs", 0), FLAG, "guided")
    yield from of(("costs", 0), (*NUMBER, 0, -1), "small_seconds text_seconds vae_seconds step_seconds")
    yield from of(("costs", 0), OBJECT, "large_seconds")
    yield ("costs", 0, "large_seconds", "8"), False, (*NUMBER, 0, -1)
    yield from of(("calibrations", 0), WHOLE, "height width prompts baseline_steps converged_steps")
    yield from of(("calibrations", 0), (*NUMBER, -1), "guidance_scale")
    yield from of(("calibrations", 0), TEXT, "prompts_hash date", "further_hash")
    yield from of(("calibrations", 0), ANY_WHOLE, "", "further_prompts")
    yield from of(("calibrations", 0), ARRAY, "schedules")
    place = ("calibrations", 0, "schedules", 0)
    yield from of(place, ARRAY, "stages")
    yield (*place, "stages", 0), False, ANY_WHOLE
    yield from of(place, (*TEXT, "heun"), "solver")
    yield from of(place, (*nullable(NUMBER), 0, -1), "shift")
    yield from of(place, (*NUMBER, -0.1, 1), "ratio")
    yield from of(place, (*NUMBER, -0.1, 1.1), "correction")
    yield from of(place, WHOLE, "refresh")
    yield from of(place, FLAG, "ras")
    yield from of(place, nullable(OBJECT), "", "confirmed")
    for distances in (place, (*place, "confirmed")):
        yield from of(distances, (*NUMBER, -0.1, 0), "latents features")


FIELDS = {".".join(map(str, place)): (place, required, wrong) for place, required, wrong in _fields()}
"""Where a field of the manifest is, whether it must be there, and values that it cannot have."""

_MISSING = object()


def with_field(place: tuple[Any, ...], value: Any = _MISSING) -> Damage:
    """The manifest with another value of one field, or without it."""

    def changed(table: Any) -> None:
        for key in place[:-1]:
            table = table[key]
        if value is _MISSING:
            del table[place[-1]]
        else:
            table[place[-1]] = value

    return edit(changed)
