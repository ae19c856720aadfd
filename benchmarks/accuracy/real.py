"""The experiments on real pictures: `--data bccd` and the others.

1. What helps: the defaults beside equal time, each term, the paper's weights.
4. The relation term where features know classes (`neighbours.py` measures that first).
5. Omega, the teacher's confidence or no weights, also on wrong labels.
2. Every method at equal tuning: three shares of the detection gradient on pictures held out of
   training, one seed; the best share then on the reporting split.
3. The same methods with global knowledge beside them.
6. What can be left out: smaller adapters, a smaller teacher, every second step, levels.
7. When it pays: few pictures, longer trainings, warm starts, a teacher from ImageNet weights.
8. Whether weights by their pull serve dense heads, too.

Trainings are short, since two cores are all there is: one-cycle rates over 300 iterations (playing
cards: 600) of 8 pictures at 160 px, students from random weights where nothing else is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from global_kd import PAPER
from workshop.small_detectors import SIZES, Size

from .declaration import CLASSES, Arm, Method, Others, Pictures, Table, Trial
from .dense import Dense
from .equal_tuning import BEYOND, METHODS, EqualTuning
from .pretrained import Pretrained

# Of nine of ten boxes and of most of each class the shorter side is longer than `min_side` px;
# boxes up to twice `finest_scale` px lie on the finest level.
SIZES_OF: Mapping[str, Mapping[str, float]] = {
    "bccd": {"min_side": 8.0, "finest_scale": 16.0},
    "cards": {"min_side": 8.0, "finest_scale": 16.0},
    "deeppcb": {"min_side": 5.0, "finest_scale": 16.0},
}
ITERATIONS, TEACHING, TUNED_TEACHING = 300, 800, 400
# Cards are harder: students take longer, and a teacher from random weights is no better than they.
ITERATIONS_OF = {"cards": 600}
IMAGENET = Pretrained()
TEACHER_OF: Mapping[str, Size | Pretrained] = {"cards": IMAGENET}
IMAGENET_RATE = 1e-3  # highest learning rate of what starts from ImageNet weights
# At which methods are compared untuned. On blood smears that was chosen before anything was
# measured; 1.0 is what most methods did best at there.
USUAL_SHARE, USUAL_SHARE_OF = 1.0, {"bccd": 0.3}
# A step with a teacher in units of one without (`steps`), where it is far from 1.5.
EQUAL_TIME = {"cards": 2.3}
# Five seeds where a training takes less than two minutes.
SEEDS_OF = {"bccd": 5}

# The share that did best on the tuning split (`q2-tuning`), by data set.
BEST: Mapping[str, Mapping[str, float]] = {
    "bccd": {
        "defaults": 1.0,
        "pkd": 1.0,
        "fgd": 0.3,
        "frs": 1.0,
        "cwd": 1.0,
        "mgd": 0.1,
        "crosskd": 1.0,
        "bckd": 0.1,
    }
}


@dataclasses.dataclass(frozen=True)
class Real:
    """The tables of one data set."""

    source: str

    @property
    def seeds(self) -> int:
        """Of every table, where nothing else is said."""
        return SEEDS_OF.get(self.source, 3)

    @property
    def usual_share(self) -> float:
        """Of the detection gradient, for methods that are not tuned."""
        return USUAL_SHARE_OF.get(self.source, USUAL_SHARE)

    @property
    def iterations(self) -> int:
        """Of a student."""
        return ITERATIONS_OF.get(self.source, ITERATIONS)

    def teacher(
        self, held_out: bool = False, size: Size | Pretrained | Dense | None = None, **data: Any
    ) -> Trial:
        """Larger than the students, and trained longer, on the pictures that they see."""
        size = size or TEACHER_OF.get(self.source, SIZES["small-teacher"])
        trial = Trial(
            Pictures(self.source, held_out=held_out, **data),
            size,
            iterations=TUNED_TEACHING if held_out else TEACHING,
            batch_size=8,
            split="teaching",
        )
        if isinstance(size, Pretrained):
            trial = dataclasses.replace(trial, lr=IMAGENET_RATE)
        return trial

    def student(self, held_out: bool = False, **data: Any) -> Trial:
        """Trained from random weights without distillation."""
        return Trial(
            Pictures(self.source, held_out=held_out, **data),
            iterations=self.iterations,
            batch_size=8,
            split="tuning" if held_out else "reporting",
        )

    def taught(self, base: Trial, how: Method | Others, teacher: Trial | None = None) -> Trial:
        """The same with distillation."""
        teacher = teacher or self.teacher(held_out=base.split == "tuning")
        return dataclasses.replace(base, method=how, teacher=teacher)

    def longer(self, base: Trial, times: float = 1.5) -> Trial:
        """So many times the iterations; 1.5 is about equal time on blood smears (`steps`)."""
        return dataclasses.replace(base, iterations=round(times * base.iterations))

    def method(self, **how: Any) -> Method:
        """The library's defaults, but for these settings and the sizes of the data."""
        settings: dict[str, Any] = {"relation": 0.0, "levels": "assigned", "refresh_every": 25}
        settings |= SIZES_OF[self.source]
        return Method(**(settings | how))

    def question_1(self) -> list[Table]:
        """What helps, in small tables, the first of them what two cores answer with three seeds."""
        base = self.student()
        longer = self.longer(base)
        alone = {"foreground": 0.0, "background": 0.0, "relation": 0.0, "logits": 0.0}
        core = (Arm("none", base, ()), Arm("defaults", self.taught(base, self.method())))
        tables: dict[str, tuple[str, int, dict[str, dict[str, Any]]]] = {
            "q1-terms": (
                "Terms and weights",
                2,
                {
                    "soft labels": alone | {"logits": 5.0},
                    "imitation": alone | {"foreground": 2.0, "background": 1.0},
                    "the paper's": {**PAPER},
                },
            ),
            "q4-relation": (
                "The relation term where the teacher's space knows classes",
                2,
                {
                    "defaults + relation in the RoI embedding": {
                        "relation": 15.0,
                        "space": "embedding",
                    },
                    "defaults + relation": {"relation": 5.0},
                    "relation": alone | {"relation": 5.0},
                },
            ),
            "q5-weights": (
                "What instances weigh: omega (defaults), nothing, the teacher's confidence",
                2,
                {
                    "defaults, weights by confidence": {"weights": "confidence"},
                    "defaults, no omega": {"robust": False},
                },
            ),
        }
        share = Arm(
            "defaults, 3", self.taught(base, self.equal_tuning("q1").at_share("defaults", BEYOND))
        )
        alone_longer = [Arm("none, 1.5 times as long", longer, ("none", "defaults", "defaults, 3"))]
        if (times := EQUAL_TIME.get(self.source)) is not None:
            name = f"none, {times:g} times as long"
            longest = self.longer(base, times)
            alone_longer.append(Arm(name, longest, ("none", "defaults", "defaults, 3")))
        return [
            Table(
                f"{self.source}-q1-time",
                "Alone, with the defaults, and alone for longer",
                1,
                (*core, share, *alone_longer),
            ),
            *(
                Table(
                    f"{self.source}-{key}",
                    title,
                    rank,
                    (
                        *core,
                        *(
                            Arm(name, self.taught(base, self.method(**how)), ("none", "defaults"))
                            for name, how in kinds.items()
                        ),
                    ),
                )
                for key, (title, rank, kinds) in tables.items()
            ),
            self.equal_tuning("q1-shares").shares("How hard the defaults pull", 2),
            self._mislabelled(),
        ]

    def _mislabelled(self) -> Table:
        """Question 5 on wrong labels, from a teacher that knew better."""
        base = self.student(wrong_labels=0.3)
        arms = [Arm("none", base, ())]
        for name, how in (
            ("omega", {}),
            ("nothing", {"robust": False}),
            ("confidence", {"weights": "confidence"}),
        ):
            against = ("none",) if name == "omega" else ("none", "omega")
            arms.append(Arm(name, self.taught(base, self.method(**how)), against))
        title = "The same with 30 % wrong labels"
        return Table(f"{self.source}-q5-labels", title, 3, tuple(arms))

    def question_2(self) -> list[Table]:
        """Methods untuned at one share, tuned on the tuning split, and at the best share there.

        Each also with global knowledge beside it (question 3).
        """
        usual, names = self.usual_share, ("defaults", *METHODS)
        shares = dict.fromkeys(names, usual)
        alone, joined = self._methods("share", f"at a share of {usual:g}", 3, shares, seeds=3)
        tables = [alone] if self.source in BEST else [alone, joined]  # tuned ones are joined below
        title = "Every method at three shares of the detection gradient (tuning split)"
        tables.append(self.equal_tuning("q2-tuning", held_out=True).tuning(title, 5))
        if best := BEST.get(self.source):
            tables += self._methods("methods", "at its best share", 6, best, seeds=self.seeds)
        return tables

    def equal_tuning(self, key: str, held_out: bool = False) -> EqualTuning:
        """What tables of every method share."""
        base, teacher = self.student(held_out), self.teacher(held_out)
        return EqualTuning(f"{self.source}-{key}", base, teacher, self.method())

    def _methods(
        self, key: str, how_strong: str, rank: int, shares: Mapping[str, float], seeds: int
    ) -> list[Table]:
        title = f"Every method {how_strong}"
        alone, joined = self.equal_tuning(f"q2-{key}"), self.equal_tuning(f"q3-{key}")
        return [
            alone.alone(title, rank, shares, seeds),
            joined.joined(f"{title} with global knowledge", rank + 1, shares, seeds),
        ]

    def question_6(self) -> list[Table]:
        """What can be left out; the table with the steps' times says what that saves."""
        base, small = self.student(), self.teacher(size=SIZES["small-student"])
        one_level = Others("pkd", self.usual_share, options=(("levels", (8.0,)),))
        against = ("none", "defaults")
        arms = (
            Arm("none", base, ()),
            Arm("defaults", self.taught(base, self.method())),
            Arm("1x1 adapters", self.taught(base, self.method(adapter="conv1x1")), against),
            Arm("every second step", self.taught(base, self.method(every=2)), against),
            Arm("teacher of the student's size", self.taught(base, self.method(), small), against),
            Arm("pkd", self.taught(base, Others("pkd", self.usual_share))),
            Arm("pkd, stride 8 only", self.taught(base, one_level), ("none", "pkd")),
        )
        return [Table(f"{self.source}-q6-less", "What can be left out", 4, arms)]

    def question_7(self) -> list[Table]:
        """When it pays."""
        few, late = self.student(share=0.25), self.student()
        late = dataclasses.replace(late, iterations=4 * late.iterations)
        warm = dataclasses.replace(
            self.student(), iterations=self.iterations // 2, lr=1e-3, start=self.student()
        )
        tables = []
        for key, title, rank, base in (
            ("few", "A quarter of the pictures", 4, few),
            ("warm", "A trained student goes on for half as many iterations", 5, warm),
            ("long", "Four times as many iterations", 7, late),
        ):
            arms = [Arm("none", base, ()), Arm("defaults", self.taught(base, self.method()))]
            arms.append(Arm("none, 1.5 times as long", self.longer(base), ("none", "defaults")))
            if key == "few":
                other = self.teacher(share=0.25)
                taught = self.taught(base, self.method(), other)
                arms.append(Arm("defaults, teacher of the same few", taught, ("none", "defaults")))
            tables.append(Table(f"{self.source}-q7-{key}", title, rank, tuple(arms)))
        if self.source not in TEACHER_OF:
            base, better = self.student(), self.teacher(size=IMAGENET)
            arms = [Arm("none", base, ()), Arm("defaults", self.taught(base, self.method()))]
            for name, how in (("defaults", {}), ("the paper's", {**PAPER})):
                taught = self.taught(base, self.method(**how), better)
                arms.append(Arm(f"{name}, ImageNet teacher", taught, ("none", "defaults")))
            title = "A teacher from ImageNet weights"
            tables.append(Table(f"{self.source}-q7-imagenet", title, 4, tuple(arms)))
        return tables

    def question_8(self) -> list[Table]:
        """FCOS from FCOS."""
        base = dataclasses.replace(self.student(), student=Dense(SIZES["small-student"]))
        teacher = self.teacher(size=Dense(SIZES["small-teacher"]))

        def table(key: str, title: str, rank: int, shares: Mapping[str, float]) -> Table:
            name = f"{self.source}-{key}"
            how = EqualTuning(name, base, teacher, self.method())
            return how.alone(title, rank, shares, seeds=3)

        against = ("none", "defaults", "defaults, 3")
        longer = Arm("none, 1.5 times as long", self.longer(base), against)
        title = "FCOS: the defaults at two strengths"
        strengths = table("q8-dense", title, 3, {"defaults": BEYOND})
        shares = dict.fromkeys(("frs", "crosskd", "bckd"), USUAL_SHARE)
        others = table("q8-dense-methods", "FCOS: methods for dense heads", 6, shares)
        published = [
            Arm(
                f"{name}, published weights",
                dataclasses.replace(base, method=Others(name), teacher=teacher),
                ("none", "defaults", f"{name}, {share:g}"),
            )
            for name, share in shares.items()
        ]
        return [
            dataclasses.replace(strengths, arms=(*strengths.arms, longer)),
            dataclasses.replace(others, arms=(*others.arms, *published)),
        ]

    def tables(self) -> list[Table]:
        """All of them, by question."""
        questions = (
            self.question_1,
            self.question_2,
            self.question_6,
            self.question_7,
            self.question_8,
        )
        return [
            dataclasses.replace(table, seeds=min(table.seeds, self.seeds))
            for question in questions
            for table in question()
        ]


REAL = {source: Real(source).tables() for source in CLASSES}
