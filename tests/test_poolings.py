"""The covariance of a net's channels through training, a bundle and a classifier; a net's file that was exported before
there were so many poolings"""
import numpy as np
import onnx
import pytest

from amulet_hybrid.core import FeatureError
from amulet_hybrid.data.samples import LOGOS, draw_logo
from amulet_hybrid.features.cnn import CNNFeatures
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.contract import Photo
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model.bundle import HeldOut, save_bundle
from amulet_hybrid.model.cascade import fit_cascade
from amulet_hybrid.model.classifier import HybridClassifier
from amulet_hybrid.model.inference import THRESHOLDS


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

def test_through_a_bundle(cache, tmp_path):
    photos = [draw_logo(kind, seed=piece, side=96) for kind in LOGOS for piece in range(12)]
    labels,groups = np.repeat(list(LOGOS), 12),np.arange(12*len(LOGOS))
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'cnn:squeezenet1_1@second:side=64,96'),
                                                     weights='random'), cache)
    features = extractor.extract_batch(photos)
    config = TrainingConfig(cv_folds=3, cv_repeats=1, models=('logistic_balanced', 'lda_balanced'), quick=True, jobs=1)
    trainer = HybridTrainer(config).fit(features, labels, groups, extractor.encoders(), extractor.block_info)
    assert any('@second' in block for block in trainer.model_.blocks)
    cascade = fit_cascade(trainer, features, groups, extractor.extractors, thresholds=THRESHOLDS)
    save_bundle(tmp_path/'bundle', trainer.model_, extractor, cascade=cascade, held_out=HeldOut(features, photos))
    served = HybridClassifier(tmp_path/'bundle', enable_caching=False)
    want = trainer.model_.predict_proba({b: X[:6] for b,X in features.items()})
    found = [list(served.classify(photo, route='ensemble').probabilities.values()) for photo in photos[:6]]
    np.testing.assert_allclose(found, want, atol=1e-4)

def test_a_file_with_fewer_poolings_still_answers(cache, tmp_path):
    new = CNNFeatures('squeezenet1_1', weights='random', side=64, cache_dir=cache)
    model = onnx.load(new.onnx_path())
    outputs = {o.name: o for o in model.graph.output}
    del model.graph.output[:]
    model.graph.output.extend(outputs[f'pooled_{pool}'] for pool in ('mean', 'max', 'texture', 'gem'))
    onnx.save(model, tmp_path/'old.onnx')
    photo = Photo(draw_logo(next(iter(LOGOS)), seed=0, side=96))
    old = CNNFeatures('squeezenet1_1', side=64, onnx=tmp_path/'old.onnx')
    np.testing.assert_allclose(old.extract_features(photo), new.extract_features(photo), atol=1e-5)
    with pytest.raises(FeatureError, match='unknown_pooling'):
        CNNFeatures('squeezenet1_1@second', side=64, onnx=tmp_path/'old.onnx').prepare()
