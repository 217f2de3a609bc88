"""The repository itself: its layout, what no file may say, and the set-up of an environment that may not be had."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"models", "converters", "deploy", "hw_tests", "tests", "bench", "docs", ".ci"}
FILES = {"pyproject.toml", "README.md", "Makefile", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "constraints.txt"}
DOTFILES = {".gitignore", ".gitattributes", ".pre-commit-config.yaml"}

# A folder of one machine, or a package index of one's own.
OF_ONE_MACHINE = re.compile(
    r"(?<![\w.~<}])/(?:home|root|work|Users|mnt|opt)/\w|(?:extra-)?index-url[ =]|find-links[ =]"
)


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files that git tracks and that are there."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_the_top_level_is_the_agreed_one(tracked: list[Path]) -> None:
    tops = {path.relative_to(ROOT).parts[0] for path in tracked}
    assert tops - FOLDERS - FILES - DOTFILES == set()


def test_no_file_names_a_machine_or_an_index(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and archives
        lines = enumerate(text.splitlines(), 1)
        found += [f"{path.relative_to(ROOT)}:{number}" for number, line in lines if OF_ONE_MACHINE.search(line)]
    assert found == []


def test_nothing_generated_is_tracked(tracked: list[Path]) -> None:
    generated = {".pyc", ".npz", ".whl", ".pt", ".nir"}
    assert [path for path in tracked if path.suffix in generated and "tests" not in path.parts] == []


@pytest.mark.parametrize("script", ["run", "setup.sh", "setup-lava.sh", "setup-peers.sh", "setup-neurobench.sh"])
def test_scripts_are_executable(script: str) -> None:
    assert os.access(ROOT / ".ci" / script, os.X_OK)


def test_set_up_installs_the_lava_that_the_backend_accepts() -> None:
    stated = re.search(
        r'^LAVA_VERSION = "(.+)"$', (ROOT / "converters" / "bundle.py").read_text(encoding="utf-8"), re.M
    )
    assert stated is not None
    installed = re.findall(r"lava-nc==([\d.]+)", (ROOT / ".ci" / "setup-lava.sh").read_text(encoding="utf-8"))
    assert installed == [stated[1]]


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """The set-up scripts in a folder of their own, beside a `bin` without Python that is all of PATH."""
    shutil.copytree(ROOT / ".ci", tmp_path / "checkout" / ".ci")
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "dirname", "rm", "cat", "head", "tail"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    return tmp_path / "checkout"


def run_script(checkout: Path, script: str) -> subprocess.CompletedProcess[str]:
    path = str(checkout.parent / "bin")
    return subprocess.run([checkout / ".ci" / script], env={"PATH": path}, capture_output=True, text=True, timeout=60)


def test_set_up_of_lava_without_python_3_10_succeeds_and_leaves_nothing(bare_checkout: Path) -> None:
    done = run_script(bare_checkout, "setup-lava.sh")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"setup-lava: skipped: no Python 3\.10 found .*\n", done.stdout)
    assert os.listdir(bare_checkout) == [".ci"]


def test_set_up_of_lava_that_cannot_install_leaves_nothing(bare_checkout: Path) -> None:
    """A stand-in for Python 3.10 that answers, makes an environment of itself, and has no package index."""
    stand_in = bare_checkout.parent / "bin" / "python3.10"
    stand_in.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*run_configs*) exit 1 ;;\n"
        '*venv\\ .venv-lava) /bin/mkdir -p .venv-lava/bin && /bin/cp "$0" .venv-lava/bin/python ;;\n'
        "*'pip install'*) echo noise; echo no matching distribution >&2; exit 1 ;;\n"
        "esac\n"
    )
    stand_in.chmod(0o755)
    done = run_script(bare_checkout, "setup-lava.sh")
    assert done.returncode == 0
    assert "skipped: pip could not install lava-nc (no matching distribution)" in done.stdout
    assert os.listdir(bare_checkout) == [".ci"]


def test_set_up_on_an_old_python_says_what_is_needed(bare_checkout: Path) -> None:
    old = bare_checkout.parent / "bin" / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.18"\nexit 1\n')
    old.chmod(0o755)
    done = run_script(bare_checkout, "setup.sh")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer; python3 is: Python 3.9.18" in done.stderr
    assert os.listdir(bare_checkout) == [".ci"]
