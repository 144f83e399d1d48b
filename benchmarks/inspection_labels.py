"""Wrong labels put into real sets, and how far up the list they are found: ours beside cleanlab on the very same
probabilities.

    python benchmarks/inspection_labels.py --data ../shared/data --rivals-python RIVALS/bin/python

Out-of-fold probabilities come from random folds, as the inspection asks for labels (`--grouped`: from folds that keep
groups whole).
Labels are flipped evenly to the other classes, or to the class that the probe confuses most with theirs.
The figure is the average precision of the true flips in the order of suspicion.
"""
import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from amulet_hybrid.audit.probes import quick_proba
from amulet_hybrid.core import derive_seed, file_digest
from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.data.split import folds
from amulet_hybrid.evaluate.label_issues import find_label_issues, label_noise
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor

OURS = 'amulet_hybrid'
CHILD = '''
import sys, numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
data, out = np.load(sys.argv[1]), {}
for i in range(int(data['cases'])):
    y, p = data[f'y{i}'], data[f'p{i}']
    for method in ('self_confidence', 'normalized_margin', 'confidence_weighted_entropy'):
        order = find_label_issues(y, p, return_indices_ranked_by=method, n_jobs=1)
        score = np.zeros(len(y)); score[order] = np.arange(len(order), 0, -1)
        out[f'find_label_issues {method}|{i}'] = score
        for adjust in (False, True):
            if adjust and method == 'confidence_weighted_entropy': continue # refused by cleanlab
            out[f'quality_scores {method}{" adjusted" if adjust else ""}|{i}'] = -get_label_quality_scores(y, p,
                    method=method, adjust_pred_probs=adjust)
np.savez(sys.argv[2], **out)
'''


def load(data: Path, name: str, weights: str | None, cache: Path):
    "Blocks, class indices and given groups of one set"
    csv = data/f'{name}_groups.csv'
    manifest, root = make_manifest(data/name, csv if csv.exists() else None)
    manifest['sha256'] = [file_digest(root/p) for p in manifest['path']]
    blocks = ('colour', 'hog', 'lbp') + (('cnn:mobilenet_v2',) if weights else ())
    X = HybridFeatureExtractor(FeatureConfig(blocks=blocks, weights=weights or 'none'),
                               cache).extract_manifest(manifest, root)
    return X, np.unique(manifest['label'], return_inverse=True)[1], manifest['group'].where(manifest['group'] != '',
            manifest['path']).to_numpy(str)


def flipped(y, confused_with, share: float, kind: str, seed: int):
    "Labels of which `share` is wrong, and which these are"
    rng, k = np.random.default_rng(derive_seed(seed, kind, share)), y.max()+1
    wrong = np.isin(np.arange(len(y)), rng.choice(len(y), round(share*len(y)), replace=False))
    return np.where(wrong, (y+rng.integers(1, k, len(y)))%k if kind == 'even' else confused_with[y], y), wrong


def cases(name: str, X, y, groups, seeds, grouped):
    "Every flipped version of a set with its out-of-fold probabilities"
    k, groups = y.max()+1, groups if grouped else np.arange(len(y))
    clean = quick_proba(X, y, folds(y, groups))
    taken_for = np.array([clean[y == c].mean(0) for c in range(k)])
    np.fill_diagonal(taken_for, 0)
    for kind in ('even', 'confusable'):
        for share in (.05, .1, .2):
            for seed in seeds:
                given, wrong = flipped(y, taken_for.argmax(1), share, kind, seed)
                yield {'set': name, 'kind': kind, 'share': share, 'seed': seed}, given, wrong, quick_proba(X, given,
                        folds(given, groups, seed=seed), seed)


def rival_scores(python: Path, many):
    "Scores of cleanlab, method -> case -> (n,)"
    with tempfile.TemporaryDirectory() as folder:
        arrays = {'cases': np.array(len(many))}
        for i, (_, given, _, proba) in enumerate(many): arrays |= {f'y{i}': given, f'p{i}': proba}
        np.savez(Path(folder)/'in.npz', **arrays)
        subprocess.run([str(python), '-c', CHILD, f'{folder}/in.npz', f'{folder}/out.npz'], check=True)
        out: dict = {}
        with np.load(f'{folder}/out.npz') as file:
            for key in file.files:
                method, i = key.split('|')
                out.setdefault(f'cleanlab {method}', {})[int(i)] = file[key]
    return out


