"""A bank as an artefact: its file, its table, its state dict, and the next student's rows."""

import io
import itertools
import pickle
import re
import sys

import pytest
import torch

from global_kd import GlobalKnowledgeLoss, PrototypeBank, Targets
from global_kd._version import __version__
from global_kd.functional import pool_boxes
from global_kd.prototypes import files
from global_kd.prototypes.adoption import Adoption

NAMES = ("ant", "bee", "cow")
LEVELS, CLASSES, SLOTS, CS, CT = 2, 3, 2, 4, 5
SUFFIXES = [".pt", ".safetensors"]


def filled(seed=0, **options):
    """A bank with an instance in every slot but two; ids 0, 1, ... in order."""
    g = torch.Generator().manual_seed(seed)
    options = {"strides": (8, 16), "class_names": NAMES, "teacher_fingerprint": "cafe"} | options
    bank = PrototypeBank(LEVELS, CLASSES, SLOTS, CS, CT, **options)
    bank.student.normal_(generator=g)
    bank.teacher.normal_(generator=g)
    bank.valid[:] = True
    bank.valid[1, 2, 1] = bank.valid[0, 0, 0] = False
    bank.ids.copy_(torch.arange(bank.ids.numel()).view_as(bank.ids)).masked_fill_(~bank.valid, -1)
    return bank


def origin(bank):
    return bank.strides, bank.class_names, bank.teacher_fingerprint, bank.version


def same(a, b):
    pairs = zip(a.named_buffers(), b.named_buffers(), strict=True)
    return origin(a) == origin(b) and all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def saved(tmp_path, suffix, **options):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"bank{suffix}"
    filled(**options).save(path)
    return path


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("known", [True, False])
def test_a_bank_comes_back_from_its_file(tmp_path, suffix, known):
    nothing = {"strides": None, "class_names": None, "teacher_fingerprint": None}
    path = saved(tmp_path, suffix, **({} if known else nothing))
    bank = PrototypeBank.load(str(path))
    assert same(bank, filled(**({} if known else nothing)))
    assert bank.version == __version__
    assert [x.name for x in tmp_path.iterdir()] == [path.name]  # nothing lies beside it


def test_a_bank_of_another_version_keeps_it(tmp_path):
    bank = filled()
    bank.version = "0.0.9"
    bank.save(tmp_path / "a.pt")
    PrototypeBank.load(tmp_path / "a.pt").save(tmp_path / "b.pt")
    assert PrototypeBank.load(tmp_path / "b.pt").version == "0.0.9"


def test_rows_that_are_no_whole_tensor_are_saved(tmp_path):
    """A view into more, and a number type of a model in half precision."""
    bank = filled().double()
    bank.student = torch.randn(LEVELS, CLASSES, SLOTS, 2 * CS, dtype=torch.float64)[..., ::2]
    for suffix in SUFFIXES:
        if suffix == ".safetensors":
            pytest.importorskip("safetensors")
        bank.save(tmp_path / f"bank{suffix}")
        again = PrototypeBank.load(tmp_path / f"bank{suffix}")
        assert again.student.dtype == torch.float32
        assert torch.equal(again.student, bank.student.float())


def test_the_header_of_a_safetensors_file_is_readable_without_this_library(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(saved(tmp_path, ".safetensors"), framework="pt") as file:
        header = file.metadata()
    assert header["strides"] == "[8.0, 16.0]"
    assert header["class_names"] == '["ant", "bee", "cow"]'
    assert header["teacher_fingerprint"] == '"cafe"'


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_in_a_file_is_run(tmp_path):
    path, crater = tmp_path / "bank.pt", tmp_path / "crater"
    content = {"metadata": {"kind": "global_kd.PrototypeBank", "format": 1, "x": Bomb(crater)}}
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"bank\.pt: expected a global_kd\.PrototypeBank"):
        PrototypeBank.load(path)
    assert not crater.exists()
    pickle.loads(pickle.dumps(Bomb(crater))).close()
    assert crater.exists()  # the bomb is one


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", ["half", "empty", "text", "a list", "another model"])
def test_a_file_that_is_no_bank_is_refused(tmp_path, suffix, content):
    path = saved(tmp_path, suffix)
    whole = path.read_bytes()
    if content in ("a list", "another model"):
        if suffix == ".safetensors":
            from safetensors.torch import save

            metadata = {"format": "pt"} if content == "another model" else None
            path.write_bytes(save({"weight": torch.ones(2)}, metadata=metadata))
        else:
            torch.save([1] if content == "a list" else {"weight": torch.ones(2)}, path)
    else:
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"hi"}[content])
    with pytest.raises(ValueError, match=rf"bank\{suffix}: expected a global_kd\.PrototypeBank"):
        PrototypeBank.load(path)


