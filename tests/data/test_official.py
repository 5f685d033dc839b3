"""Official split lists: read as published, errata and all, and refused where they are wrong."""

from pathlib import Path

import numpy as np
import pytest

from dgavg.data import Splits, load, make_splits
from dgavg.data.official import official_splits, renumbered

FILES = {
    "art": {"cat": ["1.jpg", "2.jpg", "3.jpg"], "dog": ["1.jpg", "2.jpg"]},
    "ink": {"cat": ["1.jpg"], "dog": ["a.b.jpg", "c.jpg"]},
}
TREE = {
    domain: {label: [Path(domain, label, name) for name in names] for label, names in part.items()}
    for domain, part in FILES.items()
}
LISTS = {
    "art_train": "art/cat/3.jpg 1\nart/cat/1.jpg 1\nart/dog/2.jpg 2\n",
    "art_crossval": "art/cat/2.jpg 1\nart/dog/1.jpg 2\n",
    "art_test": "".join(f"art/{p}.jpg {i}\n" for p, i in
                        [("cat/1", 1), ("cat/2", 1), ("cat/3", 1), ("dog/1", 2), ("dog/2", 2)]),
    "ink_train": "ink/cat/1.jpg 1\nink/dog/c.jpg 2\n",
    "ink_crossval": "ink/dog/a.b.jpg 2\n",
    "ink_test": "ink/cat/1.jpg 1\nink/dog/c.jpg 2\nink/dog/a.b.jpg 2\n",
}  # fmt: skip


@pytest.fixture
def write_lists(tmp_path):
    """Write the lists, some with other text, and give their folder."""

    def write(**others):
        for name, text in (LISTS | others).items():
            path = tmp_path / f"{name}_kfold.txt"
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text)
        return tmp_path

    return write


def lists_of(splits):
    return [[keys.tolist() for keys in part] for part in (splits.in_, splits.out, splits.test)]


def test_lists_become_keys(write_lists):
    splits, notes = official_splits(write_lists(), TREE)
    assert lists_of(splits) == [[[0, 2, 4], [0, 2]], [[1, 3], [1]], [[0, 1, 2, 3, 4], [0, 1, 2]]]
    assert notes == ()
    assert {keys.dtype for part in (splits.in_, splits.out, splits.test) for keys in part} == {
        np.dtype(np.int64)
    }


def test_blank_lines_and_other_line_ends(write_lists):
    text = LISTS["art_train"].replace("\n", "\r\n") + "\r\n  \n"
    splits, notes = official_splits(write_lists(art_train=text), TREE)
    assert splits.in_[0].tolist() == [0, 2, 4]
    assert notes == ()


def test_another_suffix_is_matched_by_stem_and_noted(write_lists):
    text = LISTS["ink_train"].replace("c.jpg", "c.png")
    splits, (note,) = official_splits(write_lists(ink_train=text), TREE)
    assert splits.in_[1].tolist() == [0, 2]
    assert note == "official splits: 1 found under another suffix (ink/dog/c.png)"


def test_a_stem_that_two_images_have_is_refused(write_lists, refuses):
    tree = {**TREE, "ink": {"cat": TREE["ink"]["cat"], "dog": [Path("c.jpg"), Path("c.bmp")]}}
    folder = write_lists(ink_train=LISTS["ink_train"].replace("c.jpg", "c.png"))
    with refuses("ink_train_kfold.txt line 2", "more than one image ink/dog/c.png"):
        official_splits(folder, tree)


def test_label_0_is_read_by_the_folder_and_noted(write_lists):
    text = LISTS["art_crossval"].replace("cat/2.jpg 1", "cat/2.jpg 0")
    splits, (note,) = official_splits(write_lists(art_crossval=text), TREE)
    assert splits.out[0].tolist() == [1, 3]
    assert note == (
        "official splits: 1 label 0 where labels count from 1, read by the folder "
        "(art_crossval_kfold.txt line 1: art/cat/2.jpg)"
    )


def test_an_image_listed_twice_is_taken_once_and_noted(write_lists):
    text = LISTS["art_crossval"] + "art/cat/2.jpg 1\n"
    splits, (note,) = official_splits(write_lists(art_crossval=text), TREE)
    assert splits.out[0].tolist() == [1, 3]
    assert (
        "1 listed twice, taken once (art/cat/2.jpg in art_crossval_kfold.txt lines 1 and 3" in note
    )


def test_an_image_in_neither_list_is_tested_on_alone(write_lists):
    text = LISTS["art_train"].replace("art/cat/3.jpg 1\n", "")
    splits, (note,) = official_splits(write_lists(art_train=text), TREE)
    assert splits.in_[0].tolist() == [0, 4]
    assert splits.test[0].tolist() == [0, 1, 2, 3, 4]
    assert note == (
        "official splits: 1 in neither the train nor the crossval list, so not trained on "
        "(art/cat/3.jpg)"
    )


