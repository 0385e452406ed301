"""Maps the folders of the repository to packages below ``pos2d``; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# The files of the page: a folder of data, which setuptools wants named as a package.
PAGE = "pos2d.runtime.http.page"
FOLDERS = ("commands", "compat", "exporter", "runtime", "sources")


def below(folder: str) -> list[str]:
    """The packages in a folder, by the names that they are installed under."""
    return [f"pos2d.{folder}", *(f"pos2d.{folder}.{name}" for name in find_packages(folder))]


setup(
    packages=["pos2d", "pos2d.hf", *(package for folder in FOLDERS for package in below(folder)), PAGE],
    package_dir={f"pos2d.{folder}": folder for folder in FOLDERS},
)
