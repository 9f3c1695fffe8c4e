"""Every measured number of README and docs stands beside the command that gives it, and says on what it was measured.

A number is measured where a table or a sentence holds decimals, or a unit that only a measurement has. Its section has
the command; processor and precision may stand under the headings above it. A command is held against the flags of its
parser: a file, a target or a flag that is gone is found here. Which number is which command's, a reader has to say.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from benchmarks import fp8_sqnr
from tweo_timm.evaluate import zoo
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.zoo_cli import ZooOptions
from tweo_timm.repair.options import RepairOptions
from tweo_timm.run.flags import option_table
from tweo_timm.train.options import TrainOptions

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
VERSION = re.compile(
    r"\d+(?:\.\d+){2,}|(?:torch|timm|Python|onnxruntime|OpenVINO|torchao|Engine|Pillow|YAML)'?s? \d+\.\d+"
)
UNIT = re.compile(
    r"(?<![\w.+-])\d[\d.,]* ?(?:%|points?\b|ms\b|s of|s an|dB\b|MiB\b|[KMG]B\b|seconds|of (?:the )?\d|"
    r"times (?:as|the|too|slower|faster|task|that))"
)
DECIMAL = re.compile(r"(?<![\w.])[-+]?\d*\.\d+\b")
PROCESSOR = re.compile(r"AMD EPYC|Xeon|AVX|VNNI|\bcores?\b|\bCPUs?\b|\bGPU")
PRECISION = re.compile(r"float32|float64|float16|bfloat16|\bbf16\b|FP8|fp8|INT8|int8|precision")


@dataclass
class Section:
    """A heading and what stands under it, without its subsections."""

    page: str
    title: str
    level: int
    parents: list["Section"]
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def anchor(self) -> str:
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")

    def __str__(self) -> str:
        return f"{self.page}#{self.anchor}"


@cache
def sections(page: str) -> list[Section]:
    """The sections of a page, each with those that it stands in."""
    found = [Section(page, "", 0, [])]
    fenced = False
    for line in (ROOT / page).read_text().splitlines():
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else re.match(r"(#+) (.*)", line)
        if heading:
            level = len(heading[1])
            above = [s for s in (*found[-1].parents, found[-1]) if s.level < level]
            found.append(Section(page, heading[2], level, above))
        else:
            found[-1].lines.append(line)
    return found


def blocks(section: Section) -> list[str]:
    """Paragraphs and tables; no code."""
    text = re.sub(r"(?ms)^```.*?^```", "", section.text)
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    return [block for block in re.split(r"\n\s*\n", "\n".join(lines)) if block.strip()]


def plain(block: str) -> str:
    """A block without code and addresses, in which numbers are names and settings."""
    return re.sub(r"`[^`]*`|\]\([^)]*\)", " ", block)


def is_measured(block: str) -> bool:
    if block.lstrip().startswith("|"):
        return len(DECIMAL.findall(plain(block))) >= 4
    text = VERSION.sub(" ", plain(block))
    return UNIT.search(text) is not None or len(DECIMAL.findall(text)) >= 2


# --- commands --------------------------------------------------------------------------------------------------------

OPTIONS = {
    "train": TrainOptions,
    "validate": ValidateOptions,
    "repair": RepairOptions,
    "survey": ZooOptions,
}
COMMAND = re.compile(
    r"(?:python (?:-m )?)?(?:(?P<ours>tweo-(?:train|validate|repair|quickstart|survey)|(?:train|validate)\.py)"
    r"|(?P<file>(?:benchmarks|examples|recipes)/[\w./]+\.(?:py|sh))|(?P<make>make [a-z][a-z -]*[a-z])"
    r"|(?P<pytest>pytest (?:tests|-)\S*))(?P<words>[^`\n#]*)"
)


@dataclass(frozen=True)
class Command:
    """A command of a page, and what is wrong with it: empty if it can be run as it stands."""

    text: str
    fault: str


def commands(text: str) -> list[Command]:
    """The commands in code: of lines that are indented or fenced, and between backticks."""
    code = re.sub(r"\\\n\s*", " ", text)
    spans = [line for line in code.splitlines() if line.startswith("    ")]
    spans += re.findall(r"(?ms)^```.*?^```", code) + re.findall(r"`([^`]+)`", code.replace("```", ""))
    return [Command(hit[0].strip(), fault(hit)) for span in spans for hit in COMMAND.finditer(span)]


def fault(hit: re.Match[str]) -> str:
    words = hit["words"].split("|")[0]
    flags = [word.split("=")[0].rstrip(",.;)]") for word in words.replace("[", " ").split() if word.startswith("--")]
    if hit["make"]:
        targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
        unknown = sorted(set(hit["make"].split()[1:2]) - targets)
    elif hit["file"] or hit["ours"] == "tweo-quickstart":
        path = ROOT / (hit["file"] or "tweo_timm/quickstart.py")
        if not path.exists():
            return f"{hit['file']} does not exist"
        unknown = [flag for flag in flags if f'"{flag}"' not in path.read_text()]
    elif hit["pytest"]:
        unknown = [word for word in hit["pytest"].split() if word.startswith("tests") and not (ROOT / word).exists()]
    else:
        table = option_table(OPTIONS[re.sub(r"tweo-|\.py", "", hit["ours"])])
        known = {name for option in table.values() for name in (*option.names, *option.negative_names)}
        unknown = [flag for flag in flags if flag not in known]
    return f"unknown: {', '.join(unknown)}" if unknown else ""


# --- claims ----------------------------------------------------------------------------------------------------------

NOT_MEASURED = {
    "docs/design.md#known-limits": "versions",
    "docs/recipes.md#recipes-the-settings-of-a-run-as-a-file": "limits",
    "docs/recipes.md#the-weight-of-the-penalty": "settings, and the measurements of others, with their source",
    "docs/report.md#the-verdict": "a rule, and the arithmetic of an example",
    "docs/security.md#promised": "limits",
}
NEVER_REPEATED = {
    "docs/export.md#how-close-is-the-file-to-the-model",
    "docs/repair.md#the-idea",
    "docs/survey.md#planted-faults",
}
"""Sections that say themselves of some numbers that no command repeats them; no new one without a reason."""

MEASURING = [s for page in PAGES for s in sections(page) if any(map(is_measured, blocks(s)))]


@pytest.mark.parametrize("section", [s for s in MEASURING if str(s) not in NOT_MEASURED], ids=str)
def test_a_section_with_measured_numbers_has_a_command_and_says_on_what_they_were_measured(section):
    said = "\n".join(one.text for one in (*section.parents, section))
    assert commands(section.text) or str(section) in NEVER_REPEATED, (
        "no command: make numbers by one, and print it here"
    )
    assert PROCESSOR.search(said), "say which processor"
    assert PRECISION.search(said), "say which precision"
    assert ("no command repeats" in section.text) == (str(section) in NEVER_REPEATED)


def test_what_is_listed_here_is_there():
    assert {*NOT_MEASURED, *NEVER_REPEATED} <= {str(section) for section in MEASURING}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_names_files_targets_and_flags_that_exist(page):
    assert [c for section in sections(page) for c in commands(section.text) if c.fault] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_page_and_a_heading(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in {s.anchor for s in sections(str(path.resolve().relative_to(ROOT)))}, f"{target}#{anchor}"


def test_a_number_without_a_command_and_a_flag_that_is_gone_are_found(tmp_path, monkeypatch):
    page = (
        "# Title\n\nOn an AMD EPYC, in float32, it takes 12.5 ms.\n\n## Other\n\n    python train.py --no-such-flag 1\n"
    )
    (tmp_path / "page.md").write_text(page)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (_, first, other) = sections.__wrapped__("page.md")
    assert [is_measured(block) for block in blocks(first)] == [True]
    assert commands(first.text) == []
    assert [command.fault for command in commands(other.text)] == ["unknown: --no-such-flag"]


def test_the_table_of_the_zoo_is_that_of_its_rows():
    folder = ROOT / "docs" / "zoo"
    assert zoo.page(zoo._kept(folder / "zoo.json")) == (folder / "README.md").read_text()


@pytest.mark.slow
def test_the_table_of_numerics_is_what_its_benchmark_prints(capsys, monkeypatch):
    """Within 0.2 dB: other processors add in another order."""
    monkeypatch.setattr("sys.argv", ["fp8_sqnr.py"])
    fp8_sqnr.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if " x " in line]
    page = (ROOT / "docs" / "numerics.md").read_text()
    held = [line for line in page.splitlines() if re.match(r"\| \d+ x \d+ -> ", line)]
    assert len(printed) == len(held)
    for mine, theirs in zip(printed, held, strict=True):
        assert mine.split("|")[1:4] == theirs.split("|")[1:4]
        found, kept = ([float(x) for x in DECIMAL.findall(line)] for line in (mine, theirs))
        assert found == pytest.approx(kept, abs=0.2)
