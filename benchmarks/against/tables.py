"""The results as Markdown tables: exact and approximate programs apart, machine and date above."""

from collections.abc import Mapping
from typing import Any

_HEAD = "| work | program | time | against diffusers | first call adds | error | memory |"


def markdown(stored: Mapping[str, Any]) -> str:
    """Return the tables of all rows; a sentence about the machine stands above each group measured alike."""
    lines: list[str] = []
    for exact, title in ((True, "Same computation"), (False, "Approximations")):
        found = [line for row in stored.values() for line in _lines(row, exact)]
        if found:
            lines += [f"{title}:", "", _HEAD, "|---|---|---|---|---|---|---|", *found, ""]
    return "\n".join([*lines, *_machines(stored)])


def _lines(row: Mapping[str, Any], exact: bool) -> list[str]:
    results = {name: r for name, r in row["results"].items() if r["exact"] == exact}
    clock = _clock(row)
    base = row["results"].get(row["base"], {}).get(clock)
    lines: list[str] = []
    for name, r in results.items():
        work = row["what"] if not lines else ""
        if clock not in r:
            lines.append(f"| {work} | {name} | {r.get('failed', 'not measured')} | | | | |")
            continue
        ratio = f"{base / r[clock]:.2f}×" if base else ""
        rate = row["GFLOP/s"]["fp32" if row["precision"] == "fp32" else "bf16"]
        share = f", {r['gigaflops'] / r[clock] / rate:.0%} of the matrix rate" if r.get("gigaflops") else ""
        error = f"{r['difference']:.2g}" if r.get("difference") is not None else ""
        again = f", again {r['again']:.1f} s" if "again" in r else ""
        memory = f"{r['MiB']:,.0f} MiB"
        lines.append(
            f"| {work} | {name} | {_time(r[clock])} ({_time(r[clock + ' from'])} to {_time(r[clock + ' to'])}){share} "
            f"| {ratio} | {r['compile']:.1f} s{again} | {error} | {memory} |"
        )
    return lines


def _losses(losses: Mapping[str, list[float]]) -> str:
    """Return a sentence on how far the losses of each variant are from those of the first."""
    (first, expected), *others = losses.items()
    far = {name: max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)) for name, found in others}
    apart = ", ".join(f"{name} {value:.1g}" for name, value in far.items())
    return f"  Losses of {len(expected)} steps, largest relative difference to the {first}'s: {apart}"


def _clock(row: Mapping[str, Any]) -> str:
    """Return the clock of a row: CPU seconds for one CPU thread, which other programs disturb less; else wall clock."""
    return "cpu" if row["about"]["threads"] == 1 and "NVIDIA" not in row["about"]["device"] else "wall"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _machines(stored: Mapping[str, Any]) -> list[str]:
    """Return a line for each machine and day: rows, device, threads, rates and versions."""
    lines = []
    for name, row in stored.items():
        about, rates = row["about"], row["GFLOP/s"]
        versions = ", ".join(f"{k} {about['versions'][k]}" for k in ("torch", "diffusers", "transformers"))
        threads = "" if "NVIDIA" in about["device"] else f", {about['threads']} threads"
        lines.append(
            f"- `{name}`: {row['precision']}, {about['device']}{threads}; matrix products {rates['fp32']:,.0f} (fp32) "
            f"and {rates['bf16']:,.0f} (bf16) GFLOP/s; {versions}; {about['date'][:10]}, commit {about['commit']}"
        )
        if "losses" in row:
            lines.append(_losses(row["losses"]))
    return lines
