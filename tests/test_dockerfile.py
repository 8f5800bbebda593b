"""The Dockerfile: its targets, what a linter says of it, and the image that the manifest names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"
MANIFEST = ROOT / "cluster" / "manifests" / "rayservice.yaml"


def stages() -> dict[str, list[str]]:
    """The instructions of each stage, by its name."""
    joined = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in joined.splitlines():
        begin = re.fullmatch(r"FROM \S+ AS (\w+)", line)
        if begin is not None:
            found[begin[1]] = []
        elif found and line and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


def test_the_linter_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint has no package for this processor")
    done = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_installs_pinned_versions_and_runs_without_root(target: str) -> None:
    own = stages()[target]
    assert own[-2:] == ["USER 1000", "WORKDIR /home/twotower"]
    installs = [part for line in own for part in line.split("&&") if "pip install" in part]
    assert installs
    assert all("-c /opt/twotower/constraints.txt" in part for part in installs)


def test_the_base_image_is_a_version() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["python:${PYTHON}", "base", "base"]


def test_the_manifest_names_the_image_that_is_built() -> None:
    (image,) = re.findall(r"image: &image (\S+)", MANIFEST.read_text(encoding="utf-8"))
    assert f"docker build --target cuda -t {image} ." in DOCKERFILE.read_text(encoding="utf-8")


def test_the_context_has_the_whole_package() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    folders = {path.name for path in (ROOT / "twotower").iterdir() if path.is_symlink()}
    needed = {"twotower", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", *folders}
    assert not needed & {line.strip("/") for line in ignored}
