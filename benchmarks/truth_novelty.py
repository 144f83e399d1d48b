"""What is said of photos of no known class, simulated with known truth: the share of known photos that are refused, and
what is far away, or of a class that was never shown

    python benchmarks/truth.py novelty

Photos are rows of 120 features whose spreads fall from 1 to .09, in three classes whose means are as far apart as
photos of one class vary; in groups of five, half of the variance is shared by the group. New photos are of new groups.
`before` is what the code did when the threshold came from five folds, with as many axes as each fit found, and its
detectors of two classes looked at angles only.
"""
from collections.abc import Callable

import numpy as np
import pandas as pd

from amulet_hybrid.learn.ood_selection import NoveltyConfig, select_detector
from amulet_hybrid.learn.ood_spaces import NoveltyCandidate, novelty_candidates

DEFAULT_REPEATS = 12
STANDING = novelty_candidates(['features'])[0]
MAHALANOBIS = NoveltyCandidate('Mahalanobis', (('features', 'mahalanobis'),))
SPREADS = np.arange(1, 121)**-.5
# (photos, photos a group) -> share of known photos refused before, by the standing choice and by Mahalanobis
BEFORE = {(60, 1): (.072, .460), (140, 1): (.046, .340), (300, 1): (.069, .116), (100, 5): (.022, .301)}


def draw(rng, means: np.ndarray, n: int, size: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Rows, classes and groups of `n` photos"
    group = np.repeat(np.arange(n//size), size)
    shared = .5 if size > 1 else 0.
    own, common = rng.normal(size=(n, len(SPREADS))), rng.normal(size=(n//size, len(SPREADS)))
    y = group % len(means)
    return means[y]+SPREADS*(np.sqrt(shared)*common[group]+np.sqrt(1-shared)*own), y.astype(str), group.astype(str)


def class_means(rng, k: int) -> np.ndarray:
    return SPREADS*rng.normal(size=(k, len(SPREADS)))


def false_alarms(repeats: int, seed: int) -> list[dict]:
    "Share of new photos of known classes that are called novel, at a stated 5 %"
    rows = []
    for (n, size), before in BEFORE.items():
        for candidate, then in zip((STANDING, MAHALANOBIS), before):
            found = []
            for r in range(repeats):
                rng = np.random.default_rng([seed, r, n, size])
                means = class_means(rng, 3)
                detector = select_detector(*draw(rng, means, n, size), NoveltyConfig(seed=r), candidates=[candidate])
                found.append(detector.is_novel(draw(rng, means, 600, size)[0]).mean())
            photos = f'{n} photos' if size == 1 else f'{n//size} groups of {size}'
            name = 'standing choice' if candidate is STANDING else candidate.name
            rows.append({'point': 8, 'case': f'{photos}, {name}',
                         'figure': 'known photos refused', 'promised': .05, 'before': then,
                         'measured': float(np.mean(found)), 'repeats': repeats})
    return rows


def far_rows(repeats: int, seed: int) -> list[dict]:
    "A table with two classes: rows whose every number is a million, and rows 20 spreads away along one column"
    found = []
    for r in range(repeats):
        rng = np.random.default_rng([seed, r])
        values, y = rng.normal(size=(120, 4)), np.repeat(['a', 'b'], 60)
        values[60:, 0] += 4
        detector = select_detector(values, y, config=NoveltyConfig(seed=r))
        asked = {'every feature at 1e6': np.full((1, 4), 1e6), 'every feature at -1e6': np.full((1, 4), -1e6),
                 'one feature at 20 spreads': np.vstack([20*np.eye(4), -20*np.eye(4)])}
        found.append({name: detector.is_novel(X).mean() for name, X in asked.items()})
    then = {'every feature at 1e6': .083, 'every feature at -1e6': .167, 'one feature at 20 spreads': .031}
    return [{'point': 8, 'case': f'table of two classes, {name}', 'figure': 'rows refused', 'promised': 1.,
             'before': then[name], 'measured': float(value), 'repeats': repeats}
            for name, value in pd.DataFrame(found).mean().items()]


def third_class(repeats: int, seed: int) -> list[dict]:
    "Two classes, and a third that is the first overdone; how much is noticed nobody knows beforehand, and it says so"
    found, said = [], []
    for r in range(repeats):
        rng = np.random.default_rng([seed, r])
        means = class_means(rng, 2)
        beyond = means.mean(0)+5*(means[:1]-means.mean(0)) # what makes the first class the first, five times
        X, y, groups = draw(rng, means, 100)
        detector = select_detector(X, y, groups, NoveltyConfig(seed=r))
        found.append(detector.is_novel(draw(rng, beyond, 200)[0]).mean())
        said.append('not known' in detector.note)
    row = {'point': 8, 'case': 'two classes of 50 photos, a third beyond the first', 'repeats': repeats}
    return [{**row, 'figure': 'photos of the third refused', 'promised': 'most', 'before': .0,
             'measured': float(np.mean(found))},
            {**row, 'figure': 'says that it was not tried', 'promised': 1., 'before': 0.,
             'measured': float(np.mean(said))}]


CASES: dict[str, Callable[[int, int], list[dict]]] = {
    'novelty: false alarms': false_alarms, 'novelty: far rows': far_rows, 'novelty: a third class': third_class}
