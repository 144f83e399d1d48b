"""Simulations with known truth: cross-validated intervals, the study of augmentation, labels, rare classes, ROC-AUC.

    python benchmarks/truth.py studies
"""
from collections.abc import Callable

import numpy as np
from truth import row

from amulet_hybrid.augment.ablation import BASELINE, _verdicts, class_differences
from amulet_hybrid.data.split import folds
from amulet_hybrid.evaluate.intervals import Interval
from amulet_hybrid.evaluate.label_issues import find_label_issues, undoubted_sample, wrong_labels
from amulet_hybrid.evaluate.learning_curve import cross_validated, learning_curve
from amulet_hybrid.evaluate.metrics import evaluate_predictions

DEFAULT_REPEATS = 60


def _photos(centres, n, per, rng):
    "Photos of three classes in things of `per` photos each"
    y = np.repeat(np.arange(n//per) % 3, per)
    things = np.repeat(rng.normal(size=(n//per, centres.shape[1])), per, axis=0)
    return centres[y]+things*(.7 if per > 1 else 1)+(per > 1)*.7*rng.normal(size=things.shape), y, np.arange(n)//per


def _ridge(X, y, Z):
    "Scores of a linear classifier"
    mean, spread, truth = X.mean(0), X.std(0)+1e-9, np.eye(3)[y]
    A = (X-mean)/spread
    w = np.linalg.solve(A.T@A+3*np.eye(A.shape[1]), A.T@(truth-truth.mean(0)))
    return (Z-mean)/spread@w+truth.mean(0)


def cross_validation(repeats: int, seed: int) -> list[dict]:
    "Balanced accuracy in three grouped folds, against that of models that learned from other sets of the same size"
    out = []
    centres = .55*np.random.default_rng(0).normal(size=(3, 12))
    for n, per, before in ((36, 1, .78), (150, 3, .86)):
        rng = np.random.default_rng([seed, n])
        new, kind, _ = _photos(centres, 6000, per, rng)
        size = n*2//3//per//3*per*3
        truth = np.mean([(_ridge(*_photos(centres, size, per, rng)[:2], new).argmax(1) == kind).mean()
                         for _ in range(60)])
        curves, nested = [], []
        for i in range(repeats):
            X, y, groups = _photos(centres, n, per, rng)
            def fit_predict(a, b, X=X, y=y): return _ridge(X[a], y[a], X[b])
            curve = learning_curve(fit_predict, y, groups, [1.], 3, 1, n_boot=200, seed=i)
            curves.append(curve.table.low.iloc[-1] <= truth <= curve.table.high.iloc[-1])
            fold = folds(y, groups, 3, i)
            p = np.zeros((n, 3))
            for f in range(3): p[fold == f] = np.eye(3)[_ridge(X[fold != f], y[fold != f], X[fold == f]).argmax(1)]
            seen = evaluate_predictions(y, p, 'abc', groups, 200).interval('balanced_accuracy')
            nested.append(truth in cross_validated(seen))
        case = f'{n} photos, {n//per} groups, 3 folds'
        out += [row(10, case, 'learning curve covers the truth', .95, before, np.mean(curves), repeats),
                row(10, case, 'nested figure covers the truth', .95, None, np.mean(nested), repeats)]
    return out


def augmentation(repeats: int, seed: int) -> list[dict]:
    "Seven treatments that change nothing but by chance"
    rng, n, found = np.random.default_rng(seed), 100, []
    y = np.repeat([0, 1, 2], [50, 33, 17])
    def called(): return np.where(rng.random(n) < .8, y, (y+rng.integers(1, 3, n)) % 3)
    for i in range(repeats):
        common = called()
        proba = {name: np.eye(3)[np.where(rng.random(n) < .1, called(), common)]
                 for name in (BASELINE, *(f'arm {a}' for a in range(7)))}
        choice, harm = _verdicts(y, proba, np.arange(n), i)
        found.append((bool(harm), choice != BASELINE))
    harm, helped = np.mean(found, axis=0)
    same = np.eye(3)[y]
    width = min(d.high-d.low for d in class_differences(y, same, same, np.arange(n), 200))
    return [row(10, '7 arms of chance, 100 photos', 'studies that say "does harm"', 'at most .05', .16, harm, repeats),
            row(10, '7 arms of chance, 100 photos', 'studies that say "helps"', 'at most .05', None, helped, repeats),
            row(10, 'two models that agree everywhere', 'least width of a class difference', 'above 0', 0, width, 1)]


def label_advice(repeats: int, seed: int) -> list[dict]:
    "400 labels of which a twentieth is wrong and doubted, and an eighth is wrong in a way that the model shares"
    rng, found, n = np.random.default_rng(seed), [], 400
    for i in range(repeats):
        true = np.arange(n) % 4
        learned = np.where((true == 3) & (np.arange(n) % 8 == 3), 0, true)  # half of a class sits in another folder
        given = np.where(rng.random(n) < .05, (learned+rng.integers(1, 4, n)) % 4, learned)
        p = .1+.6*np.eye(4)[learned]+.05*rng.random((n, 4))
        issues = find_label_issues(given.astype(str), p/p.sum(1, keepdims=True), list('0123'))
        sample = undoubted_sample(issues, seed=i)
        bad = np.flatnonzero(given != true)
        looked = set(sample.row) | set(issues.row[issues.suspect])
        share = len(bad)/n
        estimate = wrong_labels(issues, sample, [row for row in bad if row in looked])
        found.append((issues.suspect.mean()/share, share in estimate, np.isin(sample.row, bad).any()))
    doubted, covers, shows = np.mean(found, axis=0)
    case = 'half of a class in another folder'
    return [row(11, case, 'doubted for each wrong label', None, None, doubted, repeats),
            row(11, case, 'samples of 20 undoubted that show a wrong one', None, 0, shows, repeats),
            row(11, case, 'wrong share in its interval', .95, None, covers, repeats)]


def rare_class(repeats: int, seed: int) -> list[dict]:
    "Two photos of one class among 90: how many folds the others get, and whether every model knows all classes"
    y = np.repeat([0, 1, 2], [45, 43, 2])
    many = [folds(y, np.arange(90), 5, seed+i) for i in range(max(5, repeats//10))]
    known = np.mean([all(len(np.unique(y[f != k])) == 3 for k in range(f.max()+1)) for f in many])
    case = '90 photos, two of the rarest class'
    return [row(11, case, 'folds for the others', 5, 2, np.mean([f.max()+1 for f in many]), len(many)),
            row(11, case, 'draws whose models all know every class', 1, 1, known, len(many))]


def roc_auc(repeats: int, seed: int) -> list[dict]:
    "Probabilities from normal scores, 4 photos a thing, four classes of unequal size"
    rng, sizes = np.random.default_rng(seed), np.array([24, 16, 12, 8])
    def test(many):
        groups = np.repeat(np.arange(sizes.sum()*many), 4)
        y = np.repeat(np.repeat(np.arange(4), sizes*many), 4)
        z = 1.1*np.eye(4)[y]+.8*rng.normal(size=(groups.max()+1, 4))[groups]+.6*rng.normal(size=(len(y), 4))
        return y, np.exp(2*z)/np.exp(2*z).sum(1, keepdims=True), groups
    truth = evaluate_predictions(*test(40)[:2], 'abcd', n_boot=20).interval('roc_auc').value
    covered = []
    for _ in range(repeats):
        y, p, groups = test(1)
        covered.append(truth in evaluate_predictions(y, p, 'abcd', groups, 300).interval('roc_auc'))
    perfect: Interval = evaluate_predictions(np.arange(34) % 2, np.eye(2)[np.arange(34) % 2], 'ab').interval('roc_auc')
    case = '60 groups of 4 photos, 4 classes'
    return [row(12, case, 'ROC-AUC in its interval', .95, None, np.mean(covered), repeats),
            row(12, '34 photos, all in order', 'lower end of ROC-AUC', 'below 1', None, perfect.low, 1)]


CASES: dict[str, Callable[[int, int], list[dict]]] = {
    'cross_validation': cross_validation, 'augmentation': augmentation, 'label_advice': label_advice,
    'rare_class': rare_class, 'roc_auc': roc_auc}
