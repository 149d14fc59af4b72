"""The page of tables that is made from a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .aims import ALONE, by_calls, loop_name, loops_in, outside, ratio
from .jobs import PARTS
from .roofline import peak_flops, share_of_peak

__all__ = ["markdown"]

_CALL_COLUMNS = (
    "call", "ms (quartiles)", "rounds", "of the full call", "by FLOPs", "TFLOP/s", "of peak", "faster than eager",
    "than compiled",
)  # fmt: skip
_LOOP_COLUMNS = (
    "loop", "refresh", "s (quartiles)", "rounds", "over large only", "by its calls", "outside the transformers, %",
)  # fmt: skip


def markdown(content: Mapping[str, Any]) -> list[str]:
    jobs, device = content["jobs"], content["device"]
    title = "Rehearsal of the GPU acceptance on a CPU" if content["rehearsal"] else f"GPU acceptance: {device}"
    lines = [f"# {title}, {content['date']}", ""]
    if content["rehearsal"]:
        lines += ["Tiny shapes on a CPU: it shows that the script works, and says nothing of a GPU.", ""]
    lines += _machine(jobs.get("device", {}).get("facts", {}))
    lines += ["", "## Aims", ""]
    lines += _table(
        ("aim", "wanted", "measured on", "measured", "verdict"),
        [(a["aim"], a["wanted"], a["on"], _figure(a["measured"]), a["verdict"]) for a in content["aims"]],
    )
    lines += ["", "## Parts", ""]
    lines += _table(
        ("part", "status", "seconds", "why"),
        [(name, j["status"], f"{j['seconds']:.0f} of {j['limit_seconds']:.0f}", j["reason"]) for name, j in jobs.items()],
    )
    absent = [part for part in PARTS if part != "report" and not any(name.partition(".")[0] == part for name in jobs)]
    if absent:
        lines += ["", f"Not run: {', '.join(absent)}."]
    checks = [
        (name, check, c["state"], c["reason"])
        for name, job in jobs.items()
        for check, c in job["checks"].items()
        if c["state"] != "ok"
    ]
    done = sum(c["state"] == "ok" for job in jobs.values() for c in job["checks"].values())
    lines += ["", f"{done} checks are ok."]
    if checks:
        lines += [" The others:", "", *_table(("part", "check", "state", "why"), checks)]
    lines += _engines(jobs) + _graphs(jobs) + _shapes(jobs, device)
    lines += ["", "## Published reference points, 1024 x 1024, guided", ""]
    lines += _table(("system", "figure"), [(p["system"], p["figure"]) for p in content["published"]])
    return lines


def _machine(facts: Mapping[str, Any]) -> list[str]:
    smi, cuda, host, ours = (facts.get(key) or {} for key in ("nvidia_smi", "cuda", "host", "hst_trt"))
    rows = {
        "hst_trt": f"{ours.get('version', '?')}, commit {ours.get('commit', '?')}",
        "GPU": ", ".join(f"{key} {value}" for key, value in smi.items() if key != "name"),
        "CUDA": ", ".join(f"{key} {value}" for key, value in cuda.items()),
        "host": ", ".join(f"{key} {value}" for key, value in host.items()),
        "packages": ", ".join(f"{name} {version}" for name, version in (facts.get("packages") or {}).items() if version),
        "not installed": ", ".join(name for name, version in (facts.get("packages") or {}).items() if not version),
    }
    return [f"- {key}: {value}" for key, value in rows.items() if value]


def _engines(jobs: Mapping[str, Any]) -> list[str]:
    parity, pictures, built = [], [], []
    for name, job in jobs.items():
        for key, value in job["facts"].items():
            if key.startswith("parity "):
                for engine, row in value.items():
                    label = key.removeprefix("parity ")
                    parity.append((name, label, engine, row["shapes"], _figure(row["worst_error"]), _figure(row["allowed"])))
            elif key.startswith(("torch parity ", "exactness ")):
                errors = [error for error in value["errors"].values() if error is not None]
                worst = max(errors) if len(errors) == len(value["errors"]) else None
                parity.append((name, key, "transformers", len(value["errors"]), _figure(worst), _figure(value["allowed"])))
            elif key.startswith("pictures "):
                for schedule, row in value.items():
                    decibel = "equal" if row["psnr_db"] is None else _figure(row["psnr_db"])
                    pictures.append((name, key.removeprefix("pictures "), schedule, decibel, row["largest_difference"]))
            elif key.startswith("build ") and isinstance(value, Mapping) and value["engines"]:
                engines = value["engines"].values()
                seconds, size = sum(e["seconds"] for e in engines), sum(e["bytes"] for e in engines) / 2**20
                built.append((key.removeprefix("build "), value["backend"], len(engines), f"{seconds:.0f}", f"{size:.0f}"))
    lines = []
    if built:
        lines += ["", "## Engines", "", *_table(("bundle", "backend", "engines", "seconds to build", "MiB"), built)]
    if parity:
        lines += ["", "## Parity with float32 on the CPU", ""]
        lines += _table(("part", "of", "engine", "shapes", "worst error", "allowed"), parity)
    if pictures:
        lines += ["", "## Pictures of the demo pair beside the CPU's, same seed", ""]
        lines += _table(("part", "bundle", "schedule", "PSNR, dB", "largest difference of a pixel"), pictures)
    return lines


def _graphs(jobs: Mapping[str, Any]) -> list[str]:
    proofs, loops = [], []
    for name, job in jobs.items():
        series = job["series"].get("loops", {})
        for key, value in job["facts"].items():
            if key.startswith("replay "):
                graphs, waits = value.get("graphs", {}), "not counted" if value["waits"] is None else value["waits"]
                counted = (graphs.get(count, "-") for count in ("recorded", "replayed", "plain"))
                plan, difference = key.removeprefix("replay "), _figure(value["largest_difference"])
                proofs.append((name, plan, value["steps"], difference, waits, *counted))
            elif key.startswith("loop ") and name.startswith("graphs."):
                loop = key.removeprefix("loop ")
                plain, replayed = (series.get(f"{loop}, {how}", []) for how in ("plain", "replayed"))
                shares = outside(series, f"{loop}, replayed", loop + ALONE)
                beside = [share * whole / value["steps"] for share, whole in zip(shares, replayed, strict=False)]
                times = (_spread(plain, 1e3), _spread(replayed, 1e3), _spread(shares, 100), _spread(beside, 1e6))
                loops.append((name, loop, value["steps"], *times))
    lines = []
    if proofs:
        columns = ("part", "plan", "steps", "largest difference", "waits in the loop", "recorded", "replayed", "plain")
        lines += ["", "## Replayed loops beside plain ones", ""]
        lines += ["Waits and graphs are those of the third run; a threshold mask asks once a step how many tokens it has.", ""]
        lines += _table(columns, proofs)
    if loops:
        columns = ("part", "plan", "steps", "plain, ms", "replayed, ms", "outside the transformers, %", "us a step")
        lines += ["", *_table(columns, loops)]
    return lines


def _shapes(jobs: Mapping[str, Any], device: str) -> list[str]:
    lines: list[str] = []
    for name, job in jobs.items():
        if not name.startswith("shapes.") or "pair" not in job["facts"]:
            continue
        facts, series = job["facts"], job["series"]
        pair = facts["pair"]
        lines += ["", f"## True shapes, {name}: {pair['name']}, {pair['tokens']} + {pair['text_tokens']} tokens, guided", ""]
        product = series.get("matrix product", {})
        if product and "matrix product" in facts:
            rate = facts["matrix product"]["flops"] / float(np.median(next(iter(product.values()))))
            lines += [f"A bfloat16 product of {facts['matrix product']['name']} runs at {rate / 1e12:.3g} TFLOP/s here.", ""]
        lines += _table(
            (
                "call",
                "ms (quartiles)",
                "rounds",
                "of the full call",
                "by FLOPs",
                "TFLOP/s",
                "of peak",
                "faster than eager",
                "than compiled",
            ),
            list(_call_rows(series.get("calls", {}), facts.get("flops", {}), pair["tokens"], device)),
        )
        lines += ["", "Eager and compiled are diffusers' own modules on the same weights, timed in the same rounds."]
        if peak_flops(device) is None:
            lines += ["The dense bfloat16 peak of this device is not known to the script."]
        rows = list(_loop_rows(job))
        if rows:
            columns = (
                "loop",
                "refresh",
                "s (quartiles)",
                "rounds",
                "over large only",
                "by its calls",
                "outside the transformers",
            )
            lines += ["", *_table(columns, rows)]
        lines += [f"\n{key}: {', '.join(facts[key])}." for key in facts if key.endswith("for want of time")]
        ends = series.get("ends", {})
        if ends:
            lines += ["", "Beside the loop, torch eager in bfloat16:", ""]
            lines += _table(("", "ms (quartiles)"), [(what, _spread(seconds, 1e3)) for what, seconds in ends.items()])
            lines += ["", *_end_to_end(job, ends)]
    return lines


def _call_rows(
    calls: Mapping[str, Sequence[float]], flops: Mapping[str, int], tokens: int, device: str
) -> Iterator[Sequence[object]]:
    for name, seconds in calls.items():
        if not seconds:
            continue
        subject, _, call = name.rpartition(": ")
        theirs = subject.startswith("diffusers")
        kind = {"large": f"large {tokens}", f"large {tokens}": "large"}.get(call, call)
        ours, role = (kind, call) if theirs else (call, kind)  # what the call is named by us, and by diffusers' roles
        full = f"{subject}: large" if theirs else f"{subject}: large {tokens}"
        shares = [1 / times for times in ratio(calls, name, full)]
        work, median = flops.get(ours), float(np.median(seconds))
        by_flops = work / flops[f"large {tokens}"] if work else None
        rate = f"{work / median / 1e12:.3g}" if work else "-"
        peak = share_of_peak(work, median, device) if work else None
        faster = [_spread(ratio(calls, name, f"diffusers {how}: {role}"), 1) for how in ("eager", "compiled")]
        yield name, _spread(seconds, 1e3), len(seconds), _spread(shares, 1), _figure(by_flops), rate, _percent(peak), *faster


def _loop_rows(job: Mapping[str, Any]) -> Iterator[Sequence[object]]:
    calls = job["series"].get("calls", {})
    for loop in loops_in(job):
        series, prefix = job["series"].get(f"loops {loop['steps']}", {}), f"{loop['subject']}: "
        seconds = series[loop_name(loop)]
        speedup = ratio(series, loop_name(loop), f"{prefix}large {loop['steps']}")
        shares = outside(series, loop_name(loop), loop_name(loop) + ALONE)
        predicted = by_calls(loop, calls, job["facts"]["pair"]["tokens"])
        yield (
            loop_name(loop),
            loop["refresh"] or "-",
            _spread(seconds, 1),
            len(seconds),
            _spread(speedup, 1),
            _figure(predicted),
            _spread(shares, 100),
        )


def _end_to_end(job: Mapping[str, Any], ends: Mapping[str, Sequence[float]]) -> list[str]:
    """The speed-up of whole requests: loops with what they have before and after them."""
    beside = sum(float(np.median(seconds)) for seconds in ends.values())
    rows = []
    for loop in loops_in(job):
        if loop["refresh"]:
            series = job["series"][f"loops {loop['steps']}"]
            large = series.get(f"{loop['subject']}: large {loop['steps']}", [])
            whole = [(b + beside) / (a + beside) for a, b in zip(series[loop_name(loop)], large, strict=False)]
            rows.append((loop_name(loop), _spread(whole, 1)))
    return _table(("with text encoders and VAE", "over large only"), rows) if rows else []


# -- figures -------------------------------------------------------------------------------------------------------------
def _spread(values: Sequence[float], scale: float) -> str:
    """Median and quartiles."""
    if not values:
        return "-"
    low, middle, high = (_figure(float(value) * scale) for value in np.percentile(values, (25, 50, 75)))
    return f"{middle} ({low} to {high})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [[_cell(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*columns], ["---"] * len(columns), *cells)]


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "/").replace("`", "'").split())
