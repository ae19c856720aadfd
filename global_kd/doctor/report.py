"""What the doctor found, as tables and sentences."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Level:
    """A pair of levels.

    Attributes:
        stride: Pixels of the student's network input per cell.
        student: Shape ``(B, C, H, W)`` of the student's map.
        teacher: Of the teacher's, as it comes.
        student_path: The student's module that it is read from.
        teacher_path: Likewise.
        adapter: Its kind and its number of parameters.
        boxes: How many boxes of the batch are imitated here.
    """

    stride: float
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    student_path: str
    teacher_path: str
    adapter: str
    boxes: int


@dataclass(frozen=True)
class Term:
    """A term on this batch.

    Attributes:
        value: With its weight and schedule.
        share: In units of the detection loss, where that is known.
        gradient: Norm of its gradient on the student's parameters.
        pull: Norm of its gradient on the student's feature maps, in units of the detection loss's,
            where that is known: what :meth:`global_kd.Distiller.calibrate` sets.
        reached: For each child of the student: parameters with a gradient, and all of them.
    """

    value: float
    share: float | None
    gradient: float
    pull: float | None
    reached: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Report:
    """What :meth:`global_kd.Distiller.check` found; ``print`` shows it as tables.

    Attributes:
        levels: Finest first.
        terms: By name; ``"detection"`` is the student's own loss, where known.
        facts: Further findings, a sentence each.
        problems: What should be mended, each with the sentence that mends it.
        unchecked: What was not looked at, or could not be, each with what would tell.
    """

    levels: list[Level]
    terms: dict[str, Term]
    facts: list[str]
    problems: list[str]
    unchecked: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found to mend; what was not looked at is in :attr:`unchecked`."""
        return not self.problems

    def __str__(self) -> str:
        shown = [["stride", "student", "", "teacher", "", "adapter", "boxes"]]
        for x in self.levels:
            mine, theirs = ("x".join(map(str, shape)) for shape in (x.student, x.teacher))
            sides = [x.student_path, mine, x.teacher_path, theirs]
            shown.append([f"{x.stride:g}", *sides, x.adapter, str(x.boxes)])
        parts = [table(shown)]
        shown = [["term", "value", "/ detection", "gradient", "share on maps"]]
        for name, t in self.terms.items():
            share, pull = ("-" if x is None else f"{x:.3g}" for x in (t.share, t.pull))
            shown.append([name, f"{t.value:.4g}", share, f"{t.gradient:.3g}", pull])
        parts.append(table(shown))
        children = list(dict.fromkeys(c for t in self.terms.values() for c in t.reached))
        shown = [["gradient reaches", *self.terms]]
        for child in children:
            counts = [t.reached[child] for t in self.terms.values()]
            shown.append([child, *(f"{some}/{everything}" for some, everything in counts)])
        parts.append(table(shown))
        parts.append("\n".join(f"- {x}" for x in self.facts))
        parts.append("\n".join(f"! {x}" for x in self.problems) or "No problem found.")
        if self.unchecked:
            parts.append("\n".join(["Not checked:", *(f"? {x}" for x in self.unchecked)]))
        return "\n\n".join(parts)


def table(rows: list[list[str]]) -> str:
    """Rows as lines, columns aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