def test_a_missing_file_is_missing(tmp_path):
    for suffix in SUFFIXES:
        if suffix == ".safetensors":
            pytest.importorskip("safetensors")
        with pytest.raises(FileNotFoundError):
            PrototypeBank.load(tmp_path / f"bank{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_later_format_is_refused(tmp_path, suffix):
    path = saved(tmp_path, suffix)
    rows = dict(filled().named_buffers())
    files.write(path, rows, {"version": "9.1"}, kind="global_kd.PrototypeBank", version=2)
    with pytest.raises(ValueError, match=r"expected format 1 .* got 2, written by global_kd 9\.1"):
        PrototypeBank.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"valid": None}, "KeyError: 'valid'", id="rows missing"),
        pytest.param({"student": torch.ones(2, 3, 2)}, "student", id="rows of other shape"),
        pytest.param({"ids": torch.ones(2, 3, 1)}, "ids", id="fewer ids"),
        pytest.param({"valid": torch.ones(2)}, "ValueError", id="no slots"),
        pytest.param({"more": torch.ones(2)}, "Unexpected", id="rows of another thing"),
        pytest.param({"strides": [8.0]}, "strides: expected 2 numbers", id="levels"),
        pytest.param({"class_names": ["ant"]}, "class_names: expected 3 names", id="classes"),
    ],
)
def test_a_bank_that_does_not_fit_together_is_refused(tmp_path, change, message):
    bank, path = filled(), tmp_path / "bank.pt"
    rows, metadata = dict(bank.named_buffers()), bank.origin()
    for name, value in change.items():
        (metadata if name in metadata else rows)[name] = value
    rows = {name: x for name, x in rows.items() if x is not None}
    files.write(path, rows, metadata, kind="global_kd.PrototypeBank", version=1)
    with pytest.raises(ValueError, match=rf"(?s)bank\.pt: expected a whole .*{message}"):
        PrototypeBank.load(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = saved(tmp_path, ".pt")

    def full(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        filled(seed=1).save(path)
    assert same(PrototypeBank.load(path), filled())
    assert [x.name for x in tmp_path.iterdir()] == ["bank.pt"]


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for act in (filled().save, PrototypeBank.load):
        with pytest.raises(ImportError, match="pip install safetensors"):
            act(tmp_path / "bank.safetensors")
    assert not list(tmp_path.iterdir())


# --- what it says --------------------------------------------------------------------------------


def test_the_table():
    bank = filled()
    bank.valid[:, 1] = False
    bank.student[0], bank.student[1] = 3.0, -1.0
    bank.student[1, 0, 0] *= -1  # of three rows one is opposite: (1 - 1 - 1) / 3
    assert str(bank).splitlines()[:2] == [
        "PrototypeBank: levels 2, classes 3, slots 2; channels 4 (student), 5 (teacher)",
        f"made with global_kd {__version__}; teacher cafe; 6 of 6 prototypes with the id of their "
        "instance",
    ]
    level = [re.split(r"  +", line.strip()) for line in str(bank).splitlines()[2:5]]
    assert level[0] == ["stride", "prototypes", "classes", "cosine in student", "in teacher"]
    assert level[1][:4] == ["8", "3 of 6", "2 of 3", "1.00"]
    assert level[2][:4] == ["16", "3 of 6", "2 of 3", "-0.33"]
    assert str(bank).endswith("\nclasses without prototypes: bee")


def test_the_cosines_are_means_over_pairs():
    bank = filled()
    for level, line in enumerate(str(bank).splitlines()[3:5]):
        for rows, shown in zip((bank.student, bank.teacher), line.split()[-2:], strict=True):
            rows = rows[level][bank.valid[level]]
            pairs = itertools.combinations(rows.double(), 2)
            cosines = [torch.nn.functional.cosine_similarity(a, b, dim=0) for a, b in pairs]
            assert float(shown) == pytest.approx(float(torch.stack(cosines).mean()), abs=0.0051)


@pytest.mark.parametrize(
    ("classes", "empty"),
    [
        (1, "0"),
        (10, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (22, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 12 more"),
    ],
)
def test_ten_empty_classes_are_listed(classes, empty):
    table = str(PrototypeBank(1, classes, 3, 2, 2))
    assert table.endswith(f"classes without prototypes: {empty}")
    assert "teacher unknown" in table and "0 of 0" in table
    assert table.splitlines()[3].split()[:1] == ["?"]  # strides unknown
    assert table.splitlines()[3].split()[-2:] == ["-", "-"]  # no pairs, no cosine


def test_within_a_larger_module_a_bank_is_one_line():
    loss = GlobalKnowledgeLoss(3, student_channels=[4], teacher_channels=[4], strides=[8])
    (line,) = (x for x in str(loss).splitlines() if "PrototypeBank" in x)
    assert line.strip().startswith("(bank): PrototypeBank(levels=1, classes=3")


# --- the state dict ------------------------------------------------------------------------------


def test_state_dict_carries_where_the_prototypes_come_from():
    buffer = io.BytesIO()
    torch.save(filled().state_dict(), buffer)
    buffer.seek(0)
    bank = PrototypeBank(LEVELS, CLASSES, SLOTS, CS, CT)
    bank.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(bank, filled())


def test_a_state_dict_of_the_buffers_alone_still_loads():
    """As banks saved them before they had metadata; whose prototypes those are is not known."""
    old = dict(filled().named_buffers())
    bank = PrototypeBank(LEVELS, CLASSES, SLOTS, CS, CT, strides=(8, 16), teacher_fingerprint="f00")
    assert bank.load_state_dict(old) == ([], [])
    assert torch.equal(bank.student, filled().student)
    assert origin(bank) == ((8, 16), None, None, __version__)
    # The names of missing buffers are still told, and what is not loaded does not forget.
    bank.teacher_fingerprint = "cafe"
    assert bank.load_state_dict({}, strict=False).missing_keys == [*old]
    assert bank.teacher_fingerprint == "cafe"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (4, 8)}, r"bank\.strides: expected .*\[4\.0, 8\.0\].* of \[8\.0, 16\.0\]"),
        (
            {"class_names": ("ant", "cat", "cow")},
            r"bank\.class_names: expected .*'cat' for class 1, .*'bee' for class 1; .* classes",
        ),
    ],
)
def test_a_state_dict_for_other_levels_or_classes_is_refused(options, message):
    own = filled(seed=1, **options)
    model = torch.nn.ModuleDict({"bank": own})
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(torch.nn.ModuleDict({"bank": filled()}).state_dict())
    assert same(own, filled(seed=1, **options))


