"""A class taught from five photos, against a model that was trained on it

    AMULET_WEIGHTS=../shared/weights python benchmarks/teach.py --data ../shared/data      (--quick: amulets, two draws)

Each class of a set is left out of training in turn, and so is a second one, which stays unknown. The first is taught
from five photos of different groups, in some draws; all its photos of other groups are asked about, and so are held-out
photos of the known classes and all of the unknown one. Beside it: a model that was trained on the same five photos and
the known classes, and one that was trained on the training part of all classes. Large sets are thinned, whole groups
stay. Writes benchmarks/results/teach.csv: a row a set and class, and one a set (mean of its classes, with the 95 %
interval of a bootstrap over classes).
"""
import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from amulet_hybrid.core import AmuletError, bytes_digest, derive_seed
from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.data.split import holdout
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.ood_selection import pair_auroc
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model.class_trials import MarginCalibration
from amulet_hybrid.model.inference import ServedModel, Tier
from amulet_hybrid.model.similar_photos import PhotoIndex
from amulet_hybrid.model.taught_classes import TaughtClasses, teach_tiers

TAUGHT = 5
SETS = ('amulet6', 'coins', 'magtile')


def thinned(labels: np.ndarray, groups: np.ndarray, most: int) -> np.ndarray:
    "Rows of whole groups, about as many photos of each class"
    keep, rng = np.zeros(len(labels), bool), np.random.default_rng(0)
    if len(labels) <= most: return ~keep
    for c in np.unique(labels):
        mine = 0
        for g in rng.permutation(np.unique(groups[labels == c])):
            if mine >= most//len(np.unique(labels)): break
            keep |= groups == g
            mine += int(((groups == g) & (labels == c)).sum())
    return keep


def load(name: str, args) -> tuple[dict, np.ndarray, np.ndarray]:
    "Blocks, labels and groups of a set"
    csv = args.data/f'{name}_groups.csv'
    manifest, root = make_manifest(args.data/name, csv if csv.exists() else None)
    groups = manifest['group'].where(manifest['group'] != '', manifest['path']).to_numpy(str)
    some = thinned(manifest['label'].to_numpy(str), groups, args.photos)
    manifest = manifest[some].reset_index(drop=True)
    manifest['sha256'] = [bytes_digest((root/p).read_bytes()) for p in manifest['path']]
    extractor = HybridFeatureExtractor(FeatureConfig(preset=args.preset, weights=args.weights), args.cache)
    return extractor.extract_manifest(manifest, root), manifest['label'].to_numpy(str), groups[some]


