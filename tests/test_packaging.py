"""The wheel: the three folders as `spikeport.*` with their data files, nothing else, and every module imports."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["models", "converters", "deploy"]
DATA = {"models": ["py.typed", "recipes/*.toml"], "converters": ["py.typed"]}
DATA["deploy"] = ["py.typed", "chips/*.toml", "templates/*"]

IMPORT_ALL = """
import importlib, sys
wheel, libraries, *modules = sys.argv[1:]
sys.path[:0] = [wheel, libraries]
for name in modules:
    origin = importlib.import_module(name).__file__
    assert origin.startswith(wheel), f"{name} comes from {origin}"
"""


def run(*command: object, cwd: Path) -> None:
    """Run a command; its output is the failure's message."""
    # pip reads its settings from the environment, and PYTHONPATH would let the source tree in
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    (copy / "tests").mkdir()
    (copy / "tests" / "test_stray.py").touch()
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=copy)
    [built] = out.glob("*.whl")
    return built


def sources(pattern: str, folder: str) -> list[Path]:
    """Files of a folder as paths in the repository, hidden ones left out."""
    found = (path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern) if path.is_file())
    return sorted(path for path in found if not path.name.startswith("."))


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"spikeport/{path.as_posix()}"
        for folder in FOLDERS
        for pattern in ["**/*.py", *DATA[folder]]
        for path in sources(pattern, folder)
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
        assert b"Apache License" in archive.read(metadata)
    assert names == expected


@pytest.mark.parametrize("pattern", ["models/recipes/digits.toml", "deploy/chips/loihi.toml", "deploy/templates/*"])
def test_the_wheel_holds_what_a_run_reads(wheel: Path, pattern: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert any(Path(name).match(f"spikeport/{pattern}") for name in archive.namelist())


def test_every_module_of_the_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
        cwd=tmp_path,
    )
    modules = [
        ".".join(["spikeport", *path.with_suffix("").parts]).removesuffix(".__init__")
        for folder in FOLDERS
        for path in sources("**/*.py", folder)
        if path.stem != "__main__"  # importing it would run it
    ]
    libraries = Path(pytest.__file__).parents[1]
    # -I -S: neither this folder nor the editable install's finder, only the wheel and the libraries
    run(sys.executable, "-I", "-S", "-c", IMPORT_ALL, target, libraries, *modules, cwd=tmp_path)