def test_the_loss_tells_its_bank_levels_and_classes():
    levels = {"student_channels": [4, 4], "teacher_channels": [5, 5], "strides": [8, 16]}
    loss = GlobalKnowledgeLoss(3, class_names=NAMES, **levels)
    assert origin(loss.bank) == ((8, 16), NAMES, None, __version__)
    unnamed = GlobalKnowledgeLoss(3, **levels)
    unnamed.load_state_dict(loss.state_dict())
    assert unnamed.bank.class_names == NAMES
    with pytest.raises(ValueError, match=r"bank\.strides: .*other levels"):
        GlobalKnowledgeLoss(3, **(levels | {"strides": [4, 8]})).load_state_dict(loss.state_dict())
    with pytest.raises(ValueError, match=r"bank\.class_names: .*other classes"):
        GlobalKnowledgeLoss(3, class_names=NAMES[::-1], **levels).load_state_dict(loss.state_dict())
    for names, error in (
        (("ant", "bee"), ValueError),
        ("abc", TypeError),
        ((1, 2, 3), TypeError),
    ):
        with pytest.raises(error, match="class_names: expected "):
            GlobalKnowledgeLoss(3, class_names=names)
    with pytest.raises(ValueError, match=r"strides: expected 2 numbers.* got \[8\]"):
        PrototypeBank(2, 3, 4, 5, 6, strides=[8])


# --- the next student ----------------------------------------------------------------------------

MAPS = [torch.randn(2, 7, 12, 12), torch.randn(2, 6, 6, 6)]  # the next student's, unlike channels


