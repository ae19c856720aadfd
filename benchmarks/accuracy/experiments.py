"""The experiments: a table for every question, an arm for every row.

Six questions, in the order in which they are worth the time:

1. Each term alone and all pairs, with and without omega.
2. What makes the relation term work, if anything does.
3. Does omega do its work where labels, boxes or pixels are wrong.
4. Teacher size, number of prototypes, alpha, levels: curves, not points.
5. Can a student surpass its teacher.
6. Every method at equal tuning, alone and with global knowledge beside it.

`REDUCED` is what two cores train in a day, its first ranks in an afternoon. `FULL`, whose tables
are called `full-...`, is for a GPU.

Questions 2 and 6 choose among many arms, so they are asked on the tuning split; what wins there is
declared here once more, on the reporting split, before it is believed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from global_kd import PAPER
from workshop.small_detectors import SIZES, Size

from ..digits.disturbances import Disturbance
from .declaration import SEEDS_PER_SPLIT, Arm, Data, Method, Table, Trial
from .equal_tuning import EqualTuning

TEACHER = Trial(student=SIZES["small-teacher"], iterations=2000, split="teaching")  # shipped
STUDENT = Trial()

FULL_METHOD = Method()
NOTHING = dataclasses.replace(FULL_METHOD, foreground=0, background=0, relation=0, logits=0)
IMITATION = {"foreground": FULL_METHOD.foreground, "background": FULL_METHOD.background}
RELATION = {"relation": FULL_METHOD.relation}
LOGITS = {"logits": FULL_METHOD.logits}
TERMS: dict[str, dict[str, float]] = {
    "imitation": IMITATION,
    "soft labels": LOGITS,
    "relation": RELATION,
    "imitation + soft labels": IMITATION | LOGITS,
    "imitation + relation": IMITATION | RELATION,
    "soft labels + relation": LOGITS | RELATION,
    "all": IMITATION | LOGITS | RELATION,
}
LIBRARY: dict[str, Any] = {"levels": "assigned", "relation": 0.0}  # instead of what was tuned
FEW = ("imitation", "soft labels", "relation", "imitation + soft labels", "all")

# The share that did best in `q6-tuning`, by the prefix of a scale.
BEST: Mapping[str, Mapping[str, float]] = {
    "": {
        "defaults": 1.0,
        "pkd": 0.1,
        "fgd": 1.0,
        "frs": 1.0,
        "cwd": 0.3,
        "mgd": 1.0,
        "crosskd": 1.0,
        "bckd": 0.1,
    }
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How long trainings are, and how often they renew their prototypes, in iterations.

    `cold` from random weights, `explore` the same in question 2, where the arms are many; `warm`
    from a student that was trained for `start`. `few` are the terms where all would be too many.
    """

    prefix: str = ""
    cold: int = 500
    explore: int = 300
    start: int = 1000
    warm: int = 300
    refresh_every: int = 25
    lengths: tuple[int, ...] = (500, 1000, 2000, 4000)
    few: tuple[str, ...] = ("imitation + soft labels",)
    seeds: int = 3

    def student(self, **how: Any) -> Trial:
        """Trained from random weights."""
        return dataclasses.replace(STUDENT, **({"iterations": self.cold} | how))

    def continued(self, start: Trial | None = None, **how: Any) -> Trial:
        """Going on from a student that was trained without distillation, on clean scenes."""
        start = start or dataclasses.replace(STUDENT, split=how.get("split", "reporting"))
        start = dataclasses.replace(start, iterations=self.start)
        return dataclasses.replace(
            STUDENT, iterations=self.warm, lr=1.5e-3, start=start, student=start.student, **how
        )

    def method(self, terms: str, **settings: Any) -> Method:
        """The method with the weights of `TERMS` and no others."""
        return dataclasses.replace(
            NOTHING, **({"refresh_every": self.refresh_every} | TERMS[terms] | settings)
        )

    # --- arms ----------------------------------------------------------------------------------

    def terms(self, base: Trial, names: tuple[str, ...]) -> tuple[Arm, ...]:
        """No distillation, each set of terms, and each without omega beside it."""
        arms = [Arm("none", base, ())]
        for name in names:
            arms.append(Arm(name, taught(base, self.method(name))))
            without = taught(base, self.method(name, robust=False))
            arms.append(Arm(f"{name}, no omega", without, ("none", name)))
        return tuple(arms)

    def defaults(self, base: Trial) -> tuple[Arm, ...]:
        """Weights as tuned (`STUDIED`), the library's and the paper's, and steps between them.

        The library's are the tuned ones without the relation term and on the level of a box's
        size, as in the paper.
        """
        paper = dict(PAPER)
        sets: dict[str, dict[str, Any]] = {
            "tuned": {},
            "tuned, no relation": {"relation": 0.0},
            "tuned, no relation, no omega": {"relation": 0.0, "robust": False},
            "the library's": LIBRARY,
            "the library's, relation 5": {"levels": "assigned"},
            "the paper's": paper,
            "the paper's, relation 5": paper | {"relation": 5.0},
            "the paper's, no relation": paper | {"relation": 0.0},
            "the paper's, no relation, standardized": paper
            | {"relation": 0.0, "standardize": True},
        }
        arms = [Arm("none", base, ())]
        for name, how in sets.items():
            against = ("none", *({"tuned", "the library's"} - {name}))
            arms.append(Arm(name, taught(base, self.method("all", **how)), tuple(sorted(against))))
        return tuple(arms)

    def equal_time(self, base: Trial, trials: Mapping[str, Trial]) -> tuple[Arm, ...]:
        """Each beside no distillation for as many iterations as take the same time."""
        arms = [Arm("none", base, ())]
        for name, trial in trials.items():
            longer = f"none, time of {name}"
            arms.append(Arm(longer, dataclasses.replace(base, time_of=trial), ()))
            arms.append(Arm(name, trial, ("none", longer)))
        return tuple(arms)

    def by_terms(self, base: Trial, names: tuple[str, ...]) -> dict[str, Trial]:
        """A trial with each set of terms."""
        return {name: taught(base, self.method(name)) for name in names}

    def growing(
        self, base: Trial, names: tuple[str, ...], lengths: tuple[int, ...]
    ) -> tuple[Arm, ...]:
        """Longer and longer trainings: where doubling adds nothing, students are trained out.

        A step with distillation takes less than twice as long, so half as many are held against
        those without it, too.
        """
        arms = []
        for number in lengths:
            longer = dataclasses.replace(base, iterations=number)
            plain = f"none, {number}"
            against = (plain, f"none, {2 * number}") if 2 * number in lengths else (plain,)
            arms.append(Arm(plain, longer, (), "none", number))
            for name in names:
                trial = taught(longer, self.method(name))
                arms.append(Arm(f"{name}, {number}", trial, against, name, number))
        return tuple(arms)

    def disturbed(self, names: tuple[str, ...], **shares: Any) -> tuple[Arm, ...]:
        """Terms with and without omega on disturbed scenes, and the same on clean ones.

        The teacher saw clean scenes; what an arm loses is its difference to itself on clean ones.
        """
        data = Data(disturbance=Disturbance(**shares))
        clean = self.terms(self.student(), names)
        rough = self.terms(self.student(data=data), names)
        return (
            *(dataclasses.replace(a, name=f"clean: {a.name}", against=()) for a in clean),
            *(dataclasses.replace(a, against=(*a.against, f"clean: {a.name}")) for a in rough),
        )

    def misled(self, names: tuple[str, ...], **shares: Any) -> tuple[Arm, ...]:
        """Terms on disturbed scenes, from a teacher that saw the same disturbance or none."""
        data = Data(disturbance=Disturbance(**shares))
        base = self.student(data=data)
        misled = dataclasses.replace(TEACHER, data=data)
        arms = [Arm("none", base, ())]
        for name in names:
            right, wrong = f"{name}, clean teacher", f"{name}, misled teacher"
            without = taught(base, self.method(name, robust=False), misled)
            arms += (
                Arm(right, taught(base, self.method(name))),
                Arm(wrong, taught(base, self.method(name), misled), ("none", right)),
                Arm(f"{wrong}, no omega", without, ("none", wrong)),
            )
        return tuple(arms)

    def curve(self, points: dict[float, Trial], base: Trial, usual: float) -> tuple[Arm, ...]:
        """All terms along one setting, against no distillation and the usual point."""
        arms = (
            Arm(f"{x:g}", t, ("none", f"{usual:g}") if x != usual else ("none",), "all", x)
            for x, t in points.items()
        )
        return Arm("none", base, ()), *arms

    def settings(self, base: Trial, key: str, values: tuple[Any, ...]) -> dict[float, Trial]:
        """All terms with each of these values of one setting."""
        return {value: taught(base, self.method("all", **{key: value})) for value in values}

    def against_teacher(self, base: Trial, own: Trial) -> tuple[Arm, ...]:
        """Students whose teacher has their size, or the usual one."""
        teachers = {"a teacher of its size": own, "the usual teacher": TEACHER}
        return (
            Arm("none", base, ()),
            *(
                Arm(f"{name} from {whose}", taught(base, self.method(name), teacher))
                for whose, teacher in teachers.items()
                for name in ("imitation + soft labels", "all")
                if whose == "a teacher of its size" or own.student != TEACHER.student
            ),
        )

    # --- the questions -------------------------------------------------------------------------

    def question_1(self) -> list[Table]:
        few_scenes = {
            25: self.student(data=Data(share=0.25)),
            5: self.student(data=Data(share=0.05)),
        }
        warm, cold = self.continued(), self.student()
        library = self.method("all", **LIBRARY)
        light = dataclasses.replace(library, adapter="conv1x1")
        small = dataclasses.replace(TEACHER, student=STUDENT.student)
        return [
            self._table(
                "q1-defaults", "Sets of weights, from random weights", 2, self.defaults(cold)
            ),
            self._table("q1-warm", "Terms, warm start", 5, self.terms(warm, tuple(TERMS))),
            self._table("q1-cold", "Terms, from random weights", 1, self.terms(cold, tuple(TERMS))),
            self._table(
                "q1-length",
                "Students trained longer and longer",
                6,
                self.growing(cold, self.few, self.lengths),
                "iterations",
            ),
            self._table(
                "q1-5-length",
                "Students trained longer and longer on 5 % of the scenes",
                4,
                self.growing(few_scenes[5], self.few, self.lengths[:-1]),
                "iterations",
            ),
            self._table(
                "q1-warm-time",
                "Equal time, warm start",
                7,
                self.equal_time(warm, self.by_terms(warm, self.few)),
            ),
            self._table(
                "q1-time",
                "Equal time, from random weights",
                4,
                self.equal_time(cold, self.by_terms(cold, FEW)),
            ),
            self._table(
                "q1-small-time",
                "Equal time, the library's weights and a teacher of the student's size",
                4,
                self.equal_time(
                    cold,
                    {
                        "the library's": taught(cold, library, small),
                        "the library's, 1x1 adapters": taught(cold, light, small),
                    },
                ),
            ),
            *(
                self._table(
                    f"q1-{share}", f"{share} % of the scenes", 6, self.terms(base, self.few)
                )
                for share, base in few_scenes.items()
            ),
        ]

    def question_2(self) -> list[Table]:
        titles = {
            "alone": "The relation term alone",
            "beside": "The relation term beside the soft labels",
        }
        return [
            self._table(
                f"q2-{start}-{key}",
                f"{titles[key]}, {how} (tuning split)",
                rank + (key == "beside"),
                arms,
            )
            for start, how, rank, base in (
                (
                    "cold",
                    "from random weights",
                    2,
                    self.student(split="tuning", iterations=self.explore),
                ),
                ("warm", "warm start", 8, self.continued(split="tuning")),
            )
            for key, arms in self._relations(base).items()
        ] + [
            self._table(
                "q2-confirmed",
                "What won on the tuning split, from random weights",
                3,
                self._confirmed(self.student()),
            )
        ]

    def _confirmed(self, base: Trial) -> tuple[Arm, ...]:
        """The two best of `relations`, alone and beside the library's other terms."""
        switches = self.relations()
        library = self.method("all", **LIBRARY)
        arms = [Arm("none", base, ()), Arm("the library's", taught(base, library))]
        for name in ("embedding, softened", "prototypes of the last batch"):
            how = switches[name]
            arms.append(Arm(name, taught(base, self.method("relation", **how))))
            whole = self.method("all", levels="assigned", **how)
            arms.append(
                Arm(f"the library's + {name}", taught(base, whole), ("none", "the library's"))
            )
        return tuple(arms)

    def _relations(self, base: Trial) -> dict[str, tuple[Arm, ...]]:
        """The switches of the relation term, one at a time, "alone" and "beside" soft labels."""
        none, first = Arm("none", base, ()), "as in question 1"
        alone = [none]
        beside = [none, Arm("soft labels", taught(base, self.method("soft labels")))]
        for name, how in self.relations().items():
            trial = taught(base, self.method("relation", **how))
            alone.append(Arm(name, trial, ("none",) if name == first else ("none", first)))
            trial = taught(base, self.method("soft labels + relation", **how))
            beside.append(Arm(name, trial, ("soft labels",)))
        return {"alone": tuple(alone), "beside": tuple(beside)}

    def relations(self) -> dict[str, dict[str, Any]]:
        """What the relation term is asked to do, by name.

        Weights of other forms and spaces are such that the gradient that reaches the backbone is
        about as large as that of question 1 (`python -m benchmarks.accuracy gradients`).
        """
        # Of no use where there is no second epoch.
        passes = {"prototypes of 1000 images, every epoch": {"prototype_images": 1000}}
        return {
            "as in question 1": {},
            **(passes if self.prefix else {}),
            "weight 0.5": {"relation": 0.5},
            "weight 25": {"relation": 25.0},
            "prototypes of the last batch": {"refresh_every": 1},
            "prototypes renewed four times less often": {"refresh_every": 4 * self.refresh_every},
            "ground-truth boxes": {"boxes": "ground_truth"},
            "own class": {"own_class": True},
            "centred": {"center": True, "relation": 2.0},
            "projection coefficients": {"form": "projection", "relation": 1.0},
            "softened similarities": {"form": "softened", "relation": 0.3},
            "3x3 grid": {"space": "grid", "relation": 10.0},
            "embedding of the RoI head": {"space": "embedding", "relation": 15.0},
            "embedding, own class": {"space": "embedding", "own_class": True, "relation": 10.0},
            "embedding, softened": {"space": "embedding", "form": "softened", "relation": 0.2},
            "random prototypes": {"pick": "random"},
            "k-means prototypes": {"pick": "kmeans"},
            "class means": {"pick": "means"},
        }

    def question_3(self) -> list[Table]:
        kinds: dict[str, tuple[str, int, dict[str, Any]]] = {
            "labels-30": ("30 % wrong labels", 2, {"labels": 0.3}),
            "boxes": ("30 % loose boxes", 5, {"boxes": 0.3}),
            "blur": ("30 % blurred digits", 6, {"blur": 0.3}),
            "occlusion": ("30 % half covered digits", 6, {"occlusion": 0.3}),
            "labels-15": ("15 % wrong labels", 7, {"labels": 0.15}),
            "labels-5": ("5 % wrong labels", 7, {"labels": 0.05}),
        }
        each = tuple(dict.fromkeys(("imitation", "soft labels", *self.few)))  # no name twice
        return [
            self._table(
                f"q3-{key}",
                f"{title}, from random weights",
                rank,
                self.disturbed(each if key == "labels-30" else self.few, **shares),
            )
            for key, (title, rank, shares) in kinds.items()
        ] + [
            self._table(
                "q3-misled",
                "30 % wrong labels, for the teacher, too",
                3,
                self.misled(self.few, labels=0.3),
            )
        ]

    def question_4(self) -> list[Table]:
        base = self.student()
        teachers = {
            x: taught(base, self.method("all"), dataclasses.replace(TEACHER, student=size))
            for x, size in TEACHERS.items()
        }
        assigned = taught(base, self.method("all", levels="assigned"))
        levels = (
            Arm("none", base, ()),
            Arm("all levels", taught(base, self.method("all"))),
            Arm("assigned level", assigned, ("none", "all levels")),
        )
        curves = {
            "teacher": (
                "Size of the teacher",
                7,
                "million parameters of the teacher",
                teachers,
                1.18,
            ),
            "prototypes": (
                "Number of prototypes",
                6,
                "prototypes of a level and class",
                self.settings(base, "num_prototypes", (1, 3, 10, 30)),
                10,
            ),
            "alpha": (
                "alpha of the pursuit",
                6,
                "alpha",
                self.settings(base, "alpha", (0.1, 1.0, 10.0, 100.0)),
                10,
            ),
        }
        return [
            *(
                self._table(f"q4-{key}", title, rank, self.curve(points, base, usual), axis)
                for key, (title, rank, axis, points, usual) in curves.items()
            ),
            self._table("q4-levels", "Levels on which a box is foreground", 6, levels),
        ]

    def question_5(self) -> list[Table]:
        tables = []
        for key, title, name, rank in (
            ("self", "A teacher of the student's size", "small-student", 4),
            ("as-large", "A student as large as its teacher", "small-teacher", 8),
        ):
            start = dataclasses.replace(STUDENT, student=SIZES[name])
            base = self.continued(start)
            length = 2000 if name == "small-teacher" else self.start
            own = dataclasses.replace(start, split="teaching", iterations=length)
            tables.append(self._table(f"q5-{key}", title, rank, self.against_teacher(base, own)))
        return tables

    def question_6(self) -> list[Table]:
        """The share that did best on the tuning split is trained on the reporting split."""
        tuned = self.equal_tuning(
            "q6-tuning", self.student(split="tuning", iterations=self.explore)
        )
        title = "Every method at three shares of the detection gradient (tuning split)"
        tables = [tuned.tuning(title, 3)]
        shares = self.equal_tuning("q6-shares", self.student())
        tables.append(shares.shares("How hard the library's defaults pull", 4, self.seeds))
        if best := BEST.get(self.prefix):
            title = "Every method at its best share"
            alone = self.equal_tuning("q6-methods", self.student())
            joined = self.equal_tuning("q6-joined", self.student())
            table = alone.alone(title, 4, best, self.seeds)
            tables.append(dataclasses.replace(table, arms=(*table.arms, alone.control())))
            title += ", with and without global knowledge"
            tables.append(joined.joined(title, 5, best, self.seeds))
        return tables

    def equal_tuning(self, name: str, base: Trial) -> EqualTuning:
        """What tables of every method share."""
        library = self.method("all", **LIBRARY)
        return EqualTuning(self.prefix + name, base, TEACHER, library)

    def _table(
        self, name: str, title: str, rank: int, arms: tuple[Arm, ...], axis: str = ""
    ) -> Table:
        return Table(self.prefix + name, title, rank, arms, axis, self.seeds)

    def tables(self) -> list[Table]:
        """All of them, by question."""
        return [
            *self.question_1(),
            *self.question_2(),
            *self.question_3(),
            *self.question_4(),
            *self.question_5(),
            *self.question_6(),
        ]


def taught(trial: Trial, how: Method, teacher: Trial = TEACHER) -> Trial:
    """The same trial with distillation."""
    return dataclasses.replace(trial, method=how, teacher=teacher)


BETWEEN = Size(widths=(16, 24, 48, 96), blocks=1)
LARGER = Size(widths=(32, 64, 128, 256), blocks=2, head=128)
TEACHERS = {  # by millions of parameters
    0.33: SIZES["small-student"],
    0.49: BETWEEN,
    1.18: SIZES["small-teacher"],
    3.25: LARGER,
}

REDUCED = Scale()
FULL = Scale("full-", cold=2000, explore=1000, start=4000, warm=2000, refresh_every=100,
             lengths=(500, 1000, 2000, 4000, 8000), few=FEW, seeds=SEEDS_PER_SPLIT)  # fmt: skip
GRIDS = {"reduced": REDUCED.tables(), "full": FULL.tables()}
