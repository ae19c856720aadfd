import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

import coco_torchvision
from workshop import detectors
from workshop.coco_eval import METRICS, detect, score
from workshop.coco_options import WEIGHTS, parse
from workshop.detection_data import epoch_batches, load_coco
from workshop.processes import Place, join

from .coco_ranks import RUNS, options, stop_in_the_second_epoch
from .conftest import EXAMPLES
from .trees import write_coco

ARCHS = list(RUNS)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread():
    """Several would add gradients up in a random order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """18 training images, all wide; a third without boxes."""
    return write_coco(tmp_path_factory.mktemp("tree") / "coco", images=18)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Of random weights, in the file that a training with `--depth 101` writes."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(5)
    size = detectors.SIZES["small-teacher"]
    for arch, build in (
        ("fasterrcnn", detectors.small_faster_rcnn),
        ("retinanet", detectors.small_retinanet),
    ):
        torch.save(build(size, 6).state_dict(), folder / f"{arch}.pt")
    return folder


def read(root):
    """As the script reads it."""
    return load_coco(root, annotation_ids=True, keep_empty=False)


def run(arguments, *more):
    with join() as place:
        return coco_torchvision.run(parse([*arguments, *map(str, more)]), place)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def bank(training):
    return dict(training.kd.loss.bank.named_buffers())


class TestData:
    def test_crowds_and_images_without_boxes_are_left_out(self, coco):
        data = read(coco)
        truth = data.train.truth
        assert len(truth.imgs) == 18 and len(data.train) == 12
        targets = [data.train[n][1] for n in range(12)]
        assert all(len(target["boxes"]) for target in targets)
        ids = torch.cat([target["ids"] for target in targets]).tolist()
        trained = {i for i, a in truth.anns.items() if not a["iscrowd"] and a["bbox"][2] > 0}
        assert sorted(ids) == sorted(trained) and len(truth.anns) == len(ids) + 2
        # The validation split keeps everything: empty images may have false detections.
        assert len(data.validation) == 18 and len(data.ground_truth.anns) == len(truth.anns)

    def test_an_image_with_a_crowd_alone_is_left_out(self, tmp_path):
        root = write_coco(tmp_path / "coco")
        assert read(root).train.image_ids == [13, 23, 43, 53]
        file = root / "annotations" / "instances_train2017.json"
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            annotation["iscrowd"] = int(annotation["image_id"] == 13)
        file.write_text(json.dumps(content))
        assert read(root).train.image_ids == [23, 43, 53]

    def test_a_mirrored_box_keeps_the_id_of_its_annotation(self, coco):
        train = read(coco).train
        mirrored, boxes = 0, 0
        for _, targets in epoch_batches(train, 1, seed=1, flip=True):
            for box, number in zip(targets[0]["boxes"], targets[0]["ids"].tolist()):
                x, y, width, height = train.truth.anns[number]["bbox"]
                there = torch.tensor([x, y, x + width, y + height])
                here = torch.tensor([96 - x - width, y, 96 - x, y + height])
                assert torch.equal(box, there) or torch.equal(box, here)
                boxes += 1
                mirrored += not torch.equal(box, there)
        assert 0 < mirrored < boxes == 18


class Numbered:
    """Image n shows n; every third is high."""

    wide = [n % 3 != 0 for n in range(32)]

    def __len__(self):
        return 32

    def __getitem__(self, n):
        height, width = (2, 3) if self.wide[n] else (3, 2)
        image = torch.full((3, height, width), float(n))
        image[:, :, 0] += 0.5  # to see the mirror
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        return image, {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}


class TestBatches:
    def epoch(self, rank=0, ranks=1, batch_size=2, **more):
        given = {"seed": 3, "flip": True, "wide": Numbered.wide} | more
        batches = epoch_batches(Numbered(), batch_size, rank=rank, ranks=ranks, **given)
        return [images for images, _ in batches]

    def test_ranks_share_the_batches_of_one(self):
        alone = self.epoch(batch_size=6)
        shares = [self.epoch(rank, 3) for rank in range(3)]
        assert [len(share) for share in shares] == [len(alone)] * 3
        assert len(alone) == 21 // 6 + 11 // 6
        for step, whole in enumerate(alone):
            together = [image for share in shares for image in share[step]]
            assert len(together) == 6
            for image in whole:  # once, and mirrored or not as there
                assert sum(image.equal(other) for other in together) == 1

    def test_one_orientation_a_step_in_a_mixed_order(self):
        shapes = [{tuple(image.shape) for image in images} for images in self.epoch(batch_size=4)]
        assert all(len(shape) == 1 for shape in shapes)
        kinds = [shape.pop() for shape in shapes]
        assert kinds.count((3, 2, 3)) == 5 and kinds.count((3, 3, 2)) == 2
        assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)

    def test_every_epoch_is_another_one(self):
        first, second = (torch.stack([i.max() for x in self.epoch(epoch=n) for i in x])
                         for n in (0, 1))  # fmt: skip
        assert not torch.equal(first, second)
        assert torch.equal(first, torch.stack([i.max() for x in self.epoch() for i in x]))


class TestOneProcess:
    @pytest.mark.slow
    @pytest.mark.parametrize("arch", ARCHS)
    def test_teacher_then_student(self, coco, tmp_path, arch, capsys):
        teacher = tmp_path / "teacher"
        common = ["--quick", "--arch", arch, "--data", str(coco)]
        coco_torchvision.main([*common, "--depth", "101", "--no-distill", "--output", str(teacher)])
        assert not (teacher / "check.txt").exists()
        taught = torch.load(teacher / "model.pt", weights_only=True)
        output = tmp_path / "student"
        more = ["--output", output, "--amp", "--channels-last", "--log-dir", tmp_path / "events"]
        capsys.readouterr()
        training = run([*common, "--teacher", str(teacher / "model.pt")], *more)
        assert "kd_foreground" in capsys.readouterr().out
        assert "kd_foreground" in (output / "check.txt").read_text()
        results = json.loads((output / "results.json").read_text())
        assert all(0 <= results[name] <= 1 for name in METRICS)
        assert [row["epoch"] for row in results["epochs"]] == [1, 2] and results["epoch"] == 2
        assert results["epochs"][1]["losses"].keys() >= {"kd_relation", "kd_logits"}
        assert results["parameters"] < sum(x.numel() for x in taught.values())
        assert results["options"]["arch"] == arch and results["options"]["processes"] == 1
        assert list((tmp_path / "events").glob("events.out.tfevents.*"))
        # The file fits the bare model.
        size = detectors.SIZES["small-student"]
        bare = (
            detectors.small_retinanet(size, 6)
            if arch == "retinanet"
            else detectors.small_faster_rcnn(size, 6)
        )
        bare.load_state_dict(torch.load(output / "model.pt", weights_only=True))
        # Prototypes are annotations of the training split.
        ids, valid = training.kd.loss.bank.ids, training.kd.loss.bank.valid
        assert valid.any() and set(ids[valid].tolist()) <= set(training.data.train.truth.anns)

    def test_another_method_with_its_share(self, coco, tmp_path, capsys):
        size = detectors.SIZES["small-teacher"]
        teacher = tmp_path / "teacher.pt"
        torch.save(detectors.small_retinanet(size, 6).state_dict(), teacher)
        output = tmp_path / "output"
        options = "--quick --arch retinanet --method frs+pkd --share 0.2".split()
        options += ["--data", str(coco), "--teacher", str(teacher), "--output", str(output)]
        training = run(options)
        assert "weight after" in capsys.readouterr().out
        losses = training.history[-1]["losses"]
        assert losses.keys() >= {"kd_frs_features", "kd_frs_classes", "kd_pkd"}
        weights = {name: loss.weights for name, loss in training.kd.losses.items()}
        assert weights["pkd"][""] != 10
        resumed = run([*options, "--resume"])
        assert "weight after" not in capsys.readouterr().out
        assert {name: loss.weights for name, loss in resumed.kd.losses.items()} == weights

    @pytest.mark.slow
    @pytest.mark.parametrize("arch", ARCHS)
    def test_the_real_detectors_take_a_step(self, coco, tmp_path, monkeypatch, arch):
        # Without --quick; ResNets of depth 18 and pictures of 96 x 64 keep it short.
        def smaller(*arguments, **options):
            model = detectors.resnet_detector(*arguments, **options)
            model.transform.min_size, model.transform.max_size = (64,), 96
            return model

        monkeypatch.setattr(coco_torchvision, "resnet_detector", smaller)
        weights = tmp_path / "resnet18.pt", tmp_path / "teacher.pt"
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights[0])
        torch.save(detectors.resnet_detector(arch, 18, 6).state_dict(), weights[1])
        options = f"--arch {arch} --depth 18 --teacher-depth 18 --data {coco} --workers 0".split()
        options += ["--backbone-weights", weights[0], "--teacher", weights[1], "--output", tmp_path]
        training = coco_torchvision.Training(
            self.prepared(list(map(str, options))), Place(0, 1, torch.device("cpu"))
        )
        loss = training.kd.loss
        finest = {"fasterrcnn": 4, "retinanet": 8}[arch]
        assert loss.rdm.strides == tuple(finest * 2**n for n in range(5))
        assert loss.total_steps == 24 * 6 and loss.refresh_every is None
        generator = loss.generator
        assert (generator.min_side, generator.max_instances, generator.num_prototypes) == (
            30, 800, 10,
        )  # fmt: skip
        body = training.student.backbone.body
        before = [body.layer1[0].conv1.weight.clone(), body.layer4[0].conv1.weight.clone()]
        training.optimizer.param_groups[0]["lr"] = 0.01
        losses = training.step(*next(training.batches(0, 0)))
        assert all(x.isfinite() for x in losses.values())
        assert losses["kd_foreground"] > 0 and losses["kd_logits"] > 0
        assert torch.equal(body.layer1[0].conv1.weight, before[0])
        assert not torch.equal(body.layer4[0].conv1.weight, before[1])

    @pytest.mark.parametrize("arch", ARCHS)
    def test_the_papers_settings(self, coco, teachers, tmp_path, arch):
        training = coco_torchvision.Training(
            self.prepared(options(arch, coco, teachers, tmp_path)),
            Place(0, 1, torch.device("cpu")),
        )
        rdm, loss = training.kd.loss.rdm, training.kd.loss
        assert (rdm.foreground, rdm.background, rdm.relation, rdm.logits) == (1, 4, 25, 1)
        assert loss.total_steps == 2 * training.steps == 12
        factors = [[s(p) for p in (0, 0.49, 0.5)] for s in loss.schedules.values()]
        assert factors == [[1, 1, 0.5]] * 3 + [[1, 1, 1]]
        assert rdm.activation == {"fasterrcnn": "softmax", "retinanet": "sigmoid"}[arch]
        base = {"fasterrcnn": 0.02, "retinanet": 0.01}[arch] * 2 / 16
        rates = []
        for _ in range(12):
            rates.append(training.optimizer.param_groups[0]["lr"])
            training.optimizer.step()
            training.scheduler.step()
        assert rates[0] < 0.01 * base
        assert rates[2:6] == pytest.approx([base] * 4) and rates[6:] == pytest.approx(
            [base / 10] * 6
        )

    def prepared(self, arguments):
        args = parse(arguments)
        args.processes, args.amp = 1, False
        args.output.mkdir(parents=True, exist_ok=True)
        return args

    def test_defaults(self, coco):
        args = parse(["--data", str(coco), "--no-distill"])
        assert coco_torchvision.SCHEDULES[args.schedule] == (24, (16, 22))
        assert (args.depth, args.teacher_depth, args.batch_size) == (50, 101, 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("arch", ARCHS)
    def test_a_resumed_run_ends_with_the_same_numbers(self, coco, teachers, tmp_path, arch):
        whole = run(options(arch, coco, teachers, tmp_path / "whole"))
        arguments = options(arch, coco, teachers, tmp_path / "broken")
        stop_in_the_second_epoch(arguments, Place(0, 1, torch.device("cpu")))
        assert not (tmp_path / "broken" / arch / "model.pt").exists()
        torch.rand(5)  # whatever happens to the random state in between
        with pytest.raises(SystemExit, match="There is a run in .* give --resume, or another"):
            run(arguments)
        resumed = run(arguments, "--resume")
        assert equal(resumed.student.state_dict(), whole.student.state_dict())
        assert equal(bank(resumed), bank(whole)) and bank(whole)["valid"].any()
        assert resumed.history[-1]["AP"] == whole.history[-1]["AP"]


class TestSeveralProcesses:
    @pytest.fixture(scope="class")
    def folder(self, coco, teachers, tmp_path_factory):
        """What two ranks leave."""
        folder = tmp_path_factory.mktemp("ranks")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node=2", str(Path(__file__).with_name("coco_ranks.py"))),
                *map(str, (folder, coco, teachers)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return folder

    @pytest.fixture(params=ARCHS)
    def ends(self, request, folder):
        ranks = [
            torch.load(folder / f"{request.param}-{rank}.pt", weights_only=True)
            for rank in range(2)
        ]
        return request.param, folder / request.param, ranks

    @pytest.mark.slow
    def test_the_ranks_end_with_one_student_and_one_bank(self, ends):
        _, _, (first, second) = ends
        for part in ("student", "adapters", "bank"):
            assert equal(first[part], second[part]), part
        assert first["bank"]["valid"].any()
        assert first["steps"] == second["steps"] == 2 * 3  # 12 images, 2 ranks of 2

    @pytest.mark.slow
    def test_a_resumed_run_ends_with_the_same_numbers(self, ends, folder):
        arch, _, whole = ends
        for rank in range(2):
            resumed = torch.load(folder / "resumed" / f"{arch}-{rank}.pt", weights_only=True)
            for part in ("student", "adapters", "bank"):
                assert equal(resumed[part], whole[rank][part]), part
            assert resumed["detections"] == whole[rank]["detections"]

    @pytest.mark.slow
    def test_the_prototypes_come_from_both_shares(self, ends, coco):
        arch, _, (rank, _) = ends
        train = read(coco).train
        if RUNS[arch] == "refresh":
            mine = set(range(0, len(train), 2))
        else:  # the last epoch's
            batches = epoch_batches(train, 2, seed=0, epoch=1, rank=0, ranks=2, wide=train.wide)
            seen = {i for _, targets in batches for t in targets for i in t["ids"].tolist()}
            mine = {n for n in range(len(train)) if seen & set(train[n][1]["ids"].tolist())}
        shares = [set(), set()]
        for n in range(len(train)):
            shares[n not in mine] |= set(train[n][1]["ids"].tolist())
        found = set(rank["bank"]["ids"][rank["bank"]["valid"]].tolist())
        assert found & shares[0] and found & shares[1]

    @pytest.mark.slow
    def test_evaluation_is_that_of_one_process(self, ends, coco):
        arch, output, (first, _) = ends
        data = read(coco)
        student = {
            "fasterrcnn": detectors.small_faster_rcnn,
            "retinanet": detectors.small_retinanet,
        }[arch](detectors.SIZES["small-student"], 6)
        student.load_state_dict(torch.load(output / "model.pt", weights_only=True))
        everything = range(len(data.validation))
        alone = detect(student, data, everything, label=None, batch_size=1)
        merged = sorted(first["detections"], key=lambda found: found["image_id"])  # stable
        assert len(alone) > 20 and merged == alone
        results = json.loads((output / "results.json").read_text())
        assert {name: results[name] for name in METRICS} == score(data, alone, everything)
        assert results["options"]["processes"] == 2

    @pytest.mark.slow
    def test_resume_with_another_number_of_processes_is_refused(self, ends, coco, teachers):
        arch, output, _ = ends
        state = torch.load(output / "checkpoint.pt", weights_only=True)
        assert len(state["random"]) == 2
        assert not torch.equal(*(random["cpu"] for random in state["random"]))
        with pytest.raises(SystemExit, match=r"has --processes 2, not 1\.$"):
            run(options(arch, coco, teachers, output.parent), "--resume")


class TestDetectors:
    @pytest.mark.slow
    @pytest.mark.parametrize("arch", ARCHS)
    def test_weights_fit_torchvisions_own(self, arch):
        ours = detectors.resnet_detector(arch, 50, 6)
        build = {"fasterrcnn": fasterrcnn_resnet50_fpn, "retinanet": retinanet_resnet50_fpn}[arch]
        theirs = build(weights=None, weights_backbone=None, num_classes=6)
        theirs.load_state_dict(ours.state_dict())  # strict
        assert "num_batches_tracked" not in str(ours.state_dict().keys())
        trained = {n.split(".")[2] for n, p in ours.backbone.named_parameters("backbone")
                   if p.requires_grad and ".body." in n}  # fmt: skip
        assert trained == {"layer2", "layer3", "layer4"}

    def test_a_backbone_from_a_file(self, tmp_path):
        resnet = torchvision.models.resnet18(weights=None)
        torch.save(resnet.state_dict(), tmp_path / "resnet18.pt")
        model = detectors.resnet_detector("retinanet", 18, 6)
        detectors.load_backbone(model, str(tmp_path / "resnet18.pt"), 18)
        body = model.backbone.body
        assert torch.equal(body.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
        assert torch.equal(body.bn1.weight, resnet.bn1.weight)

    def test_wrong_files_and_no_network(self, tmp_path, monkeypatch):
        model = detectors.resnet_detector("retinanet", 18, 6)
        torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
        with pytest.raises(SystemExit, match=r"other\.pt holds no weights of a ResNet-18\.$"):
            detectors.load_backbone(model, str(tmp_path / "other.pt"), 18)
        with pytest.raises(SystemExit, match=r"nowhere is not a file of weights\.$"):
            detectors.load_backbone(model, "nowhere", 18)

        def fail(*arguments, **options):
            raise URLError("no network")

        monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fail)
        with pytest.raises(SystemExit, match=r"give --backbone-weights the file of https://.*pth"):
            detectors.load_backbone(model, "imagenet", 18)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("--data {coco}", "Give --teacher, the weights to distil from, or --no-distill."),
        ("--data {coco} --no-distill --teacher {fasterrcnn}", "Give --teacher, the weights"),
        ("--data {coco} --teacher {tmp}/no.pt", "There are no weights at {tmp}/no.pt."),
        ("--data {tmp}/no --no-distill", "There is no folder {tmp}/no."),
        ("--data {tmp} --no-distill", "No COCO data in {tmp}"),
        ("--data {coco} --no-distill --batch-size 13", "has too few images for a batch of 13."),
        ("--data {coco} --no-distill --resume", "Cannot resume: there is no run in"),
        (
            "--data {coco} --arch retinanet --teacher {fasterrcnn}",
            "fasterrcnn.pt belong to another detector.",
        ),
        ("--data {coco} --no-distill --batch-size 0", "--batch-size must be at least 1."),
    ],
)
def test_errors_are_a_sentence(coco, teachers, tmp_path, given, sentence):
    places = {"coco": coco, "tmp": tmp_path, "fasterrcnn": teachers / "fasterrcnn.pt"}
    arguments = given.format(**places).split()
    with pytest.raises(SystemExit, match=re.escape(sentence.format(**places))):
        run(["--quick", "--output", str(tmp_path / "output"), *arguments])


def test_the_librarys_weights_are_one_option(coco, teachers, tmp_path):
    given = ["--teacher", str(teachers / "fasterrcnn.pt"), "--weights", "library"]
    args = parse(["--data", str(coco), "--output", str(tmp_path), *given, "--logits", "3"])
    assert (args.foreground, args.background, args.relation, args.logits) == (2, 1, 0, 3)
    assert WEIGHTS[args.weights]["standardize"] and not WEIGHTS["paper"]["standardize"]


def test_every_option_on_the_page_exists():
    """In docs/coco.md, where whole commands are shown."""
    page = (EXAMPLES.parent / "docs" / "coco.md").read_text()
    options = EXAMPLES / "workshop" / "coco_options.py"
    known = set(re.findall(r'"(--[a-z-]+)"', options.read_text()))
    known |= {"--foreground", "--background", "--relation", "--logits", "--no-amp"}
    used = set(re.findall(r"(--[a-z][a-z-]*)", page)) - {"--nproc-per-node", "--nnodes"}
    assert used and used <= known
