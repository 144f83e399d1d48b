"""Calibration and prediction sets where the truth is known: does what the report says of them hold?

    python benchmarks/truth.py calibration

Probabilities are drawn first and labels from them, so a model that is right about its doubts, and one that is twice too
sure, are known to be so. Photos of a group are right or wrong together.
"""
from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import softmax

from amulet_hybrid.evaluate.metrics import evaluate_predictions
from amulet_hybrid.learn.calibration import bin_numbers, evaluate_calibration
from amulet_hybrid.learn.conformal import ConformalPredictor, evaluate_sets
from amulet_hybrid.learn.reliability import reliability, temperature_test

DEFAULT_REPEATS = 150
SIZES = ((34, 1), (68, 1), (150, 1), (34, 4), (80, 4)) # photos, and photos a group


def drawn(rng: np.random.Generator, n: int, each: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Honest probabilities of six classes, labels and groups; photos of a group are alike, and right or wrong together"
    groups = np.arange(n)//each
    own, shared = rng.normal(0, 4, (2, n, 6))
    p = softmax(own if each==1 else (own+shared[groups])/2**.5, axis=1)
    place = (rng.random((n, 1))[groups] > np.sort(p, axis=1)[:, ::-1].cumsum(1)[:, :-1]).sum(1)
    return p, np.argsort(-p, axis=1)[np.arange(n), place], groups


def tests(repeats: int, seed: int, n: int, each: int) -> Iterator[tuple[np.ndarray, ...]]:
    "Honest probabilities, the same twice too sure, labels and groups of many tests"
    rng = np.random.default_rng([seed, n, each])
    for _ in range(repeats):
        p, y, groups = drawn(rng, n, each)
        yield p, softmax(2*np.log(p), axis=1), y, groups


def size_words(n: int, each: int) -> str: return f'{n} photos' + (f' in groups of {each}' if each > 1 else '')


def temperature(repeats: int, seed: int) -> list[dict]:
    "Does the likelihood-ratio test find a model that is twice too sure, and leave an honest one alone?"
    before = {(34, 1): .03, (68, 1): .03, (150, 1): .10}
    rows = []
    for n, each in SIZES:
        seen = []
        for p, sure, y, groups in tests(repeats, seed, n, each):
            honest, found = temperature_test(p, y, groups), temperature_test(sure, y, groups)
            seen.append((honest.asks, found.asks, found.low <= 2 <= found.high))
        for figure, promised, then, value in zip(
                ('honest model called wrong', 'twice too sure found', 'interval holds the temperature'),
                ('at most 0.05', {34: .71, 68: .94, 150: 1.}.get(n) if each==1 else 'much', .95),
                (None, before.get((n, each)), None), np.mean(seen, axis=0), strict=True):
            rows.append({'point': 2, 'case': size_words(n, each), 'figure': figure, 'promised': promised,
                         'before': then, 'measured': value, 'repeats': repeats})
    return rows


def true_error(n: int, seed: int) -> float:
    "Root mean square error of confidence, by as many bins, of the model that is twice too sure, in the long run"
    p, y, _ = drawn(np.random.default_rng(seed), 100_000, 1)
    top = softmax(2*np.log(p), axis=1).max(1)
    bins = bin_numbers(top, int(np.clip(n//10, 1, 15)))
    gap = np.bincount(bins, top-p.max(1))/np.bincount(bins)
    return float(np.sqrt((np.bincount(bins)*gap**2).sum()/len(y)))


def error_and_skill(repeats: int, seed: int) -> list[dict]:
    "Is the calibration error below what is shown? Does the interval of the skill hold the true one?"
    p = drawn(np.random.default_rng(seed), 200_000, 1)[0]
    skill = 1 + (p*np.log(p)).sum(1).mean()/np.log(6)
    rows = []
    for n, each in ((34, 1), (150, 1), (80, 4)):
        error, seen = true_error(n, seed), []
        for p, sure, y, groups in tests(repeats, seed, n, each):
            x = evaluate_calibration(sure, y, groups, n_boot=200).figures.loc['rms_calibration_error']
            own = evaluate_predictions(y, p, list('abcdef'), groups, 200).interval('log_loss_skill')
            seen.append((x['high'] > error, skill in own))
        for figure, promised, value in zip(('calibration error is below the upper end', 'interval holds the skill'),
                                           (.975, .95), np.mean(seen, axis=0), strict=True):
            rows.append({'point': 2, 'case': size_words(n, each), 'figure': figure, 'promised': promised,
                         'before': None, 'measured': value, 'repeats': repeats})
    return rows


def bands(repeats: int, seed: int) -> list[dict]:
    "How often a dot of the reliability diagram is in its band, of an honest model"
    rows = []
    for n, each in ((150, 1), (80, 4)):
        seen = []
        for p, _, y, groups in tests(max(20, repeats//2), seed, n, each):
            t = reliability(p, y, groups=groups)
            seen += ((t.band_low <= t.accuracy) & (t.accuracy <= t.band_high)).tolist()
        rows.append({'point': 2, 'case': size_words(n, each), 'figure': 'dot in its consistency band', 'promised': .95,
                     'before': None, 'measured': np.mean(seen), 'repeats': max(20, repeats//2)})
    return rows


def shared_luck(rng: np.random.Generator, n_groups: int) -> tuple[np.ndarray, ...]:
    "Probabilities of four classes, labels and groups of eight photos that are all easy or all hard"
    hard = np.repeat(rng.normal(0, 1.5, n_groups), 8)
    y, z = rng.integers(0, 4, len(hard)), rng.normal(0, 1, (len(hard), 4))
    z[np.arange(len(y)), y] += 2+hard
    return softmax(2*z, axis=1), y, np.arange(len(y))//8


def rare_class(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    "Probabilities of six classes and labels; the last class is rare and hard"
    y, z = rng.choice(6, n, p=[.3, .2, .2, .14, .1, .06]), rng.normal(0, 1, (n, 6))
    z[np.arange(n), y] += np.array([4, 3, 3, 2.5, 2.5, 1])[y]
    return softmax(1.5*z, axis=1), y


BEFORE = {'vote': 'photo', 'class_conditional': False} # what the predictor did of itself
WAYS = {'before': BEFORE, 'measured': {}}


def set_rows(case: str, figures: dict[str, str], found: dict[str, np.ndarray], repeats: int) -> list[dict]:
    "Rows of figures that were measured the old way and the new"
    return [{'point': 5, 'case': case, 'figure': figure, 'promised': promised, 'repeats': repeats,
             **{way: values[i] for way, values in found.items()}}
            for i, (figure, promised) in enumerate(figures.items())]


def few_groups(repeats: int, seed: int) -> list[dict]:
    "Coverage and length of sets whose thresholds come from few groups"
    rows = []
    for n_groups in (5, 10, 20, 40):
        found = {}
        for way, settings in WAYS.items():
            rng, seen = np.random.default_rng([seed, n_groups]), []
            for _ in range(repeats):
                known, (p, y, _) = shared_luck(rng, n_groups), shared_luck(rng, 100)
                sets = ConformalPredictor('lac', **settings).fit(*known).predict_set(p)
                seen.append((sets[np.arange(len(y)), y].mean(), sets.sum(1).mean()))
            found[way] = np.mean(seen, axis=0)
        rows += set_rows(f'thresholds by {n_groups} groups of 8', {'coverage': .9, 'names a list': 'few'}, found,
                         repeats)
    return rows


def rare(repeats: int, seed: int) -> list[dict]:
    "Coverage of a rare class, and what it costs"
    rows = []
    for n in (60, 150, 400):
        found = {}
        for way, settings in WAYS.items():
            rng, seen = np.random.default_rng([seed, n]), []
            for _ in range(repeats):
                predictor = ConformalPredictor('lac', **settings).fit(*rare_class(rng, n))
                p, y = rare_class(rng, 1000)
                report = predictor.evaluate(p, y)
                seen.append((report.per_class.coverage[5], report.coverage, report.mean_size))
            found[way] = np.mean(seen, axis=0)
        rows += set_rows(f'thresholds by {n} photos', {'coverage of a class of 6 %': 'near 0.9', 'coverage': .9,
                                                      'names a list': 'few'}, found, repeats)
    return rows


def verdicts(repeats: int, seed: int) -> list[dict]:
    "What is said of sets that hold the class of 79.4 % of photos, and of 90 %, where 90 % were promised"
    rows = []
    for n_groups, each in ((34, 1), (150, 1), (20, 4), (50, 3)):
        for truth, wrong in ((.794, 'kept'), (.9, 'not_kept')):
            rng, said, band = np.random.default_rng([seed, n_groups]), [], []
            for _ in range(repeats):
                hit = np.repeat(rng.random(n_groups) < truth, each)
                y, groups = np.zeros(len(hit), int), np.arange(len(hit))//each
                report = evaluate_sets(np.c_[hit, ~hit], y, groups, .9, n_groups)
                said.append(report.verdict==wrong)
                band.append((report.coverage >= report.band[0])==(wrong=='kept'))
            rows.append({'point': 5, 'case': f'{size_words(n_groups*each, each)}, truly {truth:.1%}',
                         'figure': f'called {wrong.replace("_", " ")}', 'promised': 'at most 0.025',
                         'before': np.mean(band), 'measured': np.mean(said), 'repeats': repeats})
    return rows


CASES: dict[str, Callable[[int, int], list[dict]]] = {
    'temperature': temperature, 'error and skill': error_and_skill, 'consistency bands': bands,
    'sets of few groups': few_groups, 'sets of a rare class': rare, 'verdict on sets': verdicts}
