"""Exits with 0 if this Python meets the requirements in pyproject.toml; prints the first that is missing otherwise.

usage: check_environment.py PYPROJECT EMBEDDED_REQUIREMENT [EXTRA]
"""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:
    from pip._vendor.packaging.requirements import Requirement
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def main(pyproject: str, embedded: str, extra: str = "") -> int:
    """Compare the installed packages with the requirements; returns the exit code."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        return 1
    with open(pyproject, "rb") as file:
        project = tomllib.load(file)["project"]
    requirements = [*project["dependencies"], embedded, *(project["optional-dependencies"][extra] if extra else [])]
    for text in requirements:
        requirement = Requirement(text)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = ""
        if not installed or not requirement.specifier.contains(installed, prereleases=True):
            print(f"{text}: found {installed or 'nothing'}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
