"""Brute-force definitions in float64, plain loops over cells, boxes, candidates and pairs.

They are written from the equations, never from the code under test. Slow on purpose: a line here
should read like the sentence that it stands for.

Names: a *row* is the pooled feature of one instance, `u` its unit vector (zero stays zero).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


def array(values) -> np.ndarray:
    """Anything (a tensor of any dtype, a list) as a float64 array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def indices(values) -> list[int]:
    return [int(v) for v in (values.tolist() if hasattr(values, "tolist") else values)]


# --- cells ----------------------------------------------------------------------------------


def covered(low: float, high: float, stride: float, size: int) -> range:
    """The cells of one axis that the interval [low, high] covers; never empty, always in range."""
    start_coordinate = min(max(low / stride, 0.0), float(size))
    stop_coordinate = min(max(high / stride, 0.0), float(size))
    start = min(math.floor(start_coordinate), size - 1)
    return range(start, max(math.ceil(stop_coordinate), start + 1))


def cells(box, stride: float, height: int, width: int) -> list[tuple[int, int]]:
    x1, y1, x2, y2 = (float(v) for v in box)
    rows, columns = covered(y1, y2, stride, height), covered(x1, x2, stride, width)
    return [(y, x) for y in rows for x in columns]


def pool_boxes(features, boxes, image_index, stride: float) -> np.ndarray:
    features, boxes, image_index = array(features), array(boxes), indices(image_index)
    _, channels, height, width = features.shape
    pooled = np.zeros((len(image_index), channels))
    for r, image in enumerate(image_index):
        covering = cells(boxes[r], stride, height, width)
        for y, x in covering:
            pooled[r] += features[image, :, y, x]
        pooled[r] /= len(covering)
    return pooled


# --- prototypes -----------------------------------------------------------------------------


def unit(row: np.ndarray) -> np.ndarray:
    norm = math.sqrt(sum(v * v for v in row))
    return row / norm if norm > 0 else np.zeros_like(row)


def units(rows) -> np.ndarray:
    rows = array(rows)
    return np.array([unit(row) for row in rows]).reshape(rows.shape)


def density(rows, bandwidth: float = 0.1) -> np.ndarray:
    u = units(rows)
    rho = np.zeros(len(u))
    for i in range(len(u)):
        for j in range(len(u)):
            rho[i] += math.exp(-(((1.0 - float(u[i] @ u[j])) / bandwidth) ** 2))
    return rho


def density_candidates(student, teacher, bandwidth: float = 0.1, quantile: float = 0.4):
    """(candidates, doubt): doubt is true where rounding alone could move a row over a cut."""
    rho_s, rho_t = density(student, bandwidth), density(teacher, bandwidth)
    n = len(rho_s)
    if n == 0:
        return [], False
    rank = math.floor(quantile * n)
    cut_s, cut_t = sorted(rho_s)[rank], sorted(rho_t)[rank]
    chosen = [i for i in range(n) if rho_s[i] > cut_s and rho_t[i] > cut_t]
    doubt = near(rho_s, cut_s) > 1 or near(rho_t, cut_t) > 1
    if not chosen:
        total = rho_s + rho_t
        order = sorted(range(n), key=lambda i: (-total[i], i))
        chosen = sorted(order[: math.ceil((1.0 - quantile) * n)])
        doubt = doubt or near(total, min(total[chosen])) > 1
    return chosen, doubt


def near(values: np.ndarray, cut: float) -> int:
    return sum(math.isclose(v, cut, rel_tol=1e-9) for v in values)


class Step(NamedTuple):
    """One pick of the pursuit: the objective that each candidate would leave behind."""

    errors: dict[int, float]  # candidate -> squared error of all rows in both spaces, plus the tie
    total: float  # the squared error before the pick, the scale for "equal"
    pick: int


