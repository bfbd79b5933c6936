"Package metadata comes from settings.ini; nothing else needs to be edited here."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here/"README.md"

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "", long_description_content_type="text/markdown",
    packages=find_packages(include=["posefree_kit", "posefree_kit.*"]), package_data={"posefree_kit": ["assets/**/*"]},
    python_requires=f">={cfg['min_python']}", install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("scale", "notebooks", "dev")},
    entry_points={"console_scripts": ["posefree=posefree_kit.cli:app"], "nbdev": ["posefree_kit=posefree_kit._modidx:d"]},
    zip_safe=False,
)