def measure(many, rivals_python: Path | None) -> pd.DataFrame:
    "Average precision of every method in every case, and how well our suspects and our noise rate fit"
    theirs = rival_scores(rivals_python, many) if rivals_python else {}
    rows = []
    for i, (about, given, wrong, proba) in enumerate(many):
        classes = [str(c) for c in range(proba.shape[1])]
        issues = find_label_issues(given, proba, classes)
        suspects = issues.loc[issues['suspect'], 'row'].to_numpy()
        rows.append({**about, 'method': OURS,
                     'average_precision': average_precision_score(wrong[issues['row']], issues['score']),
                     'suspects': len(suspects)/len(given),
                     'suspects_right': wrong[suspects].mean() if len(suspects) else np.nan,
                     'found': wrong[suspects].sum()/wrong.sum(),
                     'noise_said': label_noise(given, proba, classes)['noise']['all']})
        rows += [{**about, 'method': method, 'average_precision': average_precision_score(wrong, scores[i])}
                 for method, scores in theirs.items()]
    return pd.DataFrame(rows)


def report(table: pd.DataFrame):
    "Print the means, and the difference to cleanlab's best method of each set and kind, seed by seed"
    with pd.option_context('display.width', 250, 'display.max_columns', 40):
        means = table.pivot_table(index='method', columns=['set', 'kind'], values='average_precision')
        print('\nmean average precision\n',
              means.round(3).assign(all=means.mean(axis=1).round(3)).sort_values('all').to_string())
        ours = table[table['method'] == OURS].groupby(['set', 'kind', 'share'])
        print('\nours by share of flips\n', ours[['average_precision', 'suspects', 'suspects_right', 'found',
                                                  'noise_said']].mean().round(3).to_string())
        if table['method'].nunique() == 1: return
        rows = []
        for (name, kind), part in table.groupby(['set', 'kind'], sort=False):
            scores = part.pivot_table(index=['share', 'seed'], columns='method', values='average_precision')
            best = scores.drop(columns=OURS).mean().idxmax()
            by_seed = (scores[OURS]-scores[best]).groupby('seed').mean()
            rows.append({'set': name, 'kind': kind, 'ours': scores[OURS].mean(),
                         'best of cleanlab': scores[best].mean(), 'difference': by_seed.mean(),
                         'by seed': ' '.join(f'{d:+.3f}' for d in by_seed), 'which': best})
        print('\nours minus the best of cleanlab, chosen with the truth at hand, each set and kind by itself\n',
              pd.DataFrame(rows).round(3).to_string(index=False))
        every = table.groupby('method')['average_precision'].mean()
        best = every.drop(OURS).idxmax()
        print(f'\nover all: ours {every[OURS]:.3f}, the best single method of cleanlab {every[best]:.3f} ({best})')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path(os.environ.get('AMULET_DATA', '../shared/data')))
    parser.add_argument('--weights', help='folder of pretrained weights: cnn:mobilenet_v2 joins the features')
    parser.add_argument('--sets', nargs='+', default=['amulet6', 'coins'])
    parser.add_argument('--grouped', action='store_true', help='keep groups whole in the folds')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--rivals-python', type=Path, help='Python of an environment that has cleanlab')
    parser.add_argument('--cache', type=Path, default=Path('.cache'), help='where features are kept')
    parser.add_argument('--output', type=Path, help='CSV of all rows')
    args = parser.parse_args()
    many = [case for name in args.sets for case in cases(name, *load(args.data, name, args.weights, args.cache),
                                                         args.seeds, args.grouped)]
    table = measure(many, args.rivals_python)
    if args.output: table.to_csv(args.output, index=False)
    report(table)


if __name__ == '__main__': main()
