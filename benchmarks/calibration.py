"""Calibration and prediction sets on real photo sets, nested: calibrators and thresholds learn from out-of-fold logits
inside the outer training folds.

    python benchmarks/calibration.py logits --data ../shared/data   # once; minutes a set
    # log loss, Brier, calibration error, temperature; probmetrics beside it where it is installed
    python benchmarks/calibration.py scalers
    # coverage and size at 90 %; MAPIE beside it where it is installed
    python benchmarks/calibration.py sets

`logits` trains a short list of candidates on two joins (--full: all of them, --quick: two models) and keeps what the
others need under --cache.
The outer folds are those of accuracy.py.
"""
import argparse
import dataclasses
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from novelty import load, nets, thin
from scipy.special import softmax
from scipy.stats import binom
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from amulet_hybrid.learn.calibration import (
    SCALERS,
    NoScaler,
    VectorScaler,
    calibrate_model,
    evaluate_calibration,
    log_proba,
)
from amulet_hybrid.learn.config import CALIBRATIONS, TrainingConfig
from amulet_hybrid.learn.conformal import METHODS, ConformalPredictor, evaluate_sets
from amulet_hybrid.learn.reliability import temperature_test
from amulet_hybrid.learn.trainer import HybridTrainer

warnings.filterwarnings('ignore', message='The groups parameter')


def save_logits(args):
    """Logits of the vote before its calibration: out of fold for each outer training part, and for the outer test part,
    as npz"""
    args.cache.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        blocks, labels, groups, encoders = load(args.data, name, args.preset, args.weights, args.cache)
        if args.most:
            some = thin(groups, labels, args.most)
            blocks = {b: X[some] for b, X in blocks.items()}
            labels = labels[some]
            groups = groups[some]
        y = np.unique(labels, return_inverse=True)[1]
        joins = [tuple(blocks), tuple(nets(blocks))]
        few = TrainingConfig(models=('logistic_balanced', 'lda_balanced') if args.quick else ('logistic_balanced',
                'svm', 'lda'), quick=args.quick, novelty=False)
        for seed in args.seeds:
            outer = (StratifiedGroupKFold if len(set(groups)) < len(groups) else StratifiedKFold)(5, shuffle=True,
                    random_state=seed)
            out = {'y': y, 'groups': np.unique(groups, return_inverse=True)[1]}
            for f, (train, test) in enumerate(outer.split(y, y, groups)):
                trainer = HybridTrainer(TrainingConfig(novelty=False) if args.full else few,
                                        None if args.full else joins)
                trainer.fit({k: v[train] for k, v in blocks.items()}, labels[train], groups[train], encoders)
                vote = np.sum([m.weight*trainer.oof_[m.candidate] for m in trainer.model_.members], axis=0)
                bare = dataclasses.replace(trainer.model_, calibrator=NoScaler().fit(log_proba(vote), y[train]))
                found = bare.predict_proba({k: v[test] for k, v in blocks.items()})
                out |= {f'tr{f}': train, f'te{f}': test, f'ztr{f}': log_proba(vote, 1e-300),
                        f'zte{f}': log_proba(found, 1e-300)}
                print(name, seed, f, flush=True)
            np.savez(args.cache/f'oof_{name}_{seed}.npz', **out)


def kept(args):
    "What `logits` kept: name, seed, labels, groups, and the folds as (train, test, logits, logits)"
    for name in args.sets:
        for seed in args.seeds:
            if (path := args.cache/f'oof_{name}_{seed}.npz').exists():
                z = np.load(path)
                yield name, seed, z['y'], z['groups'], [tuple(z[f'{k}{f}'] for k in ('tr', 'te', 'ztr', 'zte'))
                                                        for f in range(5)]
            else: print(f'{path} is missing: run `logits` first')


def rivals():
    "Name -> probabilities of new logits, by probmetrics"
    try:
        from probmetrics.calibrators import get_calibrator
    except ImportError: return {}

    def fitted(method):
        def run(logits, y, new):
            calibrator = get_calibrator(method)
            calibrator.fit(softmax(logits, axis=1), y)
            return np.asarray(calibrator.predict_proba(softmax(new, axis=1)))
        return run
    return {f'probmetrics {m}': fitted(m) for m in ('ts-mix', 'sms', 'svs')}


def scalers(args):
    "Each scaler, the chosen one, and rivals, on the outer test photos"
    rows = []
    for name, seed, y, groups, outer in kept(args):
        found, chosen = defaultdict(lambda shape=(len(y), y.max()+1): np.zeros(shape)), []
        for train, test, known, new in outer:
            for method, kind in SCALERS.items():
                fit = (known, y[train], groups[train]) if kind is VectorScaler else (known, y[train])
                found[method][test] = kind().fit(*fit).predict_proba(new)
            best = calibrate_model(known, y[train], groups[train])
            chosen.append(best.methods_.method[best.methods_.chosen].item())
            found['calibrate_model'][test] = best.predict_proba(new)
            as_trained = calibrate_model(known, y[train], groups[train], CALIBRATIONS, errors=0, sharpen=True)
            found['calibrate_model, as the trainer asks'][test] = as_trained.predict_proba(new)
            for method, run in rivals().items(): found[method][test] = run(known, y[train], new)
        for method, p in found.items():
            r = evaluate_calibration(p/p.sum(1, keepdims=True), y, groups)
            low, high = (r.figures[end]['rms_calibration_error'] for end in ('low', 'high'))
            asks = temperature_test(p/p.sum(1, keepdims=True), y, groups)
            rows.append({'set': name, 'seed': seed, 'method': method, **r.figures.value,
                         'rms_low': low, 'rms_high': high,
                         'temperature': asks.temperature, 'temperature_low': asks.low, 'temperature_high': asks.high})
        print(name, seed, 'chosen:', ', '.join(chosen), flush=True)
    return rows


