"""The refusal threshold that a bundle stores, against known truth: is the promised error kept, what is refused for it,
and what does the threshold of least cost cost

    python benchmarks/truth.py refusal

Most cases draw out-of-fold predictions of a model whose error at each confidence is known. `trained` draws features,
trains `HybridTrainer` on them, and counts what the model does with new photos of new groups.
"""
from collections.abc import Callable

import numpy as np
from truth import row

from amulet_hybrid.core import derive_seed
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.refusal import Refusal, cascade_predictions, recommend_refusal
from amulet_hybrid.learn.trainer import HybridTrainer

DEFAULT_REPEATS = 300
MAX_ERROR = .05
MODELS = {'right on 94 %': (8, 1), 'right on 98 %': (12, .5), 'right on 83 %': (2, 1)} # Beta of the certainty above 1/2

def draw(rng, groups, photos, hard):
    "Labels, calibrated probabilities and groups; half of a photo's certainty, and of its luck, is its group's"
    code = np.repeat(np.arange(groups), photos)
    together = rng.random(len(code)) < .5
    sure = .5+.5*np.where(together, rng.beta(*hard, groups)[code], rng.beta(*hard, len(code)))
    luck = np.where(together, rng.random(groups)[code], rng.random(len(code)))
    return (luck > sure).astype(int), np.column_stack([sure, 1-sure]), code

class Truth:
    "What a threshold does with very many photos"
    def __init__(self, hard, size=400_000):
        self.sure = -np.sort(-draw(np.random.default_rng(1), size, 1, hard)[1][:, 0])
        self.error = np.cumsum(1-self.sure)/np.arange(1, size+1)

    def at(self, threshold):
        "True share of wrong labels, and of photos that are named"
        count = np.searchsorted(-self.sure, -threshold, 'right')
        return (self.error[count-1], count/len(self.sure)) if count else (0., 0.)

    def cost(self, threshold, wrong, refuse):
        error, named = self.at(threshold)
        return wrong*error*named+refuse*(1-named)

def seeds(repeats, seed, *names):
    "A generator for each repeat"
    return (np.random.default_rng(derive_seed(seed, *names, i)) for i in range(repeats))


def promise(repeats: int, seed: int) -> list[dict]:
    "How often a promise is broken, how often one is made, and what is named"
    rows = []
    for name, hard in MODELS.items():
        truth = Truth(hard)
        for groups, photos in ((150, 1), (600, 1), (150, 4)):
            rngs = seeds(repeats, seed, 'promise', name, groups, photos)
            found = [recommend_refusal(*draw(rng, groups, photos, hard)) for rng in rngs]
            true = np.array([truth.at(r.threshold) for r in found])
            made = np.array([r.promised for r in found])
            where = f'{name}, {groups*photos} photos of {groups} objects'
            broken = made & (true[:, 0] > MAX_ERROR)
            rows += [row(9, where, 'promises of 5 % that are broken', '<= 0.05', None, broken.mean(), repeats),
                     row(9, where, 'promises made', None, None, made.mean(), repeats),
                     row(9, where, 'true share of wrong labels', 'about 0.05', round(truth.at(0)[0], 3), true[:,
                         0].mean(),
                         repeats),
                     row(9, where, 'photos named', '>= 0.5', 1., true[:, 1].mean(), repeats)]
    return rows

def worst(repeats: int, seed: int) -> list[dict]:
    "A confidence that means nothing, and an error just above the limit: every promise is broken"
    rows = []
    for groups in (80, 300, 1500):
        made = []
        for rng in seeds(repeats, seed, 'worst', groups):
            sure = rng.uniform(.6, 1, groups)
            y = (rng.random(groups) < MAX_ERROR+.001).astype(int)
            made.append(recommend_refusal(y, np.column_stack([sure, 1-sure])).promised)
        rows.append(row(9, f'useless confidence, error 5.1 %, {groups} photos', 'promises of 5 % that are broken',
                        '<= 0.05', None, np.mean(made), repeats))
    return rows

def few(repeats: int, seed: int) -> list[dict]:
    "Sixty photos, of which 48 teach: nothing can be promised, and the stated limit has to hold all the same"
    rows = []
    for name, hard in MODELS.items():
        truth = Truth(hard)
        found = [recommend_refusal(*draw(rng, 48, 1, hard)) for rng in seeds(repeats, seed, 'few', name)]
        true = np.array([truth.at(r.threshold) for r in found])
        where = f'{name}, 48 photos'
        rows += [row(9, where, 'true share of wrong labels beyond the stated limit', '<= 0.05', None,
                     np.mean([e > r.bound for e, r in zip(true[:, 0], found, strict=True)]), repeats),
                 row(9, where, 'true share of wrong labels', 'none', round(truth.at(0)[0], 3), true[:, 0].mean(),
                     repeats),
                 row(9, where, 'photos named', 'about 0.5 or more', 1., true[:, 1].mean(), repeats)]
    return rows

