"""A bundle of version 0.1.0, made before the modules moved into folders, still answers as it did; one that cannot be
read names the version that reads it"""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from amulet_hybrid.core import BundleError
from amulet_hybrid.model.bundle import load_bundle
from amulet_hybrid.model.bundle_files import MANIFEST, verify_bundle, write_manifest
from amulet_hybrid.model.classifier import HybridClassifier

OLD = Path(__file__).resolve().parent/'data'/'bundle_0_1_0'
EXPECTED = json.loads((OLD/'expected.json').read_text())

@pytest.fixture(scope='module')
def classifier(): return HybridClassifier(OLD/'bundle', enable_caching=False)

def edited(folder, **changes):
    "A copy with a changed manifest, its checksums in order"
    shutil.copytree(OLD/'bundle', folder)
    write_manifest(folder, {**json.loads((folder/MANIFEST).read_text()), **changes})
    return folder

def test_it_loads(classifier):
    assert verify_bundle(OLD/'bundle')['versions']['amulet_hybrid']=='0.1.0'
    assert classifier.model_version==EXPECTED['version']
    assert classifier.bundle.model.projections and classifier.bundle.model.novelty is not None

@pytest.mark.parametrize('photo', EXPECTED['photos'])
def test_it_answers_as_it_did(classifier, photo):
    want = EXPECTED['photos'][photo]
    found = classifier.classify(OLD/photo)
    assert found.label==want['label']
    np.testing.assert_allclose(found.novelty, want['novelty'], atol=1e-6)
    for route in ('cascade', 'rules', 'ensemble'):
        probabilities = classifier.classify(OLD/photo, route=route).probabilities
        assert list(probabilities)==list(want[route])
        np.testing.assert_allclose(list(probabilities.values()), list(want[route].values()), atol=1e-6)

@pytest.mark.parametrize('made,code', [(99, 'newer_format'), (2, 'older_format')])
def test_another_format_names_the_version_that_reads_it(tmp_path, made, code):
    folder = edited(tmp_path/'bundle', format=made, versions={'amulet_hybrid': '7.8.9'})
    with pytest.raises(BundleError, match=code) as caught: load_bundle(folder)
    assert 'amulet_hybrid 7.8.9' in str(caught.value) # the one that made it, and so reads it

def test_other_features_name_the_version_that_reads_them(tmp_path):
    blocks = json.loads((OLD/'bundle'/MANIFEST).read_text())['blocks']
    changed = {name: {**block, 'fingerprint': '0'*16} for name,block in blocks.items()}
    folder = edited(tmp_path/'bundle', blocks=changed)
    with pytest.raises(BundleError, match='other_features') as caught: load_bundle(folder)
    assert 'amulet_hybrid 0.1.0' in str(caught.value)
