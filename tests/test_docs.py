"""The documentation is run: every Python block is a program, every command exists, every link leads somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "bench/README.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(language: str) -> list[tuple[str, str]]:
    """(page and number, text) of all blocks in one language."""
    return [
        (f"{page.name}-{n}", text)
        for page in PAGES
        for n, (kind, text) in enumerate(BLOCK.findall(page.read_text()), 1)
        if kind == language
    ]


@pytest.mark.parametrize("program", [pytest.param(text, id=name) for name, text in blocks("python")])
def test_every_python_block_runs(program: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "-W", "error", "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = re.findall(r"# ?> (.*)$", program, re.MULTILINE)
    assert [line for line in expected if line not in done.stdout] == []


WITH_SUBCOMMANDS = ("dead", "demo", "groups", "processes", "projections", "schema", "snapshots", "streams")


def test_every_command_in_a_shell_block_exists() -> None:
    lines = [line for _, text in blocks("console") for line in text.splitlines() if line.startswith("$ trilogue ")]
    assert lines
    for words in {tuple(line.split()[2:4]) for line in lines}:
        command = [word for word in words if re.fullmatch(r"[a-z]+", word)]
        names = command if command[0] in WITH_SUBCOMMANDS else command[:1]
        done = subprocess.run([sys.executable, "-m", "trilogue", *names, "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (names, done.stderr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if not target.startswith(("http:", "https:", "mailto:"))]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_architecture_page_stays_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 200


def test_the_wheel_holds_what_it_needs(tmp_path: Path) -> None:
    import zipfile

    uv = next((tool for tool in (ROOT / ".tools/bin/uv", Path("uv")) if tool.exists()), Path("uv"))
    subprocess.run([str(uv), "build", "--wheel", "--quiet", "--out-dir", str(tmp_path), str(ROOT)], check=True, timeout=120)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {"trilogue/py.typed", "trilogue/stores/schema/1.sql", "trilogue/apps/video/user.py"} <= set(names)
    assert [name for name in names if name.startswith("tests/") or name.endswith((".pth", ".db"))] == []
