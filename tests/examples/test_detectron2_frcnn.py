import json

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.utils.env import seed_all_rng  # noqa: E402

import detectron2_frcnn as example  # noqa: E402
from workshop.digit_scenes import SceneSettings  # noqa: E402
from workshop.distillation import Knowledge  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TERMS = {"kd_foreground", "kd_background", "kd_relation", "kd_logits"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(cache, tmp_path):
    """Configs of a few iterations on a few scenes."""
    example.register_digits(SceneSettings(64, 16), cache)

    def make(role=example.STUDENT, **options):
        steps = {"SOLVER.MAX_ITER": 3, "OUTPUT_DIR": str(tmp_path / "output")}
        more = {key.replace("__", "."): value for key, value in options.items()}
        merged = {**example.DIGITS, **role, "SOLVER.IMS_PER_BATCH": 4, **steps, **more}
        return example.load_config(example.ZOO, example.flat(merged))

    return make


def distil_from(teacher, **terms):
    def distil(student):
        return Knowledge(refresh_every=2, **terms).distiller(student, teacher, 10, 6, 0)

    return distil


def logged(folder):
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
def test_quick_run(cache, tmp_path):
    """Table, metrics and checkpoints; the student's file loads into a bare Detectron2 model."""
    output, file = tmp_path / "output", tmp_path / "run.json"
    options = ["--quick", "--cache", str(cache), "--output", str(output), "--json", str(file)]
    example.main(options)
    metrics = json.loads(file.read_text())
    assert list(metrics["models"]) == ["teacher", "student", "student + gk"]
    for row in metrics["models"].values():
        assert 0 <= row["AP"] <= 1 and row["seconds"] > 0
    last = [line for line in logged(output / "student_gk") if "total_loss" in line][-1]
    assert set(last) >= TERMS
    assert not TERMS & set(logged(output / "student_none")[0])
    plain = torch.load(output / "student_none" / "model_final.pth", weights_only=True)
    distilled = torch.load(output / "student_gk" / "model_final.pth", weights_only=True)
    assert plain["model"].keys() == distilled["model"].keys()
    assert not equal(plain["model"], distilled["model"])
    assert set(distilled) - set(plain) == {"kd"}
    bare = build_model(
        example.load_config(example.ZOO, example.flat({**example.DIGITS, **example.STUDENT}))
    )
    DetectionCheckpointer(bare).load(str(output / "student_gk" / "model_final.pth"))
    assert equal(bare.state_dict(), distilled["model"])
    # What is done is not done again; the Distiller goes on where it was.
    example.main([*options, "--resume", "--opts", "SOLVER.MAX_ITER", "6"])
    resumed = torch.load(output / "student_gk" / "model_final.pth", weights_only=True)
    assert resumed["kd"]["losses.global_knowledge._extra_state"][0] == 6  # its step
    assert resumed["iteration"] == 5


@pytest.mark.slow
def test_resume_restores_the_distiller(config):
    torch.manual_seed(0)
    teacher = build_model(config(example.TEACHER))
    example.train(config(), "student", distil_from(teacher), resume=False)
    saved = torch.load(config().OUTPUT_DIR + "/model_final.pth", weights_only=True)
    trainer = example.Trainer(config(), distiller=distil_from(teacher))
    trainer.resume_or_load(True)
    assert trainer.start_iter == 3 and trainer.kd.loss.step == 3
    assert trainer.kd.loss.bank.valid.any()
    assert equal(trainer.model.state_dict(), saved["model"])
    tensors = {k: v for k, v in saved["kd"].items() if isinstance(v, torch.Tensor)}
    mine = trainer.kd.state_dict()
    assert tensors and all(torch.equal(mine[k], v) for k, v in tensors.items())


@pytest.mark.slow
def test_weights_of_zero_train_what_no_teacher_trains(config, tmp_path):
    """The same start, the same batches, the same samples: only the terms make a difference."""
    torch.manual_seed(0)
    teacher = build_model(config(example.TEACHER))
    zero = dict.fromkeys(("foreground", "background", "relation", "logits"), 0.0)
    ways = {"plain": None, "zero": distil_from(teacher, **zero), "gk": distil_from(teacher)}
    states = {}
    for name, way in ways.items():
        cfg = config(OUTPUT_DIR=str(tmp_path / name))
        states[name] = example.train(cfg, name, way, resume=False)[0].state_dict()
    assert equal(states["plain"], states["zero"])
    assert not equal(states["plain"], states["gk"])


def test_adapters_are_in_the_optimizer_and_the_schedule(config):
    seed_all_rng(0)
    teacher = build_model(config(example.TEACHER))
    trainer = example.Trainer(config(), distiller=distil_from(teacher))
    rates = {id(p): g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    adapters = list(trainer.kd.parameters())
    assert adapters
    student = next(p for p in trainer.model.parameters())
    assert {rates[id(p)] for p in adapters} == {rates[id(student)]}


@pytest.mark.slow
def test_two_configs(config, tmp_path):
    """As with the model zoo: two configs, trained weights, registered data; nothing of the demo."""
    files = {}
    for name, role in (("student", example.STUDENT), ("teacher", example.TEACHER)):
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(config(role).dump())
    teacher = build_model(config(example.TEACHER))
    weights = tmp_path / "teacher.pth"
    torch.save({"model": teacher.state_dict()}, weights)
    options = ["--config", str(files["student"]), "--teacher-config", str(files["teacher"])]
    with pytest.raises(SystemExit, match="--teacher-weights"):
        example.main(options)
    output = tmp_path / "two"
    options += ["--teacher-weights", str(weights), "--output", str(output)]
    example.main([*options, "--opts", "SOLVER.MAX_ITER", "2"])
    assert logged(output)[0]["kd_foreground"] > 0
    assert (output / "model_final.pth").is_file()


def test_wrong_options():
    with pytest.raises(SystemExit, match="Give --config and --teacher-config, or neither"):
        example.main(["--config", "x.yaml"])
