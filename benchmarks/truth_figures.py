"""Figures and comparisons of a test: intervals of log loss, Brier score and balanced accuracy, the sentence on a
simpler model, and what a choice among many shows"""
from collections.abc import Callable

import numpy as np
from scipy.special import softmax
from truth import row

from amulet_hybrid.evaluate.metrics import evaluate_predictions, paired_difference
from amulet_hybrid.evaluate.rivals import rival_verdict
from amulet_hybrid.learn.candidates import Candidate
from amulet_hybrid.learn.choice import list_options
from amulet_hybrid.learn.fold_search import RepeatedPredictions

DEFAULT_REPEATS = 200


def sure_model(rng, photos, classes, distance, size=1):
    "Probabilities that are true, if photos of one group are independent; and the classes"
    groups = photos//size
    y = rng.integers(0, classes, photos)
    shift = np.repeat(rng.normal(size=(groups, 1)) if size > 1 else np.zeros((groups, 1)), size, axis=0)
    logits = rng.normal(size=(photos, classes))+(distance+shift)*np.eye(classes)[y]
    return softmax(distance*logits, axis=1), y


def losses(repeats, seed):
    "Does the interval of the log loss hold that of 100,000 photos?"
    out = []
    for photos, classes, distance, size, before in ((34, 2, 2.8, 1, .64), (50, 6, 4., 10, .74), (150, 6, 3., 1, .905)):
        p, y = sure_model(np.random.default_rng([seed, 10**6]), 100_000, classes, distance, size)
        truth = {'log_loss': -np.log(p[np.arange(len(y)), y]).mean(),
                 'brier': ((p-np.eye(classes)[y])**2).sum(1).mean()}
        hits = dict.fromkeys(truth, 0)
        for r in range(repeats):
            p, y = sure_model(np.random.default_rng([seed, r]), photos, classes, distance, size)
            m = evaluate_predictions(y, p, range(classes), np.arange(photos)//size, n_boot=400, seed=r)
            for name in truth: hits[name] += truth[name] in m.interval(name)
        case = f'{photos} photos in {photos//size} groups' if size > 1 else f'{photos} photos'
        out += [row(3, case, f'coverage of {name}', .95, before if name == 'log_loss' else None, hits[name]/repeats,
                    repeats) for name in truth]
    return out


def rare_classes(repeats, seed):
    "Does the interval of balanced accuracy hold the truth where classes are unequal?"
    out = []
    for sizes, right in (((100, 30, 8, 5), (.95, .9, .7, .6)), ((100, 30, 8, 5), (.9,)*4), ((20, 8, 3, 3), (.8,)*4),
                         ((30, 30, 30, 30), (.85,)*4)):
        y, hits = np.repeat(np.arange(4), sizes), 0
        for r in range(repeats):
            rng = np.random.default_rng([seed, r])
            called = np.where(rng.random(len(y)) < np.array(right)[y], y, (y+rng.integers(1, 4, len(y))) % 4)
            m = evaluate_predictions(y, np.eye(4)[called], 'abcd', n_boot=400, seed=r)
            hits += np.mean(right) in m.interval('balanced_accuracy')
        before = None if len(set(sizes)) == 1 else .885
        out.append(row(4, f'classes of {sizes}, right on {right}', 'coverage of balanced accuracy', .95, before,
                       hits/repeats, repeats))
    return out


def simpler_model(repeats, seed):
    "How often is a simpler model, truly .076 worse, said to do as well?"
    out = []
    for photos, before in ((34, .82), (150, None)):
        said = []
        for r in range(repeats):
            rng = np.random.default_rng([seed, r])
            y, ours = np.arange(photos) % 3, rng.random(photos) < .9
            theirs = np.where(ours, rng.random(photos) < .86, rng.random(photos) < .5)
            first, second = (np.eye(3)[np.where(right, y, (y+1) % 3)] for right in (ours, theirs))
            said.append(rival_verdict('cnn', paired_difference(y, first, second, n_boot=400, seed=r)))
        out.append(row(1, f'{photos} photos, the join truly .076 better', 'share of "the simpler one alone would do"',
                       'at most .025', before, np.mean(['would do' in s for s in said]), repeats))
    return out


def chosen_among_many(repeats, seed):
    "What is shown of the best of forty models that know nothing?"
    shown = {'as chosen': [], 'chosen on other folds': []}
    for r in range(repeats//4):
        rng = np.random.default_rng([seed, r])
        y, photo = rng.integers(0, 3, 100), np.arange(100)
        oof = {Candidate((f'block {i}',), 'logistic_balanced'): softmax(rng.normal(size=(100, 3)), axis=1)
               for i in range(40)}
        options = list_options(RepeatedPredictions(oof, {}, y, photo, photo % 5), lambda candidates: 1.)
        best = next(o for o in options if len(o.weights) == 1)
        shown['as chosen'].append(np.mean(oof[next(iter(best.weights))].argmax(1) == y))
        shown['chosen on other folds'].append(np.mean(best.proba.argmax(1) == y))
    return [row(7, 'pure noise, 100 photos of 3 classes, 40 models', 'accuracy shown of the best', .333, .435,
                np.mean(shown['chosen on other folds']), repeats//4)]


CASES: dict[str, Callable[[int, int], list[dict]]] = {
    'simpler model': simpler_model, 'log loss and Brier': losses, 'rare classes': rare_classes,
    'chosen among many': chosen_among_many}
