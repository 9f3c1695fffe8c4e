"""How optional packages are installed is said in one way."""

from configparser import ConfigParser
from pathlib import Path

from tweo_timm.extras import EXTRAS, installation

ROOT = Path(__file__).resolve().parents[1]


def test_messages_say_what_the_readme_says_and_no_other_file_says_it_for_itself():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in EXTRAS:
        assert extra in setup["options.extras_require"]
        assert installation(extra) == f"pip install '.[{extra}]' in the clone"
    assert installation("export").removesuffix(" in the clone") in (ROOT / "README.md").read_text()
    homes = [path.name for path in (ROOT / "tweo_timm").rglob("*.py") if "pip install '" in path.read_text()]
    assert homes == ["extras.py"]
