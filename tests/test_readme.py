"""What the README says of the program is what the program says of itself."""

import re
import sys
from pathlib import Path

import benchmark
import pytest

import create_train_val_test
import model_training_and_visualization as study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_every_option_that_the_readme_names_is_one_that_help_tells(monkeypatch, capsys):
    told = "--per-class --record\n"  # of draw_flowers.py, and of the tests themselves
    for script in (create_train_val_test, study, benchmark):
        monkeypatch.setattr(sys, "argv", [script.__name__, "--help"])
        with pytest.raises(SystemExit):
            script.parse_options()
        told += capsys.readouterr().out
    option = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    named = set(option.findall(README))
    assert len(named) > 15 and named <= set(option.findall(told))


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
