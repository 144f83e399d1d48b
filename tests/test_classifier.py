"A classifier and its bundle under attack and under load; the long version is benchmarks/classifier.py"
import importlib.util
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from amulet_hybrid.data.samples import LOGOS, draw_logo
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model.bundle import HeldOut, load_bundle, save_bundle
from amulet_hybrid.model.cascade import fit_cascade
from amulet_hybrid.model.classifier import HybridClassifier

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def bench():
    "benchmarks/classifier.py as a module"
    spec = importlib.util.spec_from_file_location('classifier_bench', ROOT/'benchmarks'/'classifier.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope='module')
def trained():
    photos = [draw_logo(kind, seed=piece, view=view, side=96) for kind in LOGOS for piece in range(10)
              for view in range(2)]
    labels,groups = np.repeat(list(LOGOS), 20),np.repeat(np.arange(10*len(LOGOS)), 2)
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'lbp', 'cnn:squeezenet1_1'), weights='random',
                                                     cnn_side=64))
    features = extractor.extract_batch(photos)
    def fit():
        config = TrainingConfig(cv_folds=3, cv_repeats=1, models=('logistic_balanced', 'svm', 'extra_trees'), jobs=1)
        trainer = HybridTrainer(config).fit(features, labels, groups)
        return trainer,fit_cascade(trainer, features, groups, extractor.extractors)
    return photos,features,extractor,fit

@pytest.fixture(scope='module')
def folder(trained, tmp_path_factory):
    photos,features,extractor,fit = trained
    trainer,cascade = fit()
    out = tmp_path_factory.mktemp('bundles')
    save_bundle(out/'bundle', trainer.model_, extractor, cascade=cascade, held_out=HeldOut(features, photos))
    return out

def test_200_changed_bundles_are_refused(bench, folder):
    found,ran = bench.tampering(folder/'bundle')
    assert len(found) >= 200 and not ran
    assert [(n, c) for n,c in found if c=='read' or c.startswith('raised')]==[]

def test_hostile_photos_get_structured_answers(bench, folder, caplog):
    caplog.set_level(logging.CRITICAL)
    got = bench.hostile(HybridClassifier(folder/'bundle'), 400)
    assert got['structured answers']==got['photos']==400 and got['refused'] > 200

def test_threads_answer_as_one(bench, folder):
    got = bench.many_threads(load_bundle(folder/'bundle'), seconds=2, threads=20, photos=12)
    assert (got['errors'], got['answers that differ'])==(0, 0) and got['answers'] > 20

def test_same_photos_same_digest(trained, folder, tmp_path):
    "Trained and fitted once more: nothing in a bundle depends on the clock"
    photos,features,extractor,fit = trained
    trainer,cascade = fit()
    assert save_bundle(tmp_path/'again', trainer.model_, extractor,
                       cascade=cascade)==load_bundle(folder/'bundle').manifest['digest']

def test_card_and_requirements(folder):
    page,text = (folder/'bundle'/'MODEL_CARD.html').read_text(),(folder/'bundle'/'MODEL_CARD.md').read_text()
    assert 'genuine' in page and 'http' not in page and all(kind in text for kind in LOGOS)
    lines = [line for line in (folder/'bundle'/'requirements_production.txt').read_text().splitlines()
             if not line.startswith('#')]
    assert {re.split('==', line)[0] for line in lines} >= {'numpy', 'pillow', 'onnxruntime',
                                                           'fastapi'} and not any('torch' in line or 'scikit' in line
            for line in lines)

@pytest.fixture
def redis_url():
    "A Redis server in this process that speaks its protocol"
    fakeredis = pytest.importorskip('fakeredis')
    import threading
    server = fakeredis.TcpFakeServer(('127.0.0.1', 0), server_type='redis')
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'redis://127.0.0.1:{server.server_address[1]}/0'
    finally: server.shutdown(); server.server_close()

def test_replicas_share_answers(folder, redis_url, monkeypatch):
    "Two classifiers with one secret"
    monkeypatch.setenv('AMULET_CACHE_KEY', 'of all the replicas')
    one,other = (HybridClassifier(folder/'bundle', enable_caching=redis_url) for _ in range(2))
    photo = draw_logo('text', seed=500, side=96)
    first,second = one.classify(photo),other.classify(photo)
    assert not first.cached and second.cached and first==second
    key = one.cache._client.keys('amulet:*')[0]
    one.cache._client.set(key, b'\x80\x04cos\nsystem\n')
    assert other.classify(photo)==first and json.dumps(first.to_dict())

def test_who_can_write_into_redis_cannot_choose_answers(folder, redis_url, monkeypatch):
    "Answers that are well formed, and made elsewhere, changed, or of another photo"
    monkeypatch.setenv('AMULET_CACHE_KEY', 'of all the replicas')
    one,other = (HybridClassifier(folder/'bundle', enable_caching=redis_url) for _ in range(2))
    photos = [draw_logo(kind, seed=501, side=96) for kind in ('text', 'simple')]
    answers = [one.classify(photo) for photo in photos]
    client = one.cache._client
    keys = sorted(client.keys('amulet:*'))
    whole = {key: client.get(key) for key in keys}
    wanted = json.loads(whole[keys[0]][32:])
    wanted['proba'] = wanted['proba'][::-1]
    chosen = json.dumps(wanted).encode()
    monkeypatch.setenv('AMULET_CACHE_KEY', 'of somebody else entirely')
    stranger = HybridClassifier(folder/'bundle', enable_caching=redis_url).cache
    for values in ([chosen]*2, [v[:32]+chosen for v in whole.values()], [whole[key] for key in keys[::-1]],
                   [stranger._mac(key.decode(), chosen)+chosen for key in keys], [b'', b'\0'*40],
                   [bytes(3*2**20)]*2):
        before = other.cache.forged
        for key,value in zip(keys, values): client.set(key, value)
        found = [other.classify(photo) for photo in photos]
        assert found==answers and not any(a.cached for a in found)
        assert other.cache.forged==before+sum(map(bool, values))
    assert all(a.cached for a in map(one.classify, photos)) # what `other` has put there since is believed

def test_without_a_secret_each_process_believes_itself(folder, redis_url, monkeypatch, caplog):
    monkeypatch.delenv('AMULET_CACHE_KEY', raising=False)
    one,other = (HybridClassifier(folder/'bundle', enable_caching=redis_url) for _ in range(2))
    photo = draw_logo('text', seed=502, side=96)
    assert not one.classify(photo).cached and one.classify(photo).cached
    assert not other.classify(photo).cached and other.cache.forged==1
    assert 'AMULET_CACHE_KEY' in caplog.text

def test_a_redis_server_that_goes_away(folder):
    from amulet_hybrid.model.answer_cache import RedisCache
    one = HybridClassifier(folder/'bundle', enable_caching=RedisCache('redis://127.0.0.1:1/0'))
    photo = draw_logo('text', seed=503, side=96)
    assert one.classify(photo, route='ensemble').top and one.cache.failures==1
