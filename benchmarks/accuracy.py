"""Nested accuracy on real photo sets: everything that learns, chooses or calibrates does so inside the outer training
folds.

    python benchmarks/accuracy.py --data ../shared/data --weights ../shared/weights \\
        --rival ../shared/rivals/afternoon.py

Outer folds are those of the rival script (StratifiedGroupKFold, 5, shuffled, seed 0), so both are judged on the same
photos. Features come from the cache where they are known.
Writes benchmarks/results/accuracy.csv, from which the README makes its table. Intervals include the luck of the
training sets (`evaluate.learning_curve.cross_validated`).

amulet6, coins and magtile also chose defaults of this package, so their figures flatter it. One set is in no
benchmark that chose them, needs nothing but scikit-learn, and can be had by anyone: 30 handwritten digits of each kind
(`load_digits`).

    python benchmarks/accuracy.py --sets digits --weights none --preset fast --quick --append

What three useless blocks cost (noise, and two real blocks whose rows were dealt to other photos):

    python benchmarks/accuracy.py --quick --extra noise --output benchmarks/results/accuracy_useless_blocks.csv
"""
import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from amulet_hybrid.audit.inspection import InspectionConfig
from amulet_hybrid.audit.inspector import DatasetInspector
from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.evaluate.learning_curve import cross_validated
from amulet_hybrid.evaluate.metrics import evaluate_predictions
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.contract import BlockInfo
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.features.local_matching import POINTS
from amulet_hybrid.learn.config import MATCHING, TrainingConfig
from amulet_hybrid.learn.match_evidence import MatchRows
from amulet_hybrid.learn.trainer import HybridTrainer


def write_digits(folder: Path, each: int = 30):
    "The first digits of each kind, as scikit-learn ships them (UCI, public), 8 pixels made 64"
    digits, kind = load_digits(return_X_y=True)
    for c in range(10):
        (folder/str(c)).mkdir(parents=True, exist_ok=True)
        for i in np.flatnonzero(kind == c)[:each]:
            pixels = (digits[i].reshape(8, 8)*15.9).astype(np.uint8)
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(folder/str(c)/f'{i}.png')


def load(data: Path, name: str, weights: str, cache: Path, preset: str):
    "Blocks of the photos and of their mirror images, key points, labels and the given groups of one set"
    csv = data/f'{name}_groups.csv'
    manifest, root = make_manifest(data/name, csv if csv.exists() else None)
    manifest['given'] = manifest['group'].where(manifest['group'] != '', manifest['path'])
    table = DatasetInspector(InspectionConfig(quick_mode=True, check_duplicates=False)).inspect(manifest,
            root=root).usable
    extractor = HybridFeatureExtractor(FeatureConfig(preset=preset, weights=weights), cache)
    blocks = extractor.extract_manifest(table, root)
    mirrored = extractor.extract_mirrored(table, root, blocks)
    about = extractor.encoders(), extractor.block_info
    points = HybridFeatureExtractor(FeatureConfig(blocks=(POINTS,)), cache).extract_manifest(table, root)[POINTS]
    return blocks, mirrored, points, about, table['label'].to_numpy(str), table['given'].to_numpy(str)


def add_useless(blocks, mirrored, about, seed: int = 0):
    "The same with three blocks that know nothing: noise, the widest classical block and the first net of other photos"
    encoders, info = about
    rng = np.random.default_rng(seed)
    n = len(next(iter(blocks.values())))
    dealt = rng.permutation(n)
    net = next((b for b in blocks if info[b].neural), None)
    wide = max((b for b in blocks if not info[b].neural and b not in encoders), key=lambda b: blocks[b].shape[1])
    sources = {'useless noise': None, f'useless {wide}': wide, **({f'useless {net}': net} if net else {})}
    def more(some):
        return {name: rng.normal(size=(n, 300)).astype(np.float32) if b is None else some[b][dealt]
                for name, b in sources.items()}
    known = {name: BlockInfo(cost=1.) if b is None else replace(info[b], pass_key='') for name, b in sources.items()}
    return {**blocks, **more(blocks)}, {**mirrored, **more(mirrored)}, (encoders, {**info, **known})


