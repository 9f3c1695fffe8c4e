"""What the commands write: the names of the files, and the nested keys and types of what is in them.

Not here: args.yaml's values (test_commands.py), and what outliers.jsonl counts and TensorBoard holds
(tests/train/test_records.py).
"""

import csv
import json

import torch
import yaml

from tests.photograph.runs import take, trained
from tests.photograph.shape import shape

DIAGNOSES = ["--sites", "all", "--stethoscope", "--colinearity", "--fp8-readiness"]


def header(path):
    with open(path, newline="") as file:
        return next(csv.reader(file))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_folder(run, golden):
    found = {"": sorted(path.name for path in run.iterdir()), "summary.csv": header(run / "summary.csv")}
    found |= {f"{name}.jsonl": shape(rows(run / f"{name}.jsonl")) for name in ("outliers", "fp8_health")}
    golden.json("files/run.json", found)


def test_args_yaml_holds_what_print_config_prints(run):
    written = yaml.safe_load((run / "args.yaml").read_text())
    assert written.keys() == yaml.safe_load(take("train.py", ["--print-config"]).out).keys()


def test_checkpoint(run, golden):
    content = torch.load(run / "last.pth.tar", weights_only=False)
    own = vars(content["args"]).keys() ^ yaml.safe_load((run / "args.yaml").read_text()).keys()
    found = shape(content) | {"args": f"{type(content['args']).__name__} of args.yaml and {', '.join(sorted(own))}"}
    golden.json("files/checkpoint.json", found)


def validated(run, images, out, *words):
    """Validate runs with a report and a results file; what the command printed."""
    words = ["--checkpoint", *(str(folder / "last.pth.tar") for folder in run), *words, "--data-dir", str(images)]
    words = ["--device", "cpu", "-j", "0", "-b", "4", "--calibration-images", "8", *words]
    ended = take("validate.py", [*words, "--report", str(out / "report"), "--results-file", str(out / "results.csv")])
    assert ended.status == 0, ended.err
    return ended.out


def of_report(folder):
    """Names and keys of a report's files. (The git revision is there only in a checkout.)"""
    report = json.loads((folder / "report.json").read_text())
    report["versions"].pop("git", None)
    names = sorted(path.name for path in folder.iterdir())
    return {"": names, "report.csv": header(folder / "report.csv"), "report.json": shape(report)}


def test_report_of_two_runs(run, images, tmp_path, golden):
    other = trained("vit", images, tmp_path)
    words = ["--quantize", "w8a8-tt", "w4a4-ck+res", "--metrics-avg", "macro", *DIAGNOSES]
    out = validated([run, other], images, tmp_path, *words)
    golden.json("files/report.json", of_report(tmp_path / "report"))
    printed = shape(json.loads(out.split("--result\n")[1]))
    golden.json("files/results.json", {"printed": printed, "results.csv": header(tmp_path / "results.csv")})


def test_exported_files(run, images, tmp_path, golden):
    validated([run], images, tmp_path, "--quantize", "w8a8-tt", "--export", "onnx", "-b", "1")  # latency at one batch
    (record,) = of_report(tmp_path / "report")["report.json"]["checkpoints"]
    exports = {"float": record["exported"], "w8a8-tt": record["quantized"][0]["exported"]}
    for file in (file for export in exports.values() for file in export["files"]):
        for kinds in ("float_other", "float_products"):  # onnxruntime's choice, by release and processor
            file["nodes"][kinds] = type(file["nodes"][kinds]).__name__
        file["fused"] = type(file["fused"]).__name__
    (sidecar,) = (tmp_path / "report").glob("*.scales.json")
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    golden.json("files/export.json", {"": names, "scales.json": shape(json.loads(sidecar.read_text()))} | exports)
