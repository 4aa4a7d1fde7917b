"""What the README says of the program is what the program says of itself."""

import re
import sys
from pathlib import Path

import pytest

import create_train_val_test
import model_training_and_visualization as study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("script", [create_train_val_test, study])
def test_the_readme_holds_the_options_that_help_prints(script, monkeypatch, capsys):
    # Usage begins with the program's name, which argparse reads from there alone.
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        script.parse_options()
    marker = f"<!-- options {script.__name__} -->\n```\n"
    assert marker + capsys.readouterr().out.strip() + "\n```" in README


def test_the_functions_that_the_table_of_pictures_names_are_in_the_script():
    table = README[README.index("| picture |") :].partition("\n\n")[0]
    drawn_by = re.findall(r"`(\w+)`", " ".join(line.split("|")[2] for line in table.splitlines()))
    assert len(drawn_by) >= 10 and all(callable(getattr(study, name, None)) for name in drawn_by)


def test_every_picture_of_the_readme_is_there_and_every_committed_picture_is_shown():
    shown = set(re.findall(r"\(Images/([^)]+)\)", README))
    there = {path.name for path in (ROOT / "Images").iterdir()}
    assert shown <= there
    # The page shows all of a run's pictures; its own sheets need no place in the README.
    pattern = re.compile(r"(photos(_\w+)?\.|conv2d_\d+_maps|index|predictions|run|strip)")
    of_page = {name for name in there if pattern.match(name)}
    assert there - of_page <= shown