class Study:
    "One set"
    def __init__(self, name: str, args):
        self.name, self.args = name, args
        self.blocks, self.labels, self.groups = load(name, args)
        self.extractor = HybridFeatureExtractor(FeatureConfig(preset=args.preset, weights=args.weights), args.cache)
        self.test = np.asarray(holdout(list(self.labels), list(self.groups), .3, 0)) == 'test'

    def take(self, rows): return {b: X[rows] for b, X in self.blocks.items()}

    def train(self, rows) -> tuple[ServedModel, PhotoIndex]:
        "A model of some photos, and its index"
        config = TrainingConfig(quick=True, jobs=1, cv_repeats=1)
        trainer = HybridTrainer(config).fit(self.take(rows), list(self.labels[rows]), list(self.groups[rows]),
                                            self.extractor.encoders(), self.extractor.block_info)
        model = ServedModel.from_trained(trainer.model_, self.take(rows))
        nets = [b for b in model.blocks if trainer.block_info_[b].neural] or model.blocks
        y = np.searchsorted(trainer.classes_, self.labels[rows])
        index = PhotoIndex.fit({b: self.blocks[b][rows] for b in nets}, y, [str(i) for i in range(len(y))],
                               groups=self.groups[rows])
        return model, index

    def five(self, label: str, draw: int) -> np.ndarray:
        "Photos of different groups of a class"
        rng = np.random.default_rng(derive_seed(draw, label))
        mine = self.labels == label
        groups = rng.permutation(np.unique(self.groups[mine]))[:TAUGHT]
        return np.array([rng.choice(np.flatnonzero(mine & (self.groups == g))) for g in groups])

    def right(self, model, rows) -> np.ndarray: return model.predict(self.take(rows)) == self.labels[rows]

    def row(self, label: str, unknown: str, full: ServedModel) -> dict:
        "What teaching one class came to, mean of the draws"
        out = np.isin(self.groups, self.groups[np.isin(self.labels, (label, unknown))])
        train, held = np.flatnonzero(~self.test & ~out), np.flatnonzero(self.test & ~out)
        before, index = self.train(train)
        strange = np.flatnonzero((self.labels == unknown) & ~np.isin(self.groups, self.groups[train]))
        found = []
        for draw in range(self.args.draws):
            five = self.five(label, draw)
            asked = np.flatnonzero((self.labels == label) & ~np.isin(self.groups, self.groups[five]))
            calibration = MarginCalibration.fit(index.trials, len(five), len(before.classes))
            taught = TaughtClasses.none(index).with_class(label, calibration, index.directions(self.take(five)),
                                                          ['']*len(five), ['']*len(five))
            after = teach_tiers([Tier('ensemble', before, .45)], index, taught)[0][0].model
            same = None
            if draw < self.args.retrained: same, _ = self.train(np.r_[train, five])
            found.append(self.figures(before, after, same, asked, held, strange))
        ours = self.test & (self.labels == label)
        return {'set': self.name, 'class': label, 'unknown': unknown, 'photos': int((self.labels == label).sum()),
                'recall of training on all': float(self.right(full, np.flatnonzero(ours)).mean()),
                **pd.DataFrame(found).mean().to_dict()}

    def figures(self, before, after, same, asked, held, strange) -> dict:
        "Recall, what the known classes lose, and how the unknown class is noticed, before and after"
        out = {'recall': self.right(after, asked).mean(),
               'recall of training on the same five': np.nan if same is None else self.right(same, asked).mean(),
               'recall beside it': np.nan if same is None else self.right(after, asked).mean(),
               'known before': self.right(before, held).mean(), 'known after': self.right(after, held).mean(),
               'known after training on the five': np.nan if same is None else self.right(same, held).mean(),
               'known after beside it': np.nan if same is None else self.right(after, held).mean()}
        if before.novelty is None or not len(strange): return out
        for name, model in (('before', before), ('after', after)):
            known, new = (model.novelty.score(self.take(rows)) for rows in (held, strange))
            out |= {f'unknown AUROC {name}': pair_auroc(known, new),
                    f'unknown refused {name}': (new > model.novelty.threshold_).mean(),
                    f'known refused {name}': (known > model.novelty.threshold_).mean(),
                    f'taught refused {name}': (model.novelty.score(self.take(asked)) > model.novelty.threshold_).mean()}
        return out


def summary(table: pd.DataFrame, name: str) -> list[dict]:
    "Mean of the classes of a set, and the limits of its interval"
    numbers, rng = table.select_dtypes('number').drop(columns='photos'), np.random.default_rng(0)
    drawn = pd.DataFrame([numbers.iloc[rng.integers(0, len(numbers), len(numbers))].mean() for _ in range(2000)])
    return [{'set': name, 'class': what, **values.to_dict()} for what, values in (
        ('mean', numbers.mean()), ('low', drawn.quantile(.025)), ('high', drawn.quantile(.975)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', type=Path, default=Path(os.environ.get('AMULET_DATA', '../shared/data')))
    parser.add_argument('--weights', default=os.environ.get('AMULET_WEIGHTS', 'auto'))
    parser.add_argument('--sets', default='+'.join(SETS), help='joined by +')
    parser.add_argument('--preset', default='balanced')
    parser.add_argument('--photos', type=int, default=400, help='of a set, about')
    parser.add_argument('--draws', type=int, default=5, help='of the taught photos')
    parser.add_argument('--retrained', type=int, default=1, help='draws for which a model is trained on the same five')
    parser.add_argument('--classes', type=int, default=0, help='of a set; 0: all')
    parser.add_argument('--quick', action='store_true', help='amulets only, two draws, preset fast')
    parser.add_argument('--cache', type=Path, default=Path(tempfile.gettempdir())/'amulet-teach')
    parser.add_argument('--output', type=Path, default=Path(__file__).parent/'results'/'teach.csv')
    args = parser.parse_args()
    if args.quick: args.sets, args.draws, args.preset = 'amulet6', 2, 'fast'
    rows: list[dict] = []
    for name in args.sets.split('+'):
        study = Study(name, args)
        classes = list(np.unique(study.labels))
        full, _ = study.train(np.flatnonzero(~study.test))
        mine = []
        for k, label in enumerate(classes[:args.classes or None]):
            try: mine.append(study.row(label, classes[(k+1) % len(classes)], full))
            except AmuletError as error: print(f'{name} {label}: {error}') # too few groups of some class are left
            else: print({k: round(v, 3) if isinstance(v, float) else v for k, v in mine[-1].items()}, flush=True)
        rows += [*mine, *summary(pd.DataFrame(mine), name)] if mine else []
        pd.DataFrame(rows).round(4).to_csv(args.output, index=False)


if __name__ == '__main__': main()