class Pursuit:
    """Dual-space matching pursuit with explicit residuals.

    At every step each candidate k is tried: every row i gets the pair (w_s, w_t) that minimises
    |r_s - w_s p_s|^2 + |r_t - w_t p_t|^2 + alpha (w_s - w_t)^2, a 2x2 linear system, and the
    candidate that leaves the least total is the best pick.
    """

    def __init__(self, student, teacher, alpha: float = 10.0, candidates=None, unique=True):
        self.p_s, self.p_t = units(student), units(teacher)
        self.r_s, self.r_t = self.p_s.copy(), self.p_t.copy()
        self.alpha, self.unique = alpha, unique
        pool = range(len(self.p_s)) if candidates is None else indices(candidates)
        self.open = [k for k in pool if self.p_s[k].any() and self.p_t[k].any()]

    def coefficients(self, k: int) -> np.ndarray:
        p_s, p_t, alpha = self.p_s[k], self.p_t[k], self.alpha
        system = np.array([[p_s @ p_s + alpha, -alpha], [-alpha, p_t @ p_t + alpha]])
        return np.linalg.solve(system, np.stack([self.r_s @ p_s, self.r_t @ p_t]))

    def residuals(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        w = self.coefficients(k)
        return self.r_s - np.outer(w[0], self.p_s[k]), self.r_t - np.outer(w[1], self.p_t[k]), w

    def error(self, k: int) -> float:
        left_s, left_t, w = self.residuals(k)
        tie = self.alpha * ((w[0] - w[1]) ** 2).sum()
        return float((left_s**2).sum() + (left_t**2).sum() + tie)

    def errors(self) -> dict[int, float]:
        return {k: self.error(k) for k in self.open}

    def total(self) -> float:
        return float((self.r_s**2).sum() + (self.r_t**2).sum())

    def take(self, k: int) -> None:
        self.r_s, self.r_t, _ = self.residuals(k)
        if self.unique:
            self.open = [j for j in self.open if j != k]


def select_prototypes(student, teacher, num=10, alpha=10.0, candidates=None, unique=True):
    """Every step of the greedy solution; ties within rounding go to the lowest index."""
    pursuit = Pursuit(student, teacher, alpha, candidates, unique)
    steps = []
    for _ in range(num):
        if not pursuit.open:
            break
        errors, total = pursuit.errors(), pursuit.total()
        least = min(errors.values())
        pick = min(k for k, e in errors.items() if e <= least + 1e-10 * max(total, 1e-300))
        steps.append(Step(errors, total, pick))
        pursuit.take(pick)
    return steps


# --- robust weights and relation ---------------------------------------------------------------


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(unit(a) @ unit(b))


def robust_weights(
    student, teacher, student_prototypes, teacher_prototypes, prototype_labels, labels
) -> np.ndarray:
    """One level: 1 - |best same-class cosine of the student - the same of the teacher|, clamped."""
    student, teacher = array(student), array(teacher)
    student_prototypes, teacher_prototypes = array(student_prototypes), array(teacher_prototypes)
    prototype_labels, labels = indices(prototype_labels), indices(labels)
    weights = np.ones(len(labels))
    for n, label in enumerate(labels):
        own = [k for k, c in enumerate(prototype_labels) if c == label and c != -1]
        if own:
            best_s = max(cosine(student[n], student_prototypes[k]) for k in own)
            best_t = max(cosine(teacher[n], teacher_prototypes[k]) for k in own)
            weights[n] = min(max(1.0 - abs(best_s - best_t), 0.0), 1.0)
    return weights


def smooth_l1(difference: float, beta: float) -> float:
    size = abs(difference)
    return 0.5 * size * size / beta if size < beta else size - 0.5 * beta


def relation_loss(
    student, teacher, student_prototypes, teacher_prototypes, weights=None, pairs=None, beta=1.0
) -> float:
    """One level: the mean over counted (row, prototype) pairs."""
    student, teacher = array(student), array(teacher)
    student_prototypes, teacher_prototypes = array(student_prototypes), array(teacher_prototypes)
    values = []
    for n in range(len(student)):
        weight = 1.0 if weights is None else float(weights[n])
        for k in range(len(student_prototypes)):
            if pairs is None or bool(pairs[n][k]):
                q_s = cosine(student[n], student_prototypes[k])
                q_t = cosine(teacher[n], teacher_prototypes[k])
                values.append(smooth_l1(weight * q_s - weight * q_t, beta))
    return sum(values) / len(values) if values else 0.0


# --- imitation -------------------------------------------------------------------------------


def masks(shape, boxes, image_index, stride, weights=None) -> tuple[np.ndarray, np.ndarray]:
    """(member, weight): is the cell in any box, and the largest weight of the boxes over it."""
    batch, _, height, width = shape
    member, weight = np.zeros((batch, height, width)), np.zeros((batch, height, width))
    boxes = array(boxes)
    for r, image in enumerate(indices(image_index)):
        for y, x in cells(boxes[r], stride, height, width):
            member[image, y, x] = 1.0
            value = 1.0 if weights is None else float(weights[r])
            weight[image, y, x] = max(weight[image, y, x], value)
    return member, weight


def imitation_loss(
    student,
    teacher,
    boxes,
    image_index,
    stride,
    weights=None,
    foreground=1.0,
    background=4.0,
    normalizer="weights",
) -> tuple[float, float]:
    student, teacher = array(student), array(teacher)
    batch, channels, height, width = student.shape
    member, weight = masks(student.shape, boxes, image_index, stride, weights)
    fg = bg = 0.0
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                squared = float(((student[b, :, y, x] - teacher[b, :, y, x]) ** 2).sum())
                fg += weight[b, y, x] * squared
                bg += (1.0 - member[b, y, x]) * squared
    counted = weight if normalizer == "weights" else member
    fg *= foreground / max(1.0, 2.0 * channels * float(counted.sum()))
    bg *= background / max(1.0, 2.0 * channels * float((1.0 - member).sum()))
    return fg, bg


# --- logits ------------------------------------------------------------------------------------


def log_softmax(row: np.ndarray) -> np.ndarray:
    top = row.max()
    return row - top - math.log(sum(math.exp(v - top) for v in row))


def log_sigmoid(value: float) -> float:
    return min(value, 0.0) - math.log1p(math.exp(-abs(value)))


def logit_loss(
    student, teacher, weights=None, temperature=2.0, activation="softmax", class_reduction="mean"
) -> float:
    student, teacher = array(student) / temperature, array(teacher) / temperature
    rows, classes = student.shape
    total = 0.0
    for n in range(rows):
        divergence = 0.0
        if activation == "softmax":
            log_s, log_t = log_softmax(student[n]), log_softmax(teacher[n])
            for k in range(classes):
                divergence += math.exp(log_t[k]) * (log_t[k] - log_s[k])
        else:
            for k in range(classes):
                s, t = float(student[n, k]), float(teacher[n, k])
                for sign in (1.0, -1.0):  # the class is there, the class is not there
                    divergence += math.exp(log_sigmoid(sign * t)) * (
                        log_sigmoid(sign * t) - log_sigmoid(sign * s)
                    )
        if class_reduction == "mean":
            divergence /= classes
        total += (1.0 if weights is None else float(weights[n])) * temperature**2 * divergence
    return total / rows if rows else 0.0


# --- derivatives -------------------------------------------------------------------------------


def slope(function, values, step: float = 1e-5) -> np.ndarray:
    """Central finite differences of a scalar function of one array."""
    values = array(values)
    gradient = np.zeros_like(values)
    for place in np.ndindex(*values.shape):
        up, down = values.copy(), values.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient
