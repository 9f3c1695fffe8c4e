"""What the penalty's weight, tau and power do: one factor at a time around the paper's 0.01, 3 and 4; and a peer.

    python benchmarks/sensitivity.py                     # all of it: `make sensitivity`
    python benchmarks/sensitivity.py --new 1             # one more training; any number of such calls add up
    python benchmarks/sensitivity.py --rows FILE --new 0 # table and picture of the rows that are in a file

The quickstart's ViT and a small Swin, at a healthy and at the stress rate, three seeds, float32 on one thread. A run is
one training by train.py and one validation by validate.py; a row is kept as soon as it is measured, under a fingerprint
of its settings, its images, the versions and the processor, and what has a row is not run again. A training that breaks
is a row too: it would break again. The most useful runs come first, so that an unfinished table says something.

The peer is clipped softmax (--clipped-softmax), without the penalty. Its alpha is ours: the 2 to 4 of its paper's long
sequences leave a ViT of 17 tokens no attention that is not zero, from the first update on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what is measured is this tree

from tweo_timm import machine
from tweo_timm.evaluate.report import versions
from tweo_timm.outputs import Outputs
from tweo_timm.photos import write_photo_crops
from tweo_timm.records import append_rows, read_rows
from tweo_timm.run.flags import option_table
from tweo_timm.settings import Decides
from tweo_timm.train.options import TrainOptions, parse_train_options

Row = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = {"ViT": "quickstart_stress", "Swin": "quickstart_swin"}
RATES = {"healthy": ("--lr", "5e-3", "--min-lr", "5e-5"), "stress": ()}
SEEDS = (0, 1, 2)
SCHEMES = ("w8a8-tt+res", "w4a4-tt+res")
PAPER = {"weight": 0.01, "tau": 3, "power": 4}
PEER = 0.5
FACTORS = {"weight": (0, 0.001, 0.01, 0.1, 1, 10), "tau": (2, 3, 5), "power": (2, 4, 6)}
COLUMNS = {"Top-1 %": "top1", "training peak": "training_peak_abs", "peak": "peak_abs", **{s: s for s in SCHEMES}}


@dataclass(frozen=True)
class Setting:
    """One row of the table: a model at a rate, with one factor away from the paper's point, or none."""

    model: str
    rate: str
    weight: float = PAPER["weight"]
    tau: float = PAPER["tau"]
    power: float = PAPER["power"]
    clipped: float = 0.0

    def words(self, seed: int) -> list[str]:
        """The training's command line, without what says where."""
        penalty = [f"--tweo-{name}={getattr(self, name):g}" for name in PAPER]
        peer = [f"--clipped-softmax={self.clipped:g}"] if self.clipped else []
        return ["-c", MODELS[self.model], *RATES[self.rate], "--no-amp", "--seed", str(seed), *penalty, *peer]

    def name(self, seed: int) -> str:
        """What a run is called in its row."""
        factors = "_".join(f"{name}{getattr(self, name):g}" for name in PAPER)
        peer = f"_clipped{self.clipped:g}" if self.clipped else ""
        return f"{self.model}_{self.rate}_{factors}{peer}_seed{seed}".lower()


def settings() -> Iterator[Setting]:
    """All settings, each once, the most useful first: ViT before Swin, weight before tau and power, the peer last."""
    seen = set()
    for model in MODELS:
        for factors in (("weight",), ("tau", "power")):
            for rate in RATES:
                for setting in (Setting(model, rate, **{f: v}) for f in factors for v in FACTORS[f]):
                    if setting not in seen:
                        seen.add(setting)
                        yield setting
    for model in MODELS:
        for rate in RATES:
            yield Setting(model, rate, weight=0, clipped=PEER)


def runs() -> Iterator[tuple[Setting, int]]:
    """All runs in the order in which they are made."""
    return ((setting, seed) for setting in settings() for seed in SEEDS)


