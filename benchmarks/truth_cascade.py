"""What a cascade truly loses against its last tier, beside what its thresholds promise, on tiers of known strength.

Thresholds are fitted with the package's own `fit_thresholds` on few photos; what they lose, by photo and by class, is
counted on a hundred thousand of the same kind.

    python benchmarks/truth.py cascade
"""
from collections.abc import Callable

import numpy as np

from amulet_hybrid.base.estimators import softmax
from amulet_hybrid.model.cascade import ALLOWED, CONFIDENCE, fit_thresholds, route_of

DEFAULT_REPEATS = 200
TWO, THREE = (2., 3.2), (1., 2.2, 3.2) # Strength of each tier, from cheap to dear
EVEN, SKEWED = (.25,)*4, (.55, .25, .12, .08) # Shares of the classes
# What was done before (limit .005, held on the photos at hand), measured with these tiers and 200 repeats: the mean
# true loss and the share of bundles above the limit that was promised
BEFORE = {'60 photos': (.0151, .68), '140 photos': (.0068, .41), '300 photos': (.0062, .44),
          '300 photos, three tiers': (.0096, .65), '700 photos, classes of 8 to 55 %': (.0046, .305),
          '75 groups of 4 photos': (.0086, .49), '300 groups of 4 photos': (.0057, .54)}


def draw(n_groups, size, strengths, shares, rng):
    "Groups of photos of one class; hardness and confusion are shared within a group, and partly among the tiers"
    label = rng.choice(len(shares), n_groups, p=shares)
    label[:2*len(shares)] = np.arange(2*len(shares)) % len(shares) # each class is there
    codes = np.repeat(np.arange(n_groups), size)
    y, alike = label[codes], .8 if size > 1 else 0.

    def noise(width):
        of_group, own = rng.normal(size=(n_groups, width)), rng.normal(size=(len(codes), width))
        return np.sqrt(alike)*of_group[codes]+np.sqrt(1-alike)*own
    hard, common = noise(1), noise(len(shares))
    tiers = [softmax(.7*common+.7*noise(len(shares))+(s-hard)*np.eye(len(shares))[y]) for s in strengths]
    return tiers, y, codes


def accuracies(tiers, y, thresholds):
    "Accuracy by photo and by class, and the share that the last tier is not asked about"
    route = route_of([p.max(1) for p in tiers], thresholds)
    right = np.choose(route, [p.argmax(1) == y for p in tiers])
    by_class = np.bincount(y, right)/np.bincount(y)
    return np.array([right.mean(), by_class.mean()]), (route < len(tiers)-1).mean()


def simulate(n_groups, size, strengths, shares, repeats, seed):
    "True loss (the larger of that by photo and by class) and share answered early, a row a bundle"
    kind = size, strengths, shares
    tiers, y, _ = draw(100_000//size, *kind, np.random.default_rng([seed, 0]))
    best, _ = accuracies(tiers, y, [2.]*(len(tiers)-1))
    found = []
    for i in range(repeats):
        few, labels, codes = draw(n_groups, *kind, np.random.default_rng([seed, 1+i]))
        now, early = accuracies(tiers, y, fit_thresholds(few, labels, groups=codes))
        found.append(((best-now).max(), early))
    return np.array(found)


def case(name, n_groups, size=1, strengths=TWO, shares=EVEN) -> Callable[[int, int], list[dict]]:
    "A case of the table: three figures of one simulation"
    def run(repeats, seed):
        lost, early = simulate(n_groups, size, strengths, shares, repeats, seed).T
        before = BEFORE.get(name, (None, None))
        rows = [('accuracy truly lost, mean', f'at most {ALLOWED:.1%} ({CONFIDENCE:.0%} sure)', before[0], lost.mean()),
                ('bundles that lose more than was promised', f'at most {1-CONFIDENCE:.0%}', before[1],
                 (lost > ALLOWED).mean()),
                ('photos answered early', '', None, early.mean())]
        return [{'point': 6, 'case': name, 'figure': figure, 'promised': promised, 'before': b,
                 'measured': round(float(m), 4), 'repeats': repeats} for figure, promised, b, m in rows]
    return run


_CASES = {'60 photos': (60,), '140 photos': (140,), '300 photos': (300,), '300 photos, three tiers': (300, 1, THREE),
          '700 photos, classes of 8 to 55 %': (700, 1, TWO, SKEWED), '75 groups of 4 photos': (75, 4),
          '300 groups of 4 photos': (300, 4)}
CASES = {name: case(name, *settings) for name, settings in _CASES.items()}
