"""The report for people: one table per part, and what was not run, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu import deployment, exactness, gpu_tests, speed, trainings
from benchmarks.gpu.ledger import DONE, FAILED, NOT_RUN, Row

PARTS = (gpu_tests, speed, trainings, deployment)
_TINY = (
    "**Tiny models: this tests the report, not the hardware. No number here says anything of a GPU, of a model of "
    "usual size, or of TWEO.**"
)
_REPEAT = "The same command measures what is missing, and keeps what is there."


def markdown(rows: Sequence[Row]) -> str:
    """Return the whole report as Markdown.

    Args:
        rows: of the ledger.
    """
    environment = next((row for row in rows if row["part"] == "environment"), {})
    blocks = ["# A GPU's first hour", *([_TINY] if environment.get("tiny") else []), _machine(environment, rows)]
    for part in PARTS:
        own = [row for row in rows if row["part"] == part.LETTER]
        blocks.append(f"## ({part.LETTER}) {part.TITLE}")
        blocks += [block for block in _SECTIONS[part.LETTER](own) if block] if own else ["Not run: not asked for yet."]
    for status, title in ((FAILED, "What failed"), (NOT_RUN, "What was not run, and why")):
        blocks += [f"## {title}", _reasons([row for row in rows if row["status"] == status])]
    return "\n\n".join([*blocks, _REPEAT]) + "\n"


def _machine(environment: Row, rows: Sequence[Row]) -> str:
    known = {key: value for key, value in environment.items() if key not in ("part", "name", "status", "tiny")}
    lines = [f"- {key}: {'none' if value is None else value}" for key, value in known.items()]
    revisions = dict.fromkeys(row["revision"] for row in rows if row.get("revision"))
    several = " (several: rows of report.json say which)" if len(revisions) > 1 else ""
    return "\n".join([*lines, f"- revision: {', '.join(revisions) or 'unknown'}{several}"])


def _tests(rows: Sequence[Row]) -> list[str]:
    tests = [row for row in rows if "::" in row["name"]]
    counts = {status: sum(row["status"] == status for row in tests) for status in (DONE, FAILED, NOT_RUN)}
    return [f"{counts[DONE]} passed, {counts[FAILED]} failed, {counts[NOT_RUN]} skipped."]


def _speed(rows: Sequence[Row]) -> list[str]:
    cells = speed.with_ratios(list(rows))
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("model", lambda row: row["model"]),
        ("precision", lambda row: row["precision"]),
        ("TWEO", lambda row: "yes" if row["tweo"] else ""),
        ("step", lambda row: "compiled" if row["compiled"] else "eager"),
        ("batch", lambda row: f"{row['batch_size']}"),
        ("images/s", lambda row: number(row["images_per_s"], "{:.0f}")),
        ("ms per step, median (min to max)", _milliseconds),
        ("time / bfloat16", lambda row: number(row["time_ratio"], "{:.3f}")),
        ("peak MiB", lambda row: number(row["peak_mib"], "{:.0f}")),
        ("memory / bfloat16", lambda row: number(row["memory_ratio"], "{:.3f}")),
    ]
    ordered = sorted(cells, key=lambda row: (row["model"], row["compiled"]))
    profiles = [row for row in rows if row["name"].startswith(speed.PROFILE) and row["status"] == DONE]
    return [table(ordered, columns), *(_profile(row) for row in profiles)]


def _milliseconds(row: Row) -> str:
    return f"{row['median_ms']:.2f} ({row['min_ms']:.2f} to {row['max_ms']:.2f})"


def _profile(row: Row) -> str:
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("kernel", lambda kernel: f"`{kernel['name']}`"),
        ("calls", lambda kernel: f"{kernel['calls']:.1f}"),
        ("ms", lambda kernel: f"{kernel['ms']:.3f}"),
    ]
    head = f"**{row['name']}**: {row['wall_ms']:.2f} ms per step while profiled, {row['busy_ms']:.2f} ms in kernels."
    return f"{head}\n\n{table(row['kernels'], columns)}"


def _trainings(rows: Sequence[Row]) -> list[str]:
    arms = [row for row in rows if row["status"] == DONE and "top1" in row]
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("training", lambda row: row["name"]),
        ("updates", lambda row: f"{row['updates']}"),
        ("seconds, all in all", lambda row: f"{row['seconds']:.0f}"),
        ("loss", lambda row: number(row.get("train_loss"), "{:.3f}")),
        ("Top-1 %", lambda row: number(row["top1"], "{:.2f}")),
        ("training peak", lambda row: number(row["train_peak_abs"], "{:.4g}")),
        ("peak after training", lambda row: number(row.get("eval_peak_abs"), "{:.4g}")),
        ("FP8 SQNR dB, median", lambda row: number(row.get("sqnr_db"), "{:.1f}")),
        ("without peak", lambda row: number(row.get("sqnr_without_peak_db"), "{:.1f}")),
        ("worst", lambda row: number(row.get("worst_sqnr_db"), "{:.1f}")),
    ]
    return [_exactness(rows), table(arms, columns)]


def _exactness(rows: Sequence[Row]) -> str:
    exact = [row for row in rows if row["name"].startswith(exactness.PREFIX)]
    same = [row["name"].removeprefix(f"{exactness.PREFIX}: ") for row in exact if row["status"] == DONE]
    lines = [
        f"Native and emulated FP8 give the same bits in {len(same)} of {len(exact)} comparisons: {'; '.join(same)}."
    ]
    for row in rows:
        if "gradient_error" in row:
            lines.append(
                f"{row['name']}: after {row['steps']} steps losses differ by {row['loss_difference']:.2%}, "
                f"gradients by {row['gradient_error']:.2%} in norm."
            )
    return "\n".join(f"- {line}" for line in lines)


def _deployment(rows: Sequence[Row]) -> list[str]:
    done = [row for row in rows if row["status"] == DONE]
    by_arm: dict[str, dict[str, Row]] = {}
    for row in done:
        by_arm.setdefault(row["arm"], {})[row["variant"]] = row
    columns: list[tuple[str, Callable[[Row], str]]] = [("model", lambda arm: arm["arm"])]
    columns.append(("float32 Top-1 %", lambda arm: number(arm.get("int8", {}).get("top1"), "{:.2f}")))
    columns.append(("float16 Top-1 %", lambda arm: number(arm.get("float16", {}).get("top1"), "{:.2f}")))
    for scheme in deployment.SCHEMES:
        top1, ratio = f"top1 {scheme}", f"sqnr_without_peak_db {scheme}"
        columns.append((f"{scheme} Top-1 %", lambda arm, key=top1: number(arm.get("int8", {}).get(key), "{:.2f}")))
        columns.append((f"{scheme} SQNR dB", lambda arm, key=ratio: number(arm.get("int8", {}).get(key), "{:.1f}")))
    return [table([{"arm": arm, **variants} for arm, variants in by_arm.items()], columns)]


_SECTIONS: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    gpu_tests.LETTER: _tests,
    speed.LETTER: _speed,
    trainings.LETTER: _trainings,
    deployment.LETTER: _deployment,
}


def _reasons(rows: Sequence[Row]) -> str:
    """List rows by their reason, because one reason often stands for many."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(row["reason"], []).append(f"({row['part']}) {row['name']}")
    lines = [f"- **{reason}**: {'; '.join(names)}" for reason, names in by_reason.items()]
    return "\n".join(lines) or "Nothing."


def table(rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]]) -> str:
    """Return a Markdown table; empty without rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(title for title, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row).replace("|", "\\|") for _, cell in columns) + " |" for row in rows]
    return "\n".join(lines)


def number(value: Any, form: str) -> str:
    """Return a number in its format, or a dash where there is none."""
    return "-" if value is None else form.format(value)