def fingerprint(setting: Setting, seed: int, photos: str) -> str:
    """What decides a run's numbers: settings other than the defaults, images, versions, processor."""
    options = parse_train_options(setting.words(seed))
    elsewhere = (Decides.RECORDS, Decides.PROCESS)
    table = option_table(TrainOptions)
    decisive = [name for name, option in table.items() if option.flag.recorded and option.decides not in elsewhere]
    values = {name: str(getattr(options, name)) for name in decisive if getattr(options, name) != table[name].default}
    made = {name: version for name, version in versions().items() if name != "git"}
    identity = [values, SCHEMES, photos, made, machine.describe()["processor"]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_of_images(folder: Path) -> str:
    """A digest of the names and bytes of all images of a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.png")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def measure(setting: Setting, seed: int, photos: Path) -> Row:
    """Train and validate once; the values of a row, or why there are none."""
    before = _processor_seconds()
    loading = ["--data-dir", str(photos), "--device", "cpu", "--workers", "1"]
    with tempfile.TemporaryDirectory(prefix="sensitivity-") as folder:
        words = [*setting.words(seed), *loading, "--output", folder, "--experiment", "run"]
        reason = _run("train", words)
        if not reason:
            checkpoint = f"{folder}/run/last.pth.tar"
            words = ["--checkpoint", checkpoint, *loading, "--quantize", *SCHEMES, "--report", f"{folder}/report"]
            reason = _run("evaluate", words)
        if reason:
            return {"broke": reason, "processor_s": round(_processor_seconds() - before, 1)}
        record = json.loads(Path(folder, "report", "report.json").read_text())["checkpoints"][0]
    values = {key: record[key] for key in ("top1", "peak_abs", "training_peak_abs")}
    values |= {entry["scheme"]: entry["top1"] for entry in record["quantized"]}
    return {**values, "processor_s": round(_processor_seconds() - before, 1)}


def _run(command: str, words: Sequence[str]) -> str:
    """Run one of our commands; empty, or the line in which it says what is wrong."""
    line = ["-m", f"tweo_timm.{command}", *words]
    print(f"$ TIMM_FUSED_ATTN=0 OMP_NUM_THREADS=1 {shlex.join(['python', *line])}", flush=True)
    # As in the quickstart: shapes this small gain nothing from fused attention and threads.
    environment = {**os.environ, "TIMM_FUSED_ATTN": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *line], env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # stopped from outside, or a fault of ours: no result
        print(done.stderr, file=sys.stderr)
        raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def of_one_version(rows: Sequence[Row]) -> list[Row]:
    """The newest row of each name, of those made on the processor and with the versions of the last one."""
    made = [{**row["versions"], "git": "", "processor": row["processor"]} for row in rows]
    newest = {row["name"]: row for row, how in zip(rows, made, strict=True) if how == made[-1]}
    return list(newest.values())


def table(rows: Sequence[Row]) -> str:
    """The rows as one Markdown table, mean (min to max) over the seeds, and a sentence on what was not run."""
    lines = [f"| model, rate | weight | tau | power | {' | '.join(COLUMNS)} |", "|---" * (4 + len(COLUMNS)) + "|"]
    for setting in settings():
        mine = _of(rows, setting)
        whole = [row for row in mine if "broke" not in row]
        cells = [_spread([row[key] for row in whole]) for key in COLUMNS.values()] if whole else ["-"] * len(COLUMNS)
        note = "" if len(whole) == len(SEEDS) else f", {_missing(mine)}"
        factors = " | ".join(f"{getattr(setting, name):g}" for name in PAPER)
        if mine:
            peer = f", clipped softmax {setting.clipped:g}" if setting.clipped else ""
            lines.append(f"| {setting.model}, {setting.rate}{peer}{note} | {factors} | {' | '.join(cells)} |")
    planned = len(list(runs()))
    left = planned - sum(len(_of(rows, setting)) for setting in settings())
    return "\n".join(lines) + "\n" + (f"\nNot run: {left} of {planned} runs.\n" if left else "")


def _of(rows: Sequence[Row], setting: Setting) -> list[Row]:
    names = {setting.name(seed) for seed in SEEDS}
    return [row for row in rows if row["name"] in names]


def _missing(rows: Sequence[Row]) -> str:
    broken = sum("broke" in row for row in rows)
    missing = len(SEEDS) - len(rows)
    parts = [f"{broken} of {len(SEEDS)} broke"] * bool(broken) + [f"{missing} of {len(SEEDS)} not run"] * bool(missing)
    return ", ".join(parts)


def _spread(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def draw(rows: Sequence[Row], outputs: Outputs) -> Path:
    """One column of panels per factor, one row of panels per measure, one line per model and rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = {"Top-1 %": "top1", "peak after training": "peak_abs", "Top-1 %, w4a4-tt+res": "w4a4-tt+res"}
    figure, axes = pyplot.subplots(len(measures), len(FACTORS), figsize=(11, 9), sharex="col", sharey="row")
    for (title, key), line in zip(measures.items(), axes, strict=True):
        for factor, panel in zip(FACTORS, line, strict=True):
            for model, colour in zip(MODELS, ("tab:blue", "tab:orange"), strict=True):
                for rate, dashes in zip(RATES, ("-", "--"), strict=True):
                    _curve(panel, rows, (model, rate, factor), key, color=colour, linestyle=dashes)
            panel.set_xticks(range(len(FACTORS[factor])), [f"{value:g}" for value in FACTORS[factor]])
            panel.axvline(FACTORS[factor].index(PAPER[factor]), color="lightgrey", zorder=0)
            panel.set_yscale("log" if key == "peak_abs" else "linear")
        line[0].set_ylabel(title)
    for factor, panel in zip(FACTORS, axes[-1], strict=True):
        panel.set_xlabel(f"{factor} (the paper: {PAPER[factor]:g})")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels))
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    path = outputs.picture("sensitivity.png", lambda file: figure.savefig(file, format="png", dpi=100))
    pyplot.close(figure)
    return path