def test_an_image_outside_the_test_list_is_noted(write_lists):
    text = LISTS["ink_test"].replace("ink/cat/1.jpg 1\n", "")
    splits, (note,) = official_splits(write_lists(ink_test=text), TREE)
    assert splits.test[1].tolist() == [1, 2]
    assert note == "official splits: 1 not in the test list, so not tested on (ink/cat/1.jpg)"


def test_many_errata_are_counted(write_lists):
    text = LISTS["art_test"].replace(".jpg", ".png")
    _, (note,) = official_splits(write_lists(art_test=text), TREE)
    assert note.endswith("5 found under another suffix (art/cat/1.png, art/cat/2.png, "
                         "art/cat/3.png, 2 more)")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("art_train", "art/cat/9.jpg 1\n", ["line 1", "no image art/cat/9.jpg"]),
        ("art_train", "\nink/dog/c.jpg 2\n", ["line 2", "no image ink/dog/c.jpg"]),
        ("art_train", "art/cow/1.jpg 1\n", ["line 1", "no image art/cow/1.jpg"]),
        ("art_test", "art/cat/1.jpg 2\n", ["line 1", "label 2", "folder 'cat' is label 1"]),
        ("art_test", "art/dog/1.jpg 1\n", ["line 1", "label 1", "folder 'dog' is label 2"]),
        ("ink_test", "ink/dog/c.jpg\n", ["line 1", "'ink/dog/c.jpg' is not"]),
        ("ink_test", "c.jpg 1\n", ["line 1", "'c.jpg 1' is not 'domain/class/file label'"]),
        ("ink_test", "ink/dog/c.jpg two\n", ["line 1", "is not"]),
        ("ink_test", "ink/dog/c.jpg -1\n", ["line 1", "is not"]),
        ("ink_train", "", ["lists no image"]),
        ("art_crossval", None, ["no art_crossval_kfold.txt in"]),
    ],
)
def test_a_wrong_list_is_named(write_lists, refuses, name, text, parts):
    folder = write_lists(**{name: text})
    with refuses(f"{name}_kfold.txt", "data.lists=none", *parts):
        official_splits(folder, TREE)


def test_an_image_to_train_on_and_to_validate_on_is_refused(write_lists, refuses):
    text = LISTS["art_crossval"] + "art/cat/1.jpg 1\n"
    with refuses(
        "art_crossval_kfold.txt line 3", "art/cat/1.jpg stands in line 2 of art_train_kfold.txt"
    ):
        official_splits(write_lists(art_crossval=text), TREE)


def test_a_list_that_is_no_text(write_lists, refuses):
    folder = write_lists()
    (folder / "art_train_kfold.txt").write_bytes(b"\xff\xfe\x00")
    with refuses("art_train_kfold.txt cannot be read as text"):
        official_splits(folder, TREE)


def test_keys_move_up_where_images_were_left_out():
    keys = [np.array(k, np.int64) for k in ([1], [0, 2, 3], [0, 1, 2, 3])]
    out, in_, test = ((k, k) for k in keys)
    everything = ["a", "b", "c", "d"]
    names = [(everything, ["a", "b", "d"]), (everything, everything)]
    found = renumbered(Splits(out=out, in_=in_, test=test), names)
    assert lists_of(found) == [[[0, 2], [0, 2, 3]], [[1], [1]], [[0, 1, 2], [0, 1, 2, 3]]]
    assert renumbered(Splits(out=out, in_=in_), names).test is None


@pytest.mark.slow
def test_the_lists_of_pacs(real_data):
    """Against the lists read the plain way, and the errata that their folder's note names."""
    data = load("pacs", root=real_data, size=8, cache="none")
    splits = make_splits(data, 0.2, 0, "official")
    for i, domain in enumerate(data.domains):
        at = {Path(name).with_suffix("").as_posix(): k for k, name in enumerate(domain.files)}
        for part, keys in (("train", splits.in_), ("crossval", splits.out), ("test", splits.test)):
            lines = (real_data / f"PACS/splits/{domain.name}_{part}_kfold.txt").read_text().split()
            named = {at[Path(name).with_suffix("").as_posix()] for name in lines[::2]}
            assert set(keys[i].tolist()) == named
            assert len(keys[i]) == len(named)
    assert [len(keys) for keys in splits.test] == [2048, 2344, 1670, 3929]
    assert [len(keys) for keys in splits.in_] == [1840, 2107, 1499, 3531]
    assert [len(keys) for keys in splits.out] == [207, 237, 171, 398]
    (note,) = data.notes
    for part in (
        "1 label 0 where labels count from 1, read by the folder "
        "(art_painting_crossval_kfold.txt line 1: art_painting/dog/pic_225.jpg)",
        "1 listed twice, taken once (art_painting/dog/pic_248.jpg in "
        "art_painting_crossval_kfold.txt lines 2 and 17)",
        "1 in neither the train nor the crossval list, so not trained on "
        "(art_painting/dog/pic_249.jpg)",
        "7858 found under another suffix (sketch/dog/",
    ):
        assert part in note
