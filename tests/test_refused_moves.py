"""Cuts, undos and quarantines that are refused before the first picture is moved."""
# ruff: noqa: F401, F811  (fixtures of the cut's tests)

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from scripts import quarantine as program
from tests.helpers.pictures import CLASSES, drawn
from tests.test_split import call, cut, fingerprint, held_out, original, refused, succeed, tree, undo


@pytest.mark.parametrize("alone", [False, True])
def test_a_cut_that_leaves_a_class_without_a_held_out_picture_moves_nothing(tree, alone):
    """All pictures of a class are one group of near-duplicates, or there is one picture; then of all classes."""
    for folder in CLASSES[: 1 + 2 * alone]:
        shutil.rmtree(tree / "train_data" / folder)
        (tree / "train_data" / folder).mkdir()
        for quality in range(50, 51 if folder == "dog" else 90):
            drawn(ord(folder[0])).save(tree / "train_data" / folder / f"{quality}.jpg", quality=quality)
    said = refused(tree, "--validation_fraction", "0.2").splitlines()
    assert "cat (pictures 40, groups of near-duplicates 1, the smallest of them 40)" in said[-1]
    assert ("dog (pictures 1, groups" in said[-1]) == ("ragno (pictures 40" in said[-1]) == alone
    assert all(way in said[-1] for way in ("other scenes", "--near_duplicate_distance", "remove the class"))
    own = tree / "validation_data" / "cat"
    own.mkdir(parents=True)
    drawn(9999).save(own / "mine.jpg")  # then cat needs none, and the others still do
    arguments = tree, "--validation_fraction", "0.2", "--add_to_validation"
    if alone:
        assert "cat (" not in refused(*arguments)
    else:
        cut(tree, "--add_to_validation")
        assert {path.split("/")[0] for path in held_out(tree)} == set(CLASSES)


@contextmanager
def read_only(folder):
    """`folder` on a mount of its own that nobody can write to; the test is skipped where that is not allowed."""
    mounts = [["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]]
    if os.geteuid() or any(subprocess.run(words, capture_output=True).returncode for words in mounts):
        pytest.skip("a read-only mount is made by root alone, and not on every machine")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_place_is_one_line_and_its_pictures_can_be_checked(tree):
    before, listed = fingerprint(tree), tree.parent / "list.csv"
    listed.write_text(f"image\n{tree}/train_data/cat/00.jpg\n")
    succeed(tree, listed, program=program)
    cut(tree)
    cuts = ("--validation_fraction", "0.2", "--add_to_validation"), ("--undo_split",)
    for name, flag in (("input", "--input_dir"), ("input/train_data", "--input_dir"), ("temp", "--temp_dir")):
        with read_only(tree.parent / name):
            if name == "input":
                succeed(tree)  # a check needs no right to write there
            said = [refused(tree, *words) for words in cuts] + [refused(tree, "--undo", program=program)]
            assert all(line.count("\n") == 1 and flag in line and "Read-only" in line for line in said), said
    undo(tree)
    succeed(tree, "--undo", program=program)
    assert fingerprint(tree) == before
