"""How well strangers are told from known photos, on real photo sets; everything that learns or chooses does so without
them

    AMULET_WEIGHTS=../shared/weights python benchmarks/novelty.py --data ../shared/data --preset balanced \\
        [--ood-python PYTHON] [--parts bar left-out sets pytorch-ood]

All parts look at the blocks of a preset, as training does.

bar          What the shipped threshold refuses at a stated 5 %: known photos of other groups, classes that were left
             out in turn, and photos of the other sets (generated ones among them); each of three folds is held out.
             Beside it what would be refused if the threshold were the score that exactly 5 % of the held-out known
             photos exceed. Minutes (novelty_bar.csv: --parts bar --most 30).
left-out     Each class of a set is left out in turn and is the stranger; known photos are held out by grouped folds.
`select_detector` chooses anew for each
             class and fold, by leaving out each of the REMAINING classes. AUROC with an interval from a
             bootstrap of groups (known and novel ones drawn anew).
             The first fixed candidate of the table is the best with hindsight.
sets         A detector of each set, asked to tell held-out photos of its own from photos of the other sets.
pytorch-ood  Spearman correlation of scores with pytorch-ood's on the same rows, in a Python that has it and this
package (--ood-python).
Writes benchmarks/results/novelty_*.csv.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(name, '1') # processes, not threads

import joblib  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from sklearn.base import clone  # noqa: E402

from amulet_hybrid.data.manifest import make_manifest  # noqa: E402
from amulet_hybrid.data.samples import NO_FAULTS, make_samples  # noqa: E402
from amulet_hybrid.data.scan import scan_files  # noqa: E402
from amulet_hybrid.features.config import FeatureConfig  # noqa: E402
from amulet_hybrid.features.extractor import HybridFeatureExtractor  # noqa: E402
from amulet_hybrid.learn.joins import describe_blocks  # noqa: E402
from amulet_hybrid.learn.ood_selection import (  # noqa: E402
    KnownPhotos,
    NoveltyConfig,
    held_out_scores,
    known_folds,
    pair_auroc,
    score_units,
    select_detector,
)
from amulet_hybrid.learn.ood_spaces import NoveltyCandidate, novelty_candidates  # noqa: E402


def nets(blocks) -> list:
    "Names of the blocks that a net makes; also in a process that has not measured anything"
    import amulet_hybrid.features.cnn  # noqa: F401
    return [b for b, info in describe_blocks(blocks).items() if info.neural]


def frozen(blocks) -> str:
    "The first embedding of a net: what one would take alone"
    return nets(blocks)[0]


def baselines(blocks) -> list[NoveltyCandidate]:
    "Detectors on that embedding alone"
    return [NoveltyCandidate(f'frozen embedding: {d}', ((frozen(blocks), d),))
            for d in ('knn', 'mahalanobis', 'relative_mahalanobis')]


def load(data: Path, name: str, preset: str, weights: str, cache: Path):
    "Blocks, labels, groups and unfitted encoders of one set"
    csv = data/f'{name}_groups.csv'
    manifest, root = make_manifest(data/name, csv if csv.exists() else None)
    manifest['group'] = manifest['group'].where(manifest['group'] != '', manifest['path'])
    manifest = manifest.join(scan_files(manifest['path'], root).table)
    manifest = manifest[manifest['reason'] == ''].reset_index(drop=True)
    extractor = HybridFeatureExtractor(FeatureConfig(preset=preset, weights=weights), cache)
    found = extractor.extract_manifest(manifest, root)
    return found, manifest['label'].to_numpy(str), manifest['group'].to_numpy(str), extractor.encoders()


def thin(groups: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    "Rows of whole groups, at most about `most` a class"
    rng, keep = np.random.default_rng(0), np.zeros(len(labels), bool)
    for c in np.unique(labels):
        found, counts = np.unique(groups[labels == c], return_counts=True)
        order = rng.permutation(len(found))
        keep |= (labels == c) & np.isin(groups, found[order][np.cumsum(counts[order])-counts[order] < most])
    return np.flatnonzero(keep)


def one_fold(blocks, labels, groups, encoders, fold, f, c):
    "The chosen detector's scores, and those of all fixed ones, for class `c` as the stranger and fold `f` held out"
    start, stranger = time.time(), labels == c
    train = ~np.isin(groups, groups[fold == f]) & ~stranger
    known, novel = np.flatnonzero((fold == f) & ~stranger), np.flatnonzero(stranger & ~np.isin(groups, groups[train]))
    if not len(known) or not len(novel): return None
    # A vocabulary knows no labels; it is learned once a fold, without the photos that are asked about
    coded = {b: clone(encoders[b]).fit(X[train]).transform(X) if b in encoders else X for b, X in blocks.items()}
    detector = select_detector({b: X[train] for b, X in coded.items()}, labels[train], groups[train],
                               NoveltyConfig(choice_folds=2, choice_photos=500), neural=nets(blocks))
    softmax = NoveltyCandidate('frozen embedding: max_softmax', (('head', 'max_softmax'),))
    fixed = [*novelty_candidates(list(blocks)), *baselines(blocks), softmax]
    members = tuple(dict.fromkeys(m for x in fixed[:-1] for m in x.members))
    scores = held_out_scores(KnownPhotos(coded, labels, groups, neural=nets(blocks)), members, fold, f, c)
    embedding = KnownPhotos({frozen(blocks): coded[frozen(blocks)]}, labels, groups)
    alone = held_out_scores(embedding, fixed[-1].members, fold, f, c)
    rows = np.r_[known, novel]
    pick = detector.score({b: X[rows] for b, X in coded.items()})
    return {'class': c, 'fold': f, 'known': known, 'novel': novel, 'chosen': detector.candidate.name, 'score': pick,
            'alarms': float((pick[:len(known)] > detector.threshold_).mean()),
            'found': float((pick[len(known):] > detector.threshold_).mean()), 'members': members,
            'raw': [np.hstack([a, b]) for a, b in zip(scores[:2], alone[:2])], 'seconds': time.time()-start}


def pooled(figures):
    "Mean of (AUROC, pairs), weighted by pairs"
    values, pairs = zip(*figures)
    return float(np.average(values, weights=pairs))


def interval(parts, groups, by, draws=300):
    "95 % interval of the mean AUROC over classes, groups drawn with replacement"
    rng, figures = np.random.default_rng(0), []
    code = np.unique(groups, return_inverse=True)[1]
    for _ in range(draws):
        times = np.bincount(rng.integers(0, code.max()+1, code.max()+1), minlength=code.max()+1)
        got: dict[str, list] = {}
        for p in parts:
            k, n = (np.repeat(s, times[code[rows]]) for s, rows in zip(by(p), (p['known'], p['novel'])))
            if len(k) and len(n): got.setdefault(p['class'], []).append((pair_auroc(k, n), len(k)*len(n)))
        if got: figures.append(np.mean([pooled(v) for v in got.values()]))
    return np.quantile(figures, [.025, .975])


def left_out(name, blocks, labels, groups, encoders, folds, jobs):
    "Table of one set: a row a detector, AUROC by left-out class"
    start = time.time()
    fold = known_folds(labels, groups, folds, 0)
    classes = np.unique(labels)
    tasks = [(f, c) for c in classes for f in range(fold.max()+1)]
    parts = [p for p in joblib.Parallel(jobs)(joblib.delayed(one_fold)(blocks, labels, groups, encoders, fold, f, c)
                                              for f, c in tasks) if p]
    softmax = NoveltyCandidate('frozen embedding: max_softmax', (('-', '-'),))
    fixed = [*novelty_candidates(list(blocks)), *baselines(blocks), softmax]
    for c in classes: # units of each score: its spread on the held-out known photos of all folds
        mine = [p for p in parts if p['class'] == c]
        if not mine: continue
        centre, scale = score_units(np.concatenate([p['raw'][0] for p in mine]))
        for p in mine: p['z'] = [(s-centre)/scale for s in p['raw']]
    def scorer(candidate):
        def by(p):
            at = [-1] if candidate.members == (('-', '-'),) else [p['members'].index(m) for m in candidate.members]
            return [z[:, at].mean(1) for z in p['z']]
        return by
    methods = {'chosen': lambda p: (p['score'][:len(p['known'])], p['score'][len(p['known']):]), **{x.name: scorer(x)
            for x in fixed}}
    rows = []
    for method, by in methods.items():
        row = {c: pooled([(pair_auroc(*by(p)), len(p['known'])*len(p['novel'])) for p in parts if p['class'] == c])
               for c in classes if any(p['class'] == c for p in parts)}
        rows.append({'set': name, 'method': method, 'mean': np.mean(list(row.values())), **row})
    table = pd.DataFrame(rows).sort_values('mean', ascending=False, ignore_index=True)
    best = table.loc[~table['method'].isin(['chosen']), 'method'].iloc[0]
    for method in {'chosen', best, *(m for m in methods if m.startswith('frozen'))}:
        table.loc[table['method'] == method, ['low', 'high']] = interval(parts, groups, methods[method])
    alarms, found = np.mean([p['alarms'] for p in parts]), np.mean([p['found'] for p in parts])
    picked = pd.Series([p['chosen'] for p in parts]).value_counts().to_dict()
    print(f"{name}: {len(labels)} photos, {len(blocks)} blocks, {len(parts)} fits, {time.time()-start:.0f} s. "
          f"Chosen: {picked}. At a stated 5 %: {alarms:.1%} false alarms, {found:.1%} of strangers found")
    return table


def against(found, jobs):
    "AUROC of own held-out photos against photos of the other sets"
    rows = []
    for name, (blocks, labels, groups, encoders) in found.items():
        fold = known_folds(labels, groups, 4, 0)
        train, known = ~np.isin(groups, groups[fold == 0]), np.flatnonzero(fold == 0)
        detector = select_detector({b: X[train] for b, X in blocks.items()}, labels[train], groups[train],
                                   NoveltyConfig(choice_folds=2, choice_photos=500, jobs=jobs), encoders=encoders,
                                   neural=nets(blocks))
        fixed = novelty_candidates(list(blocks))+baselines(blocks)
        scored = {}
        for other, (theirs, *_) in found.items():
            if other == name: continue
            joint = {b: np.vstack([X, theirs[b]]) for b, X in blocks.items()}
            stranger = np.r_[np.zeros(len(labels), bool), np.ones(len(theirs[frozen(blocks)]), bool)]
            scored['chosen'] = detector.score({b: X[np.r_[known, np.flatnonzero(stranger)]] for b, X in joint.items()})
            members = tuple(dict.fromkeys(m for x in fixed for m in x.members))
            both_labels = np.r_[labels, np.full(stranger.sum(), ' stranger')]
            both_groups = np.r_[groups, [f' {i}' for i in range(stranger.sum())]]
            both_folds = np.r_[fold, np.full(stranger.sum(), -1)]
            asked = KnownPhotos(joint, both_labels, both_groups, encoders, neural=nets(blocks))
            k, n, _rows = held_out_scores(asked, members, both_folds, 0, ' stranger')
            centre, scale = detector_units(KnownPhotos(blocks, labels, groups, encoders, neural=nets(blocks)), members,
                                           fold)
            for x in fixed:
                at = [members.index(m) for m in x.members]
                rows.append({'trained on': name, 'strangers': other, 'method': x.name,
                             'auroc': pair_auroc(*(((s-centre)/scale)[:, at].mean(1) for s in (k, n)))})
            s = scored['chosen']
            rows.append({'trained on': name, 'strangers': other, 'method': 'chosen', 'picked': detector.candidate.name,
                         'auroc': pair_auroc(s[:len(known)], s[len(known):]),
                         'false_alarms': (s[:len(known)] > detector.threshold_).mean(),
                         'found': (s[len(known):] > detector.threshold_).mean()})
    return pd.DataFrame(rows)


def detector_units(known, members, fold):
    "Mean and spread of each score on training photos held out within training"
    taught = known.take(~np.isin(known.groups, known.groups[fold == 0]))
    inner = known_folds(taught.labels, taught.groups, 2, 0)
    parts = [held_out_scores(taught, members, inner, f) for f in range(2)]
    return score_units(np.concatenate([known for known, _, _ in parts]))


def generated(folder, preset, weights, cache, classes=8):
    "Blocks, labels, groups and encoders of generated amulets"
    make_samples(folder/'generated', photos=25*classes, classes=classes, seed=3, faults=NO_FAULTS)
    (folder/'generated'/'groups.csv').rename(folder/'generated_groups.csv')
    return load(folder, 'generated', preset, weights, cache)


def refusals(case, others, c, f):
    """Shares that the shipped threshold refuses: of the known photos of fold `f`, of class `c` (None: none), of other
    sets"""
    blocks, labels, groups, encoders = case
    fold = known_folds(labels, groups, 3, 0)
    stranger = labels == c if c is not None else np.zeros(len(labels), bool)
    train = ~np.isin(groups, groups[fold == f]) & ~stranger
    detector = select_detector({b: X[train] for b, X in blocks.items()}, labels[train], groups[train],
                               encoders=encoders, neural=nets(blocks))
    asked = {'known': (blocks, np.flatnonzero((fold == f) & ~stranger & np.isin(labels, labels[train])))}
    if c is not None: asked['left out'] = (blocks, np.flatnonzero(stranger & ~np.isin(groups, groups[train])))
    else: asked |= {f'photos of {name}': (theirs, np.random.default_rng(0).permutation(len(y))[:60])
                    for name, (theirs, y, *_) in others.items()}
    scores = {what: detector.score({b: X[rows] for b, X in X.items()})
              for what, (X, rows) in asked.items() if len(rows)}
    exact = np.quantile(scores['known'], .95, method='higher')
    return [{'class': c or '', 'fold': f, 'asked': what, 'photos': len(s), 'refused': (s > detector.threshold_).mean(),
             'refused_at_exactly_5': (s > exact).mean(), 'auroc': pair_auroc(scores['known'], s),
             'detector': detector.candidate.name} for what, s in scores.items()]


def bar(cases, jobs):
    "A row a detector and a kind of photos that it is asked about"
    tasks = [(name, c, f) for name, (_, labels, *_) in cases.items() for c in [None, *np.unique(labels)]
             for f in range(3)]
    run = joblib.Parallel(jobs)(joblib.delayed(refusals)(
        cases[name], {n: case for n, case in cases.items() if n != name}, c, f) for name, c, f in tasks)
    return pd.DataFrame([{'set': name, **row} for (name, *_), rows in zip(tasks, run) for row in rows])


OOD = r'''
import sys, json, numpy as np, torch, pytorch_ood
from pytorch_ood.detector import GEN, KNN, RMD, EnergyBased, Mahalanobis, MaxLogit, MaxSoftmax, ViM
d = np.load(sys.argv[1]); t = lambda k: torch.tensor(d[k], dtype=torch.float64)
X = t('X')
y = torch.tensor(d['y'])
Q = t('Q')
L = t('L')
W = t('W')
b = t('b')
out = {}
for name, make in {'mahalanobis': Mahalanobis, 'relative_mahalanobis': RMD}.items():
    det = make(None)
    try: out[name] = det.fit_features(X, y).predict_features(Q)
    except RuntimeError: out[name] = make(None).fit_features(X.float(), y).predict_features(Q.float())
for k in (1, 5): out[f'knn k={k}'] = KNN(None, k=k).fit_features(X, y).predict_features(Q)
out['vim'] = ViM(None, d=int(d['axes']), w=W, b=b).fit_features(X.float(), y).predict_features(Q.float())
out['energy'] = EnergyBased(None).predict_logits(L); out['gen'] = GEN(None).predict_logits(L)
out['max_softmax'] = MaxSoftmax(None).predict_logits(L) if hasattr(MaxSoftmax,
                                                                   'predict_logits') else MaxSoftmax.score(L)
out['max_logit'] = MaxLogit(None).predict_logits(L) if hasattr(MaxLogit, 'predict_logits') else MaxLogit.score(L)
print(json.dumps({'version': pytorch_ood.__version__, **{k: np.asarray(v, float).tolist() for k, v in out.items()}}))
'''


def agreement(python, found):
    """Spearman with pytorch-ood, same rows and settings; what differs in the tenth digit only is a tie, as of
    probabilities that both clip"""
    from scipy.stats import spearmanr

    from amulet_hybrid.learn.ood_detectors import DETECTORS, LinearHead
    from amulet_hybrid.learn.ood_spaces import Axes
    rows = []
    for name, (blocks, labels, groups, _) in found.items():
        some = thin(groups, labels, 150)
        y, train = np.unique(labels[some], return_inverse=True)[1], np.arange(len(some)) % 3 > 0
        # fewer columns than rows: pytorch-ood does not shrink
        axes = Axes(most=max(8, int(train.sum())//10)).fit(blocks[frozen(blocks)][some][train])
        Z = axes.transform(blocks[frozen(blocks)][some])
        y = np.unique(y, return_inverse=True)[1]
        X, Q = Z[train], Z[~train]
        head = LinearHead().fit(X, y[train])
        half = X.shape[1]//2
        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder)/'rows.npz', X=X, y=y[train], Q=Q, L=head.transform(Q), W=head.weight_, b=head.bias_,
                     axes=half)
            done = subprocess.run([python, '-c', OOD, str(Path(folder)/'rows.npz')], capture_output=True, text=True)
        if done.returncode: sys.exit(done.stderr[-2000:])
        theirs = json.loads(done.stdout.strip().splitlines()[-1])
        version = theirs.pop('version')
        ours = {'mahalanobis': (X, {'shrinkage': 0.}), 'relative_mahalanobis': (X, {'shrinkage': 0.}),
                'knn k=1': (X, {'k': 1}), 'knn k=5': (X, {'k': 5}),
                'vim': (X, {'axes': half, 'weight': head.weight_, 'bias': head.bias_})}
        for key, scores in theirs.items():
            fit, settings = ours.get(key, (head.transform(X), {}))
            got = DETECTORS[key.split()[0]](**settings).fit(fit, y[train]).score_samples(Q if key in ours
                    else head.transform(Q))
            rank = spearmanr(*(np.round(np.asarray(v)/np.abs(v).max(), 9) for v in (got, scores)))[0]
            rows.append({'set': name, 'detector': key, 'rows': len(X), 'columns': X.shape[1], 'spearman': rank,
                         'pytorch_ood': version})
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path(os.environ.get('AMULET_DATA', '../shared/data')))
    parser.add_argument('--weights', default='auto', help='auto: also those of AMULET_WEIGHTS')
    parser.add_argument('--parts', nargs='+', default=['bar', 'left-out', 'sets', 'pytorch-ood'],
                        choices=['bar', 'left-out', 'sets', 'pytorch-ood'])
    parser.add_argument('--preset', default='balanced', help='feature blocks')
    parser.add_argument('--sets', nargs='+', default=['amulet6', 'coins', 'magtile'])
    parser.add_argument('--most', type=int, default=40,
                        help='photos of a class at most in the large sets, whole groups')
    parser.add_argument('--folds', type=int, default=3)
    parser.add_argument('--ood-python', help='a Python with pytorch-ood')
    parser.add_argument('--jobs', type=int, default=joblib.cpu_count())
    parser.add_argument('--cache', type=Path, default=Path('.cache'))
    parser.add_argument('--output', type=Path, default=Path(__file__).parent/'results')
    args = parser.parse_args()
    pd.set_option('display.width', 250, 'display.max_columns', 20)
    args.output.mkdir(parents=True, exist_ok=True)
    def keep(table, name):
        table.round(4).to_csv(args.output/f'novelty_{name}.csv', index=False)
        return table
    found = {name: load(args.data, name, args.preset, args.weights, args.cache) for name in args.sets}

    def thinned(cases, most):
        return {n: ({b: X[some] for b, X in blocks.items()}, y[some], g[some], encoders)
                for n, (blocks, y, g, encoders) in cases.items() for some in [thin(g, y, most)]}
    if 'bar' in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            made = generated(Path(folder), args.preset, args.weights, args.cache)
        table = keep(bar(thinned({**found, 'generated': made}, args.most), args.jobs), 'bar')
        mean = table.groupby(['set', 'asked'], sort=False)
        print(mean.agg({'refused': 'mean', 'refused_at_exactly_5': 'mean', 'auroc': 'mean', 'photos': 'sum'}
                       ).round(3).to_string(), flush=True)
    if 'pytorch-ood' in args.parts and args.ood_python:
        print(keep(agreement(args.ood_python, found), 'pytorch_ood').to_string(index=False), flush=True)
    if 'sets' in args.parts and len(found) > 1:
        table = keep(against(thinned(found, 6*args.most), args.jobs), 'sets')
        wide = table.pivot_table(index='method', columns=['trained on', 'strangers'], values='auroc')
        wide.columns = [f'{a} | {b}' for a, b in wide.columns]
        print(wide.assign(mean=wide.mean(axis=1)).sort_values('mean', ascending=False).round(4).to_string())
        print(table.loc[table['method'] == 'chosen', ['trained on', 'strangers', 'picked', 'auroc', 'false_alarms',
                                                      'found']].round(4).to_string(index=False), flush=True)
    if 'left-out' in args.parts:
        for name, parts in thinned(found, args.most).items():
            table = keep(left_out(name, *parts, args.folds, args.jobs), f'left_out_{name}')
            print(table.drop(columns='set').round(3).to_string(index=False), flush=True)


if __name__ == '__main__': main()
