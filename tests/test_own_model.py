"A classifier of one's own: any number of processes, and bundles that hold it or say how they could"
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.naive_bayes import GaussianNB

from amulet_hybrid.core import BundleError, ConfigError
from amulet_hybrid.learn.candidates import MODELS
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model.inference import ServedModel

LABELS, GROUPS = np.repeat(['a', 'b', 'c'], 12), np.arange(36)
ROWS = {'block': np.random.default_rng(0).normal(size=(36, 8))+2*np.eye(8)[np.repeat(range(3), 12)]}

class Nearest(ClassifierMixin, BaseEstimator):
    "That no converter knows"
    def fit(self, X, y):
        self.classes_, self.rows_, self.y_, self.n_features_in_ = np.unique(y), X, y, X.shape[1]
        return self

    def predict_proba(self, X):
        near = self.y_[((X[:, None]-self.rows_)**2).sum(2).argmin(1)]
        return .9*(near[:, None]==self.classes_)+.1/len(self.classes_)

@pytest.fixture
def own():
    MODELS.update(nb=lambda seed: GaussianNB(), nearest=lambda seed: Nearest())
    yield
    for name in ('nb', 'nearest'): MODELS.pop(name)

def trained(jobs, *models):
    config = TrainingConfig(models=models, cv_folds=3, cv_repeats=1, jobs=jobs, novelty=False)
    return HybridTrainer(config).fit(ROWS, LABELS, GROUPS)

def test_any_number_of_jobs(own):
    one, two = trained(1, 'nb', 'nearest', 'lda_balanced'), trained(2, 'nb', 'nearest', 'lda_balanced')
    assert {c.model for c in two.oof_}=={'nb', 'nearest', 'lda_balanced'}
    for c, p in one.oof_.items(): np.testing.assert_array_equal(p, two.oof_[c])
    np.testing.assert_array_equal(one.model_.predict_proba(ROWS), two.model_.predict_proba(ROWS))

def test_workers_that_were_there_before():
    "Worker processes stay alive between trainings; an entry that is added later reaches them too"
    code = textwrap.dedent('''
        import numpy as np
        from sklearn.naive_bayes import GaussianNB
        from amulet_hybrid.learn.candidates import MODELS
        from amulet_hybrid.learn.config import TrainingConfig
        from amulet_hybrid.learn.trainer import HybridTrainer
        class Mine(GaussianNB): "defined in a script, not in a module"
        rows = {'block': np.random.default_rng(0).normal(size=(36, 8))}
        def fit(*models):
            config = TrainingConfig(models=models, cv_folds=3, cv_repeats=1, jobs=2, novelty=False)
            return HybridTrainer(config).fit(rows, np.repeat(['a', 'b', 'c'], 12), np.arange(36))
        fit('lda_balanced')
        MODELS['mine'] = lambda seed: Mine()
        print({c.model for c in fit('mine').oof_})
    ''')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300,
                         env={'AMULET_PROGRESS': 'off', 'PATH': ''})
    assert out.stdout.strip()=="{'mine'}", out.stderr[-2000:]

def test_unknown_name_is_refused():
    with pytest.raises(ConfigError, match='nb'): TrainingConfig(models=('nb',))

def test_served_or_refused_with_the_way_out(own):
    model = trained(1, 'nb').model_
    served = ServedModel.from_trained(model, ROWS) # by way of ONNX
    np.testing.assert_allclose(served.predict_proba(ROWS), model.predict_proba(ROWS), atol=1e-5)
    with pytest.raises(BundleError) as error: ServedModel.from_trained(trained(1, 'nearest').model_, ROWS)
    assert error.value.code=='not_convertible' and 'CONVERTERS' in error.value.advice

def test_changed_settings_are_not_taken_from_the_checkpoint(own, tmp_path):
    config = TrainingConfig(models=('nb',), cv_folds=3, cv_repeats=1, jobs=1, novelty=False)
    def fit(): return next(iter(HybridTrainer(config, checkpoint_dir=tmp_path).fit(ROWS, LABELS, GROUPS).oof_.values()))
    first = fit()
    np.testing.assert_array_equal(fit(), first)
    MODELS['nb'] = lambda seed: GaussianNB(var_smoothing=.5)
    assert (fit()!=first).any()