def seen(ids, labels, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = 40 * torch.rand(len(ids), 2, generator=g)
    boxes = torch.cat([corner, corner + 8 + 30 * torch.rand(len(ids), 2, generator=g)], dim=1)
    ids = torch.tensor(ids)
    return Targets(boxes, torch.tensor(labels), torch.arange(len(ids)) % 2, ids)


def search(bank, own, *batches, maps=MAPS):
    adoption = Adoption(bank, own)
    for targets in batches:
        adoption.offer(maps, targets, targets.ids, (8, 16))
    return adoption


def test_adoption_is_pooling_of_the_boxes_with_these_ids():
    bank = filled()
    bank.valid[0, 0, 0], bank.ids[0, 0, 0] = True, 0
    own = PrototypeBank(LEVELS, CLASSES, 3, 7, CT, strides=(8, 16))  # one slot more
    labels = {int(i): c for level in bank.ids for c, ids in enumerate(level) for i in ids if i >= 0}
    first = seen([99, *range(7), 1], [0, *(labels[i] for i in range(7)), 0])  # 1 twice
    second = seen([*range(7, 11), 5], [*(labels[i] for i in range(7, 11)), 2], seed=1)
    adoption = search(bank, own, first, second)
    assert (len(adoption), adoption.missing) == (11, 0)
    adoption.fill()
    assert origin(own) == origin(bank)
    assert torch.equal(own.valid[:, :, :SLOTS], bank.valid) and not own.valid[:, :, SLOTS].any()
    assert torch.equal(own.ids[:, :, :SLOTS], bank.ids)
    for level, label, slot in own.valid.nonzero().tolist():
        at = level, label, slot
        assert torch.equal(own.teacher[at], bank.teacher[at])
        targets = first if own.ids[at] < 7 else second
        row = int((targets.ids == own.ids[at]).nonzero()[0])
        box, image = targets.boxes[row : row + 1], targets.image_index[row : row + 1]
        pooled = pool_boxes(MAPS[level], box, image, (8, 16)[level])[0]
        torch.testing.assert_close(own.student[at][: len(pooled)], pooled)
        assert not own.student[at][len(pooled) :].any()


def test_an_id_of_another_class_is_another_instance():
    bank = filled()
    own = PrototypeBank(LEVELS, CLASSES, SLOTS, 7, CT)
    assert search(bank, own, seen([1, 2], [1, 1])).missing == 9  # 1 belongs to class 0


def test_a_row_that_is_not_finite_waits_for_the_next():
    bank, own = filled(), PrototypeBank(LEVELS, CLASSES, SLOTS, 7, CT)
    adoption = search(bank, own, seen([1], [0]), maps=[torch.full_like(x, torch.nan) for x in MAPS])
    assert adoption.missing == 10
    adoption.offer(MAPS, seen([1], [0]), torch.tensor([1]), (8, 16))
    assert adoption.missing == 9


def test_of_more_prototypes_the_first_are_used_and_what_is_lost_is_empty():
    bank, own = filled(), PrototypeBank(LEVELS, CLASSES, 1, 7, CT, class_names=NAMES)
    own.valid[:] = True  # what it held before goes
    adoption = search(bank, own, seen([2, 3, 4], [1, 1, 2]))
    assert len(adoption) == 6  # the first of each; of class 0 on level 0 that is the second slot
    adoption.fill()
    assert own.ids.flatten().tolist() == [-1, 2, 4, -1, -1, -1]
    assert torch.equal(own.valid, own.ids >= 0)


def test_a_bank_may_be_its_own_successor():
    """The student trained on: the same prototypes, its rows pooled anew."""
    bank, before = filled(), filled()
    adoption = search(bank, bank, seen([2, 3], [1, 1]), maps=[x[:, :CS] for x in MAPS])
    adoption.fill()
    assert torch.equal(bank.teacher[0, 1], before.teacher[0, 1])
    assert bank.student[0, 1].ne(before.student[0, 1]).all()
    assert int(bank.valid.sum()) == 2 and origin(bank) == origin(before)


def test_clear_forgets_the_prototypes_not_the_levels():
    bank = filled()
    bank.clear()
    empty = PrototypeBank(LEVELS, CLASSES, SLOTS, CS, CT, strides=(8, 16), class_names=NAMES)
    assert same(bank, empty)
