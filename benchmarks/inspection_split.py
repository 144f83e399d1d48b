"""How near folds come to the wanted class shares, next to scikit-learn, and what a split that leaks looks like: python
benchmarks/inspection_split.py

Off by: distance of a fold's share of a class (or of all photos) from 1/k. Floor: the worst that a single group forces
on any splitter that keeps groups whole.
StratifiedKFold deals photos singly: it is what could be reached if groups did not matter, and it parts them.
"""
import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.data.split import GroupedStratifiedKFold, leakage, leakage_notes

SPLITTERS = {'amulet_hybrid': lambda k, seed: GroupedStratifiedKFold(k, random_state=seed),
             'StratifiedGroupKFold': lambda k, seed: StratifiedGroupKFold(k, shuffle=True, random_state=seed),
             'StratifiedKFold (parts groups)': lambda k, seed: StratifiedKFold(k, shuffle=True, random_state=seed)}


def messy(classes: int, groups: int, seed: int):
    "Long-tailed groups; some hold one class, others several; every class has at least ten groups"
    rng = np.random.default_rng(seed)
    sizes = np.ceil(2*rng.pareto(1.2, groups)).clip(1, 60).astype(int)
    share = np.arange(1, classes+1)**-.8
    main = np.r_[np.repeat(np.arange(classes), 10), rng.choice(classes, groups-10*classes, p=share/share.sum())]
    group = np.repeat(np.arange(groups), sizes)
    label = main[group]
    stray = (rng.random(len(label)) < .3) & (rng.random(groups) < .5)[group]
    label[stray] = rng.choice(classes, stray.sum(), p=share/share.sum())
    return label, group


def scenes(classes: int, groups: int, seed: int):
    "Photos that were cut from scenes which show several classes"
    rng = np.random.default_rng(seed)
    sizes, mix = rng.integers(5, 60, groups), rng.dirichlet(4*np.arange(1., classes+1)**-1, groups)
    return np.concatenate([rng.choice(classes, n, p=p) for n, p in zip(sizes, mix)]), np.repeat(np.arange(groups),
            sizes)


def sets(data: Path):
    "Name -> labels and groups"
    for name in ('coins', 'magtile'):
        if (csv := data/f'{name}_groups.csv').exists():
            table = pd.read_csv(csv)
            yield name, table['path'].str.split('/').str[0].to_numpy(), table['group'].to_numpy()
    for classes, groups in ((3, 60), (10, 150), (30, 400)):
        yield f'messy, {classes} classes', *messy(classes, groups, classes)
    for classes, groups in ((5, 60), (15, 120)): yield f'scenes, {classes} classes', *scenes(classes, groups, classes)


def measure(labels: np.ndarray, groups: np.ndarray, ks=(3, 5, 10), seeds: int = 10,
            methods=tuple(SPLITTERS)) -> pd.DataFrame:
    "A row for each k and method, means over the seeds"
    by_group = pd.crosstab(labels, groups)
    largest, least = by_group.max(axis=1)/by_group.sum(axis=1), int((by_group > 0).sum(axis=1).min())
    rows = []
    for k in ks:
        if k > least: continue # no class can be in more folds than it has groups
        for method in methods:
            for seed in range(seeds):
                start, fold = time.perf_counter(), np.zeros(len(labels), int)
                for i, (_, test) in enumerate(SPLITTERS[method](k, seed).split(labels, labels, groups)): fold[test] = i
                seconds = time.perf_counter()-start
                table = pd.crosstab(labels, fold).reindex(columns=range(k), fill_value=0)
                off = abs(table.div(table.sum(axis=1), axis=0)-1/k).to_numpy()
                rows.append({'k': k, 'method': method, 'mean off by': off.mean(), 'worst off by': off.max(),
                             'floor': max(0., float((largest-1/k).max())),
                             'fold size off by': abs(table.sum()/len(labels)-1/k).max(),
                             'folds without a class': int((table == 0).any().sum()), 'seconds': seconds})
    return pd.DataFrame(rows).groupby(['k', 'method'], sort=False).mean()


def measure_speed(photos: int = 100_000, groups: int = 5_000, classes: int = 30) -> pd.DataFrame:
    "A large set once, grouped and with every photo alone"
    rng = np.random.default_rng(0)
    size, share = rng.pareto(1.5, groups)+.2, np.arange(1, classes+1)**-1.
    group = rng.choice(groups, photos, p=size/size.sum())
    label = rng.choice(classes, groups, p=share/share.sum())[group]
    found = {f'{photos:,} photos, {groups:,} groups': measure(label, group, (5, 10), 1, list(SPLITTERS)[:2]),
             f'{photos:,} photos, each alone': measure(label, np.arange(photos), (5,), 1, list(SPLITTERS)[:1])}
    return pd.concat(found, names=['set'])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path(os.environ.get('AMULET_DATA', '../shared/data')))
    parser.add_argument('--seeds', type=int, default=10)
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=UserWarning, module='sklearn')
    pd.set_option('display.width', 200)
    table = pd.concat({f'{name} ({len(y):,} photos, {len(set(g))} groups)': measure(y, g, seeds=args.seeds)
                       for name, y, g in sets(args.data)}, names=['set'])
    for name, rows in table.groupby(level='set', sort=False):
        print(f'\n{name}\n{rows.droplevel("set").round(4).to_string()}')
    print('\nWhere 10 folds are missing, we refuse them: even the commonest class has fewer groups.')
    ratio = table['mean off by'].unstack('method')
    print('\nmean off by, StratifiedGroupKFold over amulet_hybrid:',
          (ratio['StratifiedGroupKFold']/ratio['amulet_hybrid']).round(2).to_dict())
    print(f'\n{measure_speed().round(4).to_string()}')
    if (csv := args.data/'amulet6_leaky_groups.csv').exists():
        manifest, _ = make_manifest(args.data/'amulet6_leaky', csv)
        found = leakage(manifest)
        print(f'\namulet6_leaky: {len(found)} groups are parted', *leakage_notes(manifest), found.head().to_string(),
              sep='\n')


if __name__ == '__main__': main()