class _Given(ClassifierMixin, BaseEstimator):
    "A classifier whose features are its probabilities, for MAPIE"
    def __init__(self, k=2): self.k, self.classes_, self.n_features_in_, self.is_fitted_ = k, np.arange(k), k, True
    def fit(self, X, y): return self
    def predict_proba(self, X): return np.asarray(X)
    def predict(self, X): return np.asarray(X).argmax(1)


def mapie_sets(known, y, new, asked):
    "Name -> sets, by MAPIE"
    try:
        from mapie.classification import SplitConformalClassifier
    except ImportError: return {}
    out = {}
    for score, last in (('lac', True), ('raps', True), ('raps', 'randomized')):
        rival = SplitConformalClassifier(_Given(known.shape[1]), confidence_level=asked, conformity_score=score,
                                         prefit=True, random_state=0)
        rival.conformalize(known, y)
        out[f'MAPIE {score}'+' randomised'*(last=='randomized')] = rival.predict_set(new,
                conformity_score_params={'include_last_label': last})[1][:, :, 0]
    return out


def sets(args):
    "Coverage and size on the outer test photos, by calibrated probabilities"
    rows = []
    for name, seed, y, groups, outer in kept(args):
        found = defaultdict(lambda shape=(len(y), y.max()+1): np.zeros(shape, bool))
        for train, test, known, new in outer:
            scaler = calibrate_model(known, y[train], groups[train])
            p, q = (x/x.sum(1, keepdims=True) for x in (scaler.cross_proba_, scaler.predict_proba(new)))
            ways = {f'{m}': {'method': m, 'never_empty': False} for m in METHODS}
            ways |= {'auto': {'never_empty': False}, 'auto, never empty': {},
                     'auto, a vote a photo, one threshold': {'never_empty': False, 'vote': 'photo',
                                                             'class_conditional': False},
                     'auto, a vote a group': {'never_empty': False, 'vote': 'group'},
                     'auto, a threshold a class': {'never_empty': False, 'class_conditional': True}}
            for way, settings in ways.items():
                found[way][test] = ConformalPredictor(coverage=args.coverage, **settings).fit(p, y[train],
                        groups[train]).predict_set(q)
            for rival, s in mapie_sets(p, y[train], q, args.coverage).items(): found[rival][test] = s
        plain = binom.ppf([.025, .975], len(y), args.coverage)/len(y)
        for way, s in found.items():
            r = evaluate_sets(s, y, groups, args.coverage, round(.8*len(set(groups))))
            by_group = np.bincount(groups, s[np.arange(len(y)), y])/np.bincount(groups)
            rows.append({'set': name, 'seed': seed, 'sets': way, 'coverage': r.coverage, 'by_group': by_group.mean(),
                         'band_low': r.band[0], 'band_high': r.band[1],
                         'binomial_low': plain[0], 'binomial_high': plain[1], 'mean_size': r.mean_size,
                         'empty': r.empty, 'verdict': r.verdict, 'worst_class': r.worst['coverage'],
                         'worst_low': r.worst['low'], 'worst_high': r.worst['high']})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['logits', 'scalers', 'sets'])
    parser.add_argument('--data', type=Path, default=Path('../shared/data'))
    parser.add_argument('--weights', default='auto')
    parser.add_argument('--preset', default='balanced', help='feature blocks')
    parser.add_argument('--sets', nargs='+', default=['amulet6', 'coins', 'magtile'])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='of the outer folds')
    parser.add_argument('--coverage', type=float, default=.9)
    parser.add_argument('--full', action='store_true', help='all candidates of the trainer, minutes a fold')
    parser.add_argument('--quick', action='store_true', help='two models, 3 inner folds')
    parser.add_argument('--most', type=int, default=0, help='photos of a class at most, whole groups; 0: all')
    parser.add_argument('--cache', type=Path, default=Path('.cache'))
    parser.add_argument('--output', type=Path, default=Path(__file__).parent/'results')
    args = parser.parse_args()
    if args.what=='logits': return save_logits(args)
    if not (rows := {'scalers': scalers, 'sets': sets}[args.what](args)): return None
    table = pd.DataFrame(rows).round(4)
    args.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output/f'calibration_{args.what}.csv', index=False)
    print(table.to_string(index=False))


if __name__ == '__main__': main()
