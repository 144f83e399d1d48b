"Why this answer: sums that hold, of old and new bundles, of every tier, of matched photos, of real photos, of tables"
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from amulet_hybrid.core import AmuletError
from amulet_hybrid.features import nets
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.jobs.table import TableRun, predict_table
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model.bundle import load_bundle, save_bundle
from amulet_hybrid.model.classifier import HybridClassifier

OLD = Path(__file__).resolve().parent/'data'/'bundle_0_1_0'
SHARED = Path(__file__).resolve().parent.parent.parent/'shared'

def check_sum(classifier, photo, **asked):
    "The explanation, after its sum was held against the probabilities that are served"
    found = classifier.explain(photo, **asked)
    p = classifier.classify(photo, confidence_threshold=0, route=asked.get('route')).probabilities
    assert abs(found.margin-np.log(p[found.label]/p[found.against])) < 1e-6
    assert abs(found.check) < 1e-4
    assert abs(found.baseline+sum(part.contribution for part in found.parts)-found.margin) < 1e-4
    assert abs(found.places.sum()-sum(part.placed for part in found.parts)) < 1e-6
    json.dumps(found.to_dict(), allow_nan=False)
    return found

@pytest.mark.parametrize('route', ['rules', 'ensemble'])
def test_an_old_bundle_says_why(route):
    classifier = HybridClassifier(OLD/'bundle', enable_caching=False)
    found = check_sum(classifier, OLD/'photo_1.png', route=route)
    assert found.route==route and found.parts

@pytest.mark.parametrize('route', ['rules', 'neural', 'ensemble', 'cascade'])
def test_every_tier_says_why(trained, route):
    classifier = HybridClassifier(trained/'bundle', enable_caching=False)
    found = check_sum(classifier, trained/'photo.png', route=route)
    assert route in (found.route, 'cascade')
    turned = classifier.explain(trained/'photo.png', found.against, found.label, route)
    np.testing.assert_allclose(turned.places, -found.places, atol=1e-6)
    assert abs(turned.margin+found.margin) < 1e-9

def test_the_net_is_passed_once(trained, monkeypatch):
    classifier,count = HybridClassifier(trained/'bundle', enable_caching=False),[]
    for name in ('run', 'run_maps'):
        own = getattr(nets.ExportedNet, name)
        monkeypatch.setattr(nets.ExportedNet, name,
                            lambda net, *args, own=own, name=name: count.append(name) or own(net, *args))
    classifier.explain(trained/'photo.png', route='ensemble')
    assert set(count) <= {'run_maps'} and len(count) <= 1

def test_without_the_file_of_the_net_its_part_is_a_bar(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(nets, '_NETS', type(nets._NETS)()) # not one that another test has loaded
    classifier = HybridClassifier(shutil.copytree(trained/'bundle', tmp_path/'bundle'), enable_caching=False)
    for path in (tmp_path/'bundle').glob('*.onnx'): path.unlink()
    found = check_sum(classifier, trained/'photo.png', route='neural')
    if any(p.block.startswith('cnn') for p in found.parts): assert 'no places' in ' '.join(found.notes)
    assert found.placed==0

def test_what_cannot_be_asked(trained):
    classifier = HybridClassifier(trained/'bundle', enable_caching=False)
    for asked in ({'label': '?'}, {'against': '?'}, {'label': 'simple', 'against': 'simple'}, {'route': '?'}):
        with pytest.raises(AmuletError): classifier.explain(trained/'photo.png', **asked)
    with pytest.raises(AmuletError): classifier.explain(b'no photo')
    with pytest.raises(AmuletError): classifier.explain_features({'a': 1})

@pytest.mark.parametrize('name', ['amulet6', 'magtile', 'coins'])
def test_real_photos_of_every_set(name, tmp_path):
    root = Path(os.environ.get('AMULET_DATA') or SHARED/'data')/name
    if not root.exists(): pytest.skip(f'{root} is not there: set AMULET_DATA')
    classes = sorted(p for p in root.iterdir() if p.is_dir())[:4]
    files = [(p.name, f) for p in classes for f in sorted(p.rglob('*.*'))[:22]]
    photos,labels = [f for _,f in files],np.array([c for c,_ in files])
    blocks = ('colour', 'hog', 'lbp', 'cnn:efficientnet_lite0', 'cnn:efficientnet_lite0@second')
    extractor = HybridFeatureExtractor(FeatureConfig(blocks))
    rows = extractor.extract_batch(photos)
    config = TrainingConfig(quick=True, models=('ridge', 'logistic_balanced'), novelty=False)
    trainer = HybridTrainer(config).fit(rows, labels, np.arange(len(labels)), extractor.encoders(),
                                        extractor.block_info)
    widest = [c for c in trainer.oof_ if len(c.blocks)==max(len(c.blocks) for c in trainer.oof_)]
    model = trainer.refit(rows, {c: 1/len(widest) for c in widest}, trainer.model_.calibrator)
    save_bundle(tmp_path/'bundle', model, extractor)
    classifier = HybridClassifier(tmp_path/'bundle', enable_caching=False)
    for photo in photos[::7]:
        found = check_sum(classifier, photo)
        assert np.abs(found.places).sum() > 0
        assert isinstance(found.overlay(), Image.Image)

def test_a_row_by_its_columns(tmp_path):
    rng = np.random.default_rng(0)
    sheet = pd.DataFrame(rng.normal(size=(120,4)), columns=list('abcd'))
    sheet['word'] = np.where(rng.random(120) > .5, 'x', 'y')
    sheet.loc[rng.random(120) < .2, 'b'] = np.nan
    sheet['kind'] = np.where(sheet['a']+(sheet['word']=='x') > .5, 'one', 'two')
    sheet.to_csv(tmp_path/'t.csv', index=False)
    folder = TableRun(tmp_path/'t.csv', target='kind', output_dir=tmp_path/'run', quick=True).run()['bundle']
    classifier,shares = HybridClassifier(folder, enable_caching=False),[]
    for i,p in predict_table(load_bundle(folder), sheet[:10], 0).iterrows():
        row = {k: None if pd.isna(v) else v for k,v in sheet.loc[i, list(classifier.columns)].items()}
        found = classifier.explain_features(row, 'one', 'two')
        assert abs(found.margin-np.log(p['p_one']/p['p_two'])) < 1e-6
        assert abs(found.check) < 1e-4
        assert abs(found.baseline+sum(found.columns.values())-found.margin) < 1e-4
        assert set(found.columns)==set(classifier.columns) and found.places is None
        shares.append(sum(abs(found.columns[c]) for c in ('a', 'word'))/sum(map(abs, found.columns.values())))
    assert np.mean(shares) > .6
    with pytest.raises(AmuletError): classifier.explain(np.zeros((8,8,3), np.uint8))