def _curve(panel: Any, rows: Sequence[Row], line: tuple[str, str, str], key: str, **style: Any) -> None:
    """The means over the seeds, and each seed as a point."""
    model, rate, factor = line
    found = [
        [row[key] for row in _of(rows, Setting(model, rate, **{factor: v})) if key in row] for v in FACTORS[factor]
    ]
    means = [(x, sum(values) / len(values)) for x, values in enumerate(found) if values]
    if means:
        panel.plot(*zip(*means, strict=True), label=f"{model}, {rate}", **style)
        points = [(x, value) for x, values in enumerate(found) for value in values]
        panel.plot(*zip(*points, strict=True), marker=".", linewidth=0, color=style["color"], alpha=0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no row yet, and write table and picture.

    Returns:
        0 if nothing is left to run, 3 if something is.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart/sensitivity"), metavar="DIR")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="the rows (DIR/rows.jsonl)")
    parser.add_argument("--new", type=int, metavar="N", help="run at most N new ones (all)")
    options = parser.parse_args(argv)
    path = options.rows or options.output / "rows.jsonl"
    left = _measure_missing(path, options.output / "photos", options.new) if options.new != 0 else 0
    rows = of_one_version(read_rows(path))
    text = table(rows)
    Outputs(options.output).write("table.md", text)
    picture = draw(rows, Outputs(options.output))
    spent = sum(row["processor_s"] for row in rows)
    print(f"\n{text}\n{len(rows)} runs, {spent / 60:.0f} minutes of processor time. Written: {picture}, table.md")
    return 3 if left else 0


def _measure_missing(path: Path, photos: Path, limit: int | None) -> int:
    """Run what has no row, at most `limit`; how many are left."""
    write_photo_crops(photos)
    images = fingerprint_of_images(photos)
    known = {row["fingerprint"] for row in read_rows(path)}
    missing = [(one, seed, key) for one, seed in runs() if (key := fingerprint(one, seed, images)) not in known]
    for setting, seed, key in missing[:limit]:
        made = {"versions": versions(), "processor": machine.describe()["processor"], "precision": "float32"}
        row = {"name": setting.name(seed), "fingerprint": key, **measure(setting, seed, photos), **made}
        append_rows(path, [row])
        print(json.dumps(row), flush=True)
    return len(missing) - len(missing[:limit])


if __name__ == "__main__":
    raise SystemExit(main())
