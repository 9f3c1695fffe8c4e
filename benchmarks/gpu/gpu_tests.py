"""Part (a): the tests that need a GPU, each of them a row.

pytest runs in a process of its own with this module as a plug-in, which writes the outcome of each test into the ledger
at once. Warnings are no errors here: another version of torch warns of other things.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.ledger import DONE, FAILED, NOT_RUN, Ledger, MeasurementError, NotRunError, Part, first_line
from benchmarks.gpu.plan import REPOSITORY, Plan

LETTER, TITLE = "a", "Tests marked gpu"
_LEDGER = "GPU_REPORT_LEDGER"
_REVISION = "GPU_REPORT_REVISION"


def measure_part(part: Part, plan: Plan) -> None:
    """Run the tests that have not passed yet; one row per test, and one for all of them together."""
    part.attempt("all of them", lambda: _run(part, plan))


def _run(part: Part, plan: Plan) -> dict[str, Any]:
    """Run pytest.

    Returns:
        how many passed.

    Raises:
        NotRunError: pytest is missing, or every test was skipped.
        MeasurementError: a test failed, or pytest did.
    """
    if importlib.util.find_spec("pytest") is None:
        raise NotRunError("pytest is not installed: pip install pytest")
    passed_before = [row["name"] for row in part.ledger.rows() if row["part"] == LETTER and row["status"] == DONE]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu.gpu_tests", *(f"--deselect={name}" for name in passed_before), *marked_files()]
    ours = {_LEDGER: str(part.ledger.path.absolute()), _REVISION: part.revision, "PYTHONPATH": str(REPOSITORY)}
    with open(plan.output / "pytest.log", "w") as log:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=os.environ | ours,
            stdout=log,
            stderr=log,
            timeout=3 * part.limit_s,
            check=False,
        )
    rows = [row for row in part.ledger.rows() if row["part"] == LETTER and "::" in row["name"]]
    failed, passed = ([row for row in rows if row["status"] == status] for status in (FAILED, DONE))
    if failed:
        raise MeasurementError(f"{len(failed)} of {len(rows)} failed, the first: {failed[0]['name']}; see pytest.log")
    if not rows:
        raise MeasurementError(f"pytest ended with status {done.returncode} and ran nothing; see pytest.log")
    if not passed:
        raise NotRunError(f"all {len(rows)} were skipped: {rows[0]['reason']}")
    return {"passed": len(passed), "skipped": len(rows) - len(passed)}


def marked_files() -> list[str]:
    """Return the test files that hold a test marked gpu: others may import packages that are not there."""
    files = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    return [str(path.relative_to(REPOSITORY)) for path in files if "@pytest.mark.gpu" in path.read_text()]


def pytest_runtest_logreport(report: Any) -> None:
    """Write the outcome of one test (pytest calls this, for its set-up, itself and what follows)."""
    if _LEDGER not in os.environ or (report.outcome == "passed" and report.when != "call"):
        return
    status = {"passed": DONE, "failed": FAILED, "skipped": NOT_RUN}[report.outcome]
    reason = {} if status == DONE else {"reason": _reason(report)}
    values = {"revision": os.environ[_REVISION], "seconds": report.duration, **reason}
    Ledger(Path(os.environ[_LEDGER])).keep(LETTER, report.nodeid, status, values)


def _reason(report: Any) -> str:
    """What pytest says of a test that was skipped, or the message of one that failed."""
    if report.outcome == "skipped":
        return first_line(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return first_line(crash.message if crash is not None else report.longrepr)
