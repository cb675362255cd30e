"""The documentation: figures match the result files, links resolve, commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_figures_are_those_of_the_result_files() -> None:
    script = [sys.executable, str(ROOT / "docs" / "figures.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readings_and_exit_codes_are_real() -> None:
    from ssd_edge import errors
    from ssd_edge.learners import settings_class

    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    table = method[method.index("| question |") : method.index("Predictions are taken")]
    rows = [row for row in table.splitlines()[2:] if row.startswith("|")]
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row.rsplit("|", 2)[1])}
    assert len(keys) >= 15
    assert keys <= set(settings_class("ssd").__dataclass_fields__)
    cli = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")]
    assert len(kinds) >= 6
    assert all(f"| {kind.exit_code} |" in cli for kind in kinds)


def test_the_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("make train", "make test"):
        assert command in text
        assert f"\n{command.split()[1]}:" in makefile


def test_the_command_line_page_has_every_verb_with_its_options() -> None:
    import click

    from ssd_edge.cli import cli

    def leaves(group: click.Group, path: str = "") -> dict[str, click.Command]:
        found: dict[str, click.Command] = {}
        for name, command in group.commands.items():
            if isinstance(command, click.Group):
                found |= leaves(command, f"{path}{name} ")
            elif not command.hidden:
                found[path + name] = command
        return found

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `([^`]+)`\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL))
    verbs = leaves(cli)
    assert set(sections) == set(verbs)
    for verb, command in verbs.items():
        assert f"`ssd-edge {verb}" in sections[verb]
        for option in (param for param in command.params if isinstance(param, click.Option)):
            if option.name not in ("root", "as_json", "push_command", "allow_downgrade"):
                assert option.opts[-1] in sections[verb], f"docs/cli.md, {verb}: {option.opts[-1]} is missing"
