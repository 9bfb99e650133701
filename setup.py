"""What pyproject.toml has no words for: files that an installed package needs, and README's links."""

import configparser
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ELSEWHERE = {
    "smfnet.published": "data/published",
    "smfnet.apps": "nbs/apps",
}  # package -> folder of the repository


def readme() -> str:
    """README with absolute links, as a page far from the repository needs them."""
    settings = configparser.ConfigParser(interpolation=configparser.BasicInterpolation())
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    url, branch = (settings["DEFAULT"][key] for key in ("git_url", "branch"))
    raw = url.replace("https://github.com/", "https://raw.githubusercontent.com/")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)", rf"\g<1>{raw}/{branch}/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?![a-z]+:|#|!)", rf"\g<1>{url}/blob/{branch}/", text)


setup(
    packages=[*find_packages(include=["smfnet", "smfnet.*"]), *ELSEWHERE],
    package_dir=ELSEWHERE,
    package_data={
        "smfnet": ["*.json", "weights/*.safetensors", "weights/*.md"],
        "smfnet.published": ["*.csv", "README.md"],
        "smfnet.apps": ["*.ipynb", "voila.json", "template/*"],
    },
    long_description=readme(),
    long_description_content_type="text/markdown",
)
