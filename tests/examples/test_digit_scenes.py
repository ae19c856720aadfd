import numpy as np
import pytest
import torch

from workshop import digit_scenes
from workshop.digit_scenes import (
    SceneSettings,
    load_digit_scenes,
    make_scenes,
    split_digits,
    split_photographs,
)
from workshop.source_digest import source_digest

SMALL = SceneSettings(train=40, validation=20)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values()))


def test_no_digit_is_in_both_splits():
    (train, scans, classes), (validation, _, held_out) = map(split_digits, ("train", "validation"))
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 1797
    assert set(classes) == set(held_out) == set(range(10))
    assert scans.shape == (len(train), 8, 8)
    assert scans.min() >= 0 and scans.max() == 1


def test_no_digit_was_scanned_twice_into_both_splits():
    # Disjoint rows are not enough if the same picture occurred twice in the source.
    train, validation = (
        {scan.tobytes() for scan in split_digits(split)[1]} for split in ("train", "validation")
    )
    assert not train & validation


def test_photographs_are_cut_in_two():
    from sklearn.datasets import load_sample_images

    halves = zip(split_photographs("train"), split_photographs("validation"))
    for whole, parts in zip(load_sample_images().images, halves):
        assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_the_same_settings_give_the_same_scenes():
    assert same(make_scenes("train", SMALL), make_scenes("train", SMALL))


def test_more_scenes_begin_with_the_same_ones():
    few, many = make_scenes("train", SMALL), make_scenes("train", SceneSettings(train=45))
    assert torch.equal(few.images, many.images[:40])


@pytest.mark.parametrize("other", ["seed", "split"])
def test_another_seed_and_another_split_give_other_scenes(other):
    settings = SceneSettings(40, 40)
    one = make_scenes("train", settings)
    if other == "seed":
        two = make_scenes("train", SceneSettings(40, 40, seed=1))
    else:
        two = make_scenes("validation", settings)
    assert (one.images != two.images).flatten(1).any(dim=1).all()


def test_the_global_random_state_is_left_alone():
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    make_scenes("train", SceneSettings(train=2))
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_boxes_lie_in_the_picture_and_have_the_sizes_promised():
    scenes = make_scenes("train", SceneSettings(train=150))
    boxes, sizes = scenes.boxes, scenes.boxes[:, 2:] - scenes.boxes[:, :2]
    assert (boxes >= 0).all() and (boxes <= 96).all() and (sizes > 0).all()
    assert 9 <= sizes[:, 1].min() < 16 and 40 < sizes[:, 1].max() <= 64
    assert set(scenes.labels.tolist()) == set(range(1, 11))
    counts = scenes.first.diff()
    assert counts.min() >= 1 and counts.max() == 6 and scenes.first[-1] == len(boxes)


def test_a_box_surrounds_ink():
    # The same scene with and without its digits: every change lies in a box, each has some.
    rng = np.random.default_rng
    scans, classes = split_digits("train")[1:]
    photographs, settings = split_photographs("train"), SceneSettings()
    empty = digit_scenes._background(rng(7), photographs, settings.side)
    picture, boxes, _ = digit_scenes.draw_scene(rng(7), scans, classes, photographs, settings)
    changed = np.abs(picture - np.clip(empty, 0, 255)).max(axis=2) > 60  # more than grain
    inside = np.zeros_like(changed)
    for x1, y1, x2, y2 in boxes:
        inside[y1:y2, x1:x2] = True
        assert changed[y1:y2, x1:x2].mean() > 0.1
    assert not changed[~inside].any()


def test_items_are_what_torchvision_trains_on():
    scenes = make_scenes("validation", SMALL)
    image, target = scenes[3]
    assert image.shape == (3, 96, 96) and image.dtype == torch.float32 and image.max() <= 1
    assert target["boxes"].shape == (len(target["labels"]), 4)
    assert target["labels"].dtype == torch.int64


class TestCache:
    def test_a_second_call_reads_the_file(self, tmp_path, monkeypatch):
        drawn = load_digit_scenes("train", SMALL, tmp_path)
        monkeypatch.setattr(digit_scenes, "make_scenes", None)
        assert same(load_digit_scenes("train", SMALL, tmp_path), drawn)

    def test_other_settings_do_not_take_it(self, tmp_path):
        load_digit_scenes("train", SMALL, tmp_path)
        assert len(load_digit_scenes("train", SceneSettings(train=7), tmp_path)) == 7

    @pytest.mark.parametrize("content", ["garbage", "cut short", "other tensors", "a list"])
    def test_a_foreign_or_damaged_file_is_not_trusted(self, tmp_path, content):
        drawn = load_digit_scenes("train", SMALL, tmp_path)
        (file,) = tmp_path.glob("*train.pt")
        if content == "garbage":
            file.write_bytes(b"not a file of tensors")
        elif content == "cut short":
            file.write_bytes(file.read_bytes()[:5000])
        elif content == "other tensors":
            torch.save({"stamp": "train-0123456789abcdef", "images": torch.zeros(3)}, file)
        else:
            torch.save([1, 2], file)
        assert same(load_digit_scenes("train", SMALL, tmp_path), drawn)

    def test_code_that_a_file_would_run_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (exec, ("raise AssertionError('ran')",))

        torch.save(Evil(), tmp_path / "digit_scenes_train.pt")
        assert len(load_digit_scenes("train", SMALL, tmp_path)) == 40

    def test_too_little_disk_is_said_in_one_sentence(self, tmp_path, monkeypatch):
        usage = type("usage", (), {"free": 1000})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
        with pytest.raises(SystemExit, match=r"^Too little disk: .* needs \d+ MB in .*\.$"):
            load_digit_scenes("train", SMALL, tmp_path)
        assert not list(tmp_path.iterdir())


def test_the_fingerprint_follows_code_and_settings_but_not_comments(tmp_path):
    assert SceneSettings().fingerprint() != SceneSettings(seed=1).fingerprint()
    digests = []
    for text in (
        "def f():\n    return 1\n",
        '"""Doc."""\n\n# why\ndef f():  # how\n    return 1\n',
    ):
        (tmp_path / "code.py").write_text(text)
        digests.append(source_digest(str(tmp_path / "code.py")))
    (tmp_path / "code.py").write_text("def f():\n    return 2\n")
    assert digests[0] == digests[1] != source_digest(str(tmp_path / "code.py"))


def test_the_digest_does_not_follow_the_folder_of_a_neighbour(tmp_path):
    digests = []
    for text in (
        "import a\nfrom b import c\n",
        "from . import a\nfrom .b import c\n",
        "from workshop import a\nfrom workshop.b import c\n",
        "import a\nfrom d import c\n",
    ):
        (tmp_path / "code.py").write_text(text)
        digests.append(source_digest(str(tmp_path / "code.py")))
    assert digests[0] == digests[1] == digests[2] != digests[3]