def nested(blocks, mirrored, points, about, labels, groups, seed: int, config: TrainingConfig):
    "Out-of-fold probabilities of the ensemble and of the best single block, each chosen anew in every outer fold"
    classes, y = np.unique(labels, return_inverse=True)
    outer = (StratifiedGroupKFold if len(set(groups)) < len(groups) else StratifiedKFold)(5, shuffle=True,
            random_state=seed)
    ensemble, single = np.zeros((len(y), len(classes))), np.zeros((len(y), len(classes)))
    for train, test in outer.split(y, y, groups):
        held_out = {k: v[test] for k, v in blocks.items()}
        taught, turned = ({k: v[train] for k, v in some.items()} for some in (blocks, mirrored))
        known = MatchRows(points[train], train.astype(str))
        trainer = HybridTrainer(config).fit(taught, labels[train], groups[train], *about, mirrored=turned,
                                            points=known)
        held_out |= {POINTS: points[test]}
        ensemble[test], single[test] = (trainer.model_.predict_proba(held_out),
                                        trainer.single_model_.predict_proba(held_out))
        print('   ', 'mirror' if trainer.mirrored_ else '',
              'matching' if trainer.model_.matching else '',
              ', '.join(f'{m.weight:.2f} {m.candidate}' for m in trainer.model_.members), flush=True)
    return classes.tolist(), y, {'amulet_hybrid': ensemble, 'amulet_hybrid, best single block': single}


def rival_rows(script: Path, data: Path, name: str, weights: str):
    "What the rival script prints about a set"
    csv = data/f'{name}_groups.csv'
    done = subprocess.run([sys.executable, str(script), weights, str(data), f'{name}:{csv}' if csv.exists() else name],
                          capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        if found := re.match(rf'{name}\s+(.+?)\s+acc \S+ bal (\S+) F1 (\S+) .*cv (\S+)s', line):
            # a fold, as ours
            yield {'method': f'afternoon script: {found[1]}', 'balanced_accuracy': float(found[2]),
                   'macro_f1': float(found[3]), 'seconds': float(found[4])/5}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path('../shared/data'))
    parser.add_argument('--weights', default='../shared/weights')
    parser.add_argument('--rival', type=Path, help='script to beat, run on the same sets')
    parser.add_argument('--sets', nargs='+', default=['amulet6', 'coins', 'magtile'])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='of the outer folds')
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--preset', default='rich', help='feature blocks')
    parser.add_argument('--extra', choices=['none', 'noise'], default='none', help='useless blocks that are added')
    parser.add_argument('--matching', default='auto', choices=MATCHING, help='of key points')
    parser.add_argument('--jobs', type=int, default=0)
    parser.add_argument('--cache', type=Path, default=Path('.cache'))
    parser.add_argument('--output', type=Path, default=Path(__file__).parent/'results'/'accuracy.csv')
    parser.add_argument('--append', action='store_true', help='keep the rows of other sets that are there already')
    args = parser.parse_args()
    rows, made = [], tempfile.TemporaryDirectory()
    for name in args.sets:
        if name == 'digits':
            write_digits(Path(made.name)/name)
        data = Path(made.name) if name == 'digits' else args.data
        blocks, mirrored, points, learned, labels, groups = load(data, name, args.weights, args.cache, args.preset)
        if args.extra == 'noise':
            blocks, mirrored, learned = add_useless(blocks, mirrored, learned)
        about = {'set': name, 'photos': len(labels), 'classes': len(set(labels)), 'groups': len(set(groups))}
        for seed in args.seeds:
            start = time.time()
            config = TrainingConfig(quick=args.quick, novelty=False, jobs=args.jobs, matching=args.matching)
            classes, y, found = nested(blocks, mirrored, points, learned, labels, groups, seed, config)
            seconds = time.time()-start
            for method, proba in found.items():
                judged = evaluate_predictions(y, proba, classes, groups)
                overall, figure = judged.overall, cross_validated(judged.interval('balanced_accuracy'))
                rows.append({**about, 'preset': args.preset, 'extra': args.extra,
                             'mode': 'quick' if args.quick else 'full', 'method': method,
                             'fold_seed': seed, 'balanced_accuracy': figure.value,
                             'low': figure.low, 'high': figure.high, 'macro_f1': overall.loc['macro_f1', 'value'],
                             'log_loss': overall.loc['log_loss', 'value'],
                             'log_loss_skill': overall.loc['log_loss_skill', 'value'],
                             'calibration_error_below': overall.loc['rms_calibration_error', 'high'],
                             **{f'temperature{end}': overall.loc['temperature', column]
                                for end, column in {'': 'value', '_low': 'low', '_high': 'high'}.items()},
                             'seconds': seconds/5})
                print(name, method, seed, overall['value'].round(3).to_dict(), f'{seconds/5:.0f} s a fold', flush=True)
        if args.rival:
            rows += [{**about, 'fold_seed': 0, **row} for row in rival_rows(args.rival, data, name, args.weights)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows).round(3)
    if args.append and args.output.exists():
        others = pd.read_csv(args.output)
        table = pd.concat([others[~others['set'].isin(args.sets)], table], ignore_index=True)
    table.to_csv(args.output, index=False)
    print(table.to_string(index=False))


if __name__ == '__main__': main()
