"Everything that takes a feature matrix keeps scikit-learn's promises; and a leak inside groups is not rewarded"
import importlib
import pkgutil
import warnings

import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.estimator_checks import check_estimator

import amulet_hybrid
from amulet_hybrid.features.table import TableEncoder
from amulet_hybrid.jobs.sections import random_split_note
from amulet_hybrid.learn.candidates import MODELS, BlockScaler
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.ood_detectors import (
    DistanceDetector,
    KernelDetector,
    KNNDetector,
    LinearHead,
    MahalanobisDetector,
    ViMDetector,
)
from amulet_hybrid.learn.ood_spaces import Axes
from amulet_hybrid.learn.trainer import HybridTrainer

NO_MATRIX = { # Estimators that take something else than any matrix of numbers, and what
    'Preprocessor': 'photos',
    'BaseFeatureExtractor': 'photos',
    'KeypointEncoder': 'rows of packed descriptors, whose width says how many bytes each has',
    'CovarianceEncoder': 'rows of packed covariances, whose width says how many channels they are of',
    'FineTunedTail': 'rows of square maps of the channels of a net',
    'HybridTrainer': 'blocks by name, with labels and groups',
    'ConformalPredictor': 'rows of probabilities that sum to 1, with labels that are indices into them',
    '_Scaler': 'logits, with labels that are indices into their columns'}
BASES = {'BaseDetector', 'LogitDetector', '_Scaler'} # Without a method that says anything

def estimators():
    "Every estimator class of ours by name"
    out = {}
    for module in pkgutil.walk_packages(amulet_hybrid.__path__, 'amulet_hybrid.'):
        if '.migrations' in module.name: continue # Alembic runs these
        for thing in vars(importlib.import_module(module.name)).values():
            if isinstance(thing, type) and issubclass(thing,
                                                      BaseEstimator) and thing.__module__.startswith('amulet_hybrid'):
                out[thing.__name__] = thing
    return out

def takes_matrix(cls): return not {c.__name__ for c in cls.__mro__} & set(NO_MATRIX)

CHECKED = {name: cls for name,cls in sorted(estimators().items()) if takes_matrix(cls) and name not in BASES}
OTHERWISE = [BlockScaler(power=.5), BlockScaler(dimensions=2), BlockScaler(variance=1.),
             TableEncoder(indicators=0., log=0.), TableEncoder(categories=(0,)),
             Axes(most=2), KNNDetector(k=5, unit=False), MahalanobisDetector(shrinkage=.1), KernelDetector(limit=20),
             ViMDetector(axes=1), DistanceDetector(shrinkage=.1), LinearHead(C=1.)]

def name_of(estimator): return str(estimator).replace(' ', '')

LSQR = ("with the solver that we use, scikit-learn's own LDA fails it too: it has a `transform` that only says that it "
        "has none")

def failing(estimator):
    return {r['check_name'] for r in check_estimator(estimator, on_fail=None, on_skip=None) if r['status']=='failed'}

SMALL = {'IsolationForestDetector': {'trees': 20}} # so that hundreds of fits take seconds

def check(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # of checks that are skipped for want of other packages, and of fits on ten rows
        failed = ({name: LSQR for name in failing(LinearDiscriminantAnalysis(**estimator.get_params()))}
                  if getattr(estimator, 'solver', '')=='lsqr' else None)
        check_estimator(estimator, expected_failed_checks=failed)

def test_nothing_is_left_out():
    "The list of exceptions names only what there is, and the rest is many"
    found = estimators()
    assert {'BlockScaler', 'CosineKNN', 'ClassMeans', 'BalancedLDA', 'TableEncoder', 'Axes', 'LinearHead',
            'KNNDetector', 'ViMDetector'} <= set(CHECKED) and len(CHECKED) >= 16
    assert set(NO_MATRIX) <= set(found) and not set(NO_MATRIX) & set(CHECKED)

@pytest.mark.parametrize('name', CHECKED)
def test_estimator(name): check(CHECKED[name](**SMALL.get(name, {})))

@pytest.mark.parametrize('estimator', OTHERWISE, ids=name_of)
def test_estimator_with_other_settings(estimator): check(estimator)

@pytest.mark.parametrize('name',
                         [name for name,make in MODELS.items() if type(make(0)).__module__.startswith('amulet_hybrid')])
def test_candidate_as_it_is_used(name): check(MODELS[name](0))

def planted(seed=0, groups=60, photos=6):
    "Photos whose only clue is a number that equals the label of their group, differently written in each group"
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), photos)
    y = np.arange(groups)%2
    mark = np.eye(groups)*np.where(y, 1., -1.)[:,None] # the leak: a column a group that says its label
    noise = rng.normal(size=(len(group), 20))
    return {'noise': noise, 'marks': 8*mark[group]+.1*rng.normal(size=(len(group), groups))},y[group],group

def test_planted_leak_is_not_rewarded():
    "Random folds are fooled, grouped ones are not, and the report says so"
    blocks,y,groups = planted()
    trainer = HybridTrainer(TrainingConfig(quick=True, novelty=False, jobs=1),
                            joins=[('marks',), ('noise', 'marks')]).fit(blocks, y.astype(str), groups)
    def score(p): return balanced_accuracy_score(y, p.argmax(1))
    found,(level,text) = random_split_note(trainer, groups)
    assert found['random_folds'] > .95 and abs(found['grouped_folds']-.5) < .15 and found['gap']['low'] > .2
    assert level=='warning' and 'far more than new photos will' in text
    assert score(trainer.oof_proba_) < .65 # nor does the vote, its selection or its calibration hand it on
    rng = np.random.default_rng(1) # photos of other groups bear none of these marks
    new,truth = {'noise': rng.normal(size=(400, 20)), 'marks': .1*rng.normal(size=(400, 60))},np.arange(400)%2
    assert .35 < balanced_accuracy_score(truth.astype(str), trainer.model_.predict(new)) < .65

def test_planted_leak_does_not_beat_an_honest_block():
    "Given an honest block beside the leak, what is chosen and what is said are the honest block's"
    blocks,y,groups = planted(seed=2)
    rng = np.random.default_rng(3)
    blocks['honest'] = np.where(y, 1., -1.)[:,None]*.7+rng.normal(size=(len(y), 4))
    trainer = HybridTrainer(TrainingConfig(quick=True, novelty=False, jobs=1),
                            joins=[('marks',), ('honest',)]).fit(blocks, y.astype(str), groups)
    assert trainer.best_single_.blocks==('honest',)
    assert balanced_accuracy_score(y, trainer.oof_proba_.argmax(1)) > .85
