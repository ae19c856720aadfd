import torch

from global_kd import Distiller, GlobalKnowledgeLoss
from global_kd.losses.imitation import LARGEST
from workshop.detectors import SHIPPED_TEACHER, build_detector
from workshop.digit_scenes import SceneSettings, make_scenes


def test_a_fresh_student_is_far_below_the_largest_standardised_term():
    """Where a floor of the variance would act, published numbers would have changed with it."""
    scenes = make_scenes("train", SceneSettings(train=8, validation=1))
    images, targets = zip(*(scenes[i] for i in range(8)))
    teacher = build_detector("small-teacher", 11, weights=str(SHIPPED_TEACHER))
    torch.manual_seed(0)
    student = build_detector("small-student", 11).train()
    loss = GlobalKnowledgeLoss(11, foreground=1, background=1, logits=0, refresh_every=None)
    kd = Distiller(student, teacher, loss)
    student(list(images), list(targets))
    terms = kd(list(images), list(targets))
    assert all(0 < term < LARGEST / 10 for term in terms.values())