def costs(repeats: int, seed: int) -> list[dict]:
    "Cost of the threshold, over that of the best one there is"
    rows = []
    for name, hard in MODELS.items():
        truth = Truth(hard)
        best = min(truth.cost(t, 10, 1) for t in np.linspace(.5, 1, 251))
        for photos in (48, 300):
            found = [recommend_refusal(*draw(rng, photos, 1, hard), costs=(10, 1))
                     for rng in seeds(repeats, seed, 'costs', name, photos)]
            paid = np.mean([truth.cost(r.threshold, 10, 1) for r in found])
            rows.append(row(9, f'{name}, wrong 10, refused 1, {photos} photos', 'mean cost over the least possible',
                            'about 1', round(truth.cost(0, 10, 1)/best, 3), paid/best, repeats))
    return rows

def passing_on(repeats: int, seed: int) -> list[dict]:
    "A cascade whose first tier blurs half of the certainties: a refusal ends there, or the photo is passed on"
    def tiers(rng, groups, hard):
        y, dear, code = draw(rng, groups, 1, hard)
        cheap = np.where(rng.random((groups, 1)) < .5, dear, .75*dear+.25*dear[:, ::-1])
        return y, [cheap, dear], code

    def served(proba, least, passes): return cascade_predictions(proba, [.6], least if passes else 0.)

    rows = []
    for name, hard in MODELS.items():
        truth, many, _ = tiers(np.random.default_rng(1), 200_000, hard)
        for passes, what in ((False, 'a refusal ends at the first tier'), (True, 'it is passed on')):
            found = []
            for rng in seeds(repeats, seed, 'passing on', name):
                y, proba, code = tiers(rng, 600, hard)
                chosen = recommend_refusal(y, lambda least, p=proba, on=passes: served(p, least, on), code)
                answers = served(many, chosen.threshold, passes)
                named = answers.max(1) >= chosen.threshold
                wrong = (answers.argmax(1)!=truth)[named].mean()
                found.append((chosen.promised, wrong, named.mean()))
            made, wrong, named = np.array(found, float).T
            where = f'{name}, 600 photos, two tiers, {what}'
            rows += [row(9, where, 'promises of 5 % that are broken', '<= 0.05', None,
                         ((made > 0) & (wrong > MAX_ERROR)).mean(), repeats),
                     row(9, where, 'true share of wrong labels', 'about 0.05', None, wrong.mean(), repeats),
                     row(9, where, 'photos named', '>= 0.5', None, named.mean(), repeats)]
    return rows

def photos_like(rng, centres, groups, photos):
    "Two blocks of features of photos in groups, and their labels"
    label = rng.integers(0, len(centres), groups)
    code = np.repeat(np.arange(groups), photos)
    near = centres[label]+rng.normal(size=(groups, centres.shape[1]))*.7
    blocks = {b: (near[code]+rng.normal(size=(len(code), centres.shape[1]))*.8).astype(np.float32) for b in ('a', 'b')}
    return blocks, np.char.add('c', label[code].astype(str)), code

def trained(repeats: int, seed: int) -> list[dict]:
    "The whole way: choice, calibration and threshold on the photos that taught, then 4,000 new objects"
    rows, some = [], max(4, repeats//15)
    for groups, photos in ((48, 1), (300, 1), (100, 3)):
        found: list[tuple[Refusal, float, float, float]] = []
        for rng in seeds(some, seed, 'trained', groups):
            centres = rng.normal(size=(4, 6))*1.1
            config = TrainingConfig(quick=True, novelty=False, cv_folds=3, jobs=1, models=('logistic_balanced',))
            model = HybridTrainer(config).fit(*photos_like(rng, centres, groups, photos)).model_
            blocks, labels, _ = photos_like(rng, centres, 4000, 1)
            proba = model.predict_proba(blocks)
            wrong, named = np.asarray(model.classes)[proba.argmax(1)]!=labels, proba.max(1) >= model.refusal.threshold
            found.append((model.refusal, wrong[named].mean(), named.mean(), wrong.mean()))
        error, named, before = (np.array([f[k] for f in found]) for k in (1, 2, 3))
        where = f'trained on {groups*photos} photos of {groups} objects'
        rows += [row(9, where, 'promises of 5 % that are broken', '<= 0.05', None,
                     np.mean([f[0].promised and f[1] > MAX_ERROR for f in found]), some),
                 row(9, where, 'promises made', None, None, np.mean([f[0].promised for f in found]), some),
                 row(9, where, 'true share of wrong labels beyond the stated limit', '<= 0.05', None,
                     np.mean([f[1] > f[0].bound for f in found]), some),
                 row(9, where, 'true share of wrong labels', None, round(before.mean(), 3), error.mean(), some),
                 row(9, where, 'photos named', None, 1., named.mean(), some)]
    return rows

CASES: dict[str, Callable[[int, int], list[dict]]] = {
    'refusal: promise': promise, 'refusal: worst case': worst, 'refusal: few photos': few, 'refusal: costs': costs,
    'refusal: passing on': passing_on, 'refusal: trained': trained}
