"The same photos, settings and seed give the same model, whatever else the machine does"
import threading

import numpy as np

from amulet_hybrid.core import bytes_digest
from amulet_hybrid.features.contract import BlockInfo
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model.inference import ServedModel

Y = np.repeat(np.arange(3), 30)
RNG = np.random.default_rng(0)
# the nets see the same, so that the cheaper one is not worse, and cost has to decide
SHARED = RNG.normal(size=(90, 12))+6*np.eye(12)[Y]
BLOCKS = {'small net': SHARED, 'large net': SHARED+RNG.normal(0, .01, SHARED.shape), 'shapes': RNG.normal(size=(90, 5))}
INFO = {'small net': BlockInfo(True, 'small', 60.), 'large net': BlockInfo(True, 'large', 400.), 'shapes': BlockInfo()}

def train(jobs=1):
    config = TrainingConfig(models=('logistic_balanced', 'lda_balanced'), cv_folds=3, cv_repeats=1, jobs=jobs)
    return HybridTrainer(config).fit(BLOCKS, Y.astype(str), np.arange(90), block_info=INFO)

def digest(trainer):
    "Of everything that a bundle would hold of the model"
    arrays = ServedModel.from_trained(trainer.model_, BLOCKS).to_arrays()
    return {name: bytes_digest(np.ascontiguousarray(a).tobytes()) for name, a in arrays.items()}

def test_load_changes_nothing():
    quiet, done = digest(train()), threading.Event()
    def burn():
        while not done.is_set(): np.linalg.svd(np.random.default_rng(0).normal(size=(120, 120)))
    busy = [threading.Thread(target=burn, daemon=True) for _ in range(3)]
    for thread in busy: thread.start()
    try: loaded = digest(train(jobs=2))
    finally:
        done.set()
        for thread in busy: thread.join()
    assert loaded==quiet and len(quiet) > 5

def test_cost_is_counted_and_decides():
    trainer = train()
    assert trainer.choice_['cost'].notna().all() and 'milliseconds' not in trainer.choice_
    assert not any('large net' in c.blocks for c in (m.candidate for m in trainer.model_.members))
    free = HybridTrainer(trainer.config).fit(BLOCKS, Y.astype(str), np.arange(90))
    assert free.choice_.index[free.choice_['chosen']].tolist() in (['ensemble'], ['stack'])
    assert free.choice_['cost'].isna().all()
