"A class taught to the trained bundle of the tests, by the command line and by Python, and taken out again"
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amulet_hybrid.core import BundleError, ConfigError, DatasetError
from amulet_hybrid.data.samples import DESIGNS, draw_amulet
from amulet_hybrid.model.bundle import load_bundle
from amulet_hybrid.model.bundle_files import MANIFEST, SIGNATURE, verify_bundle
from amulet_hybrid.model.classifier import HybridClassifier
from amulet_hybrid.model.teaching import forget, teach

MAIN = 'from amulet_hybrid.cli.app import main; main()'
OLD = Path(__file__).resolve().parent/'data'/'bundle_0_1_0'/'bundle'

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('new')
    for piece in range(7):
        Image.fromarray(draw_amulet(DESIGNS['thuat_oval'], seed=piece, view=0, side=96)).save(folder/f'{piece}.png')
    return sorted(folder.iterdir())

@pytest.fixture(scope='module')
def taught(trained, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp('taught')
    return folder/'bundle',teach(trained/'bundle', 'oval', photos[:5], folder/'bundle', trained/'key.pem')

def test_it_is_a_whole_signed_bundle(trained, taught):
    folder,report = taught
    manifest = verify_bundle(folder, trained/'key.pem.pub')
    before = load_bundle(trained/'bundle')
    assert manifest['digest']==report.digest!=before.manifest['digest']
    assert manifest['classes']==[*before.classes, 'oval'] and manifest['taught'][0]['parent']==before.manifest['digest']
    assert 'taught from 5 photos, not validated' in (folder/'MODEL_CARD.html').read_text(encoding='utf-8')
    assert json.dumps(report.to_dict()) and '5 photos' in report._repr_html_()
    assert 0 <= report.interval[0] <= report.recognised/5 <= report.interval[1] <= 1

def test_taught_photos_are_named_and_the_order_of_the_old_classes_stays(trained, taught, photos):
    before,after = (HybridClassifier(f, enable_caching=False) for f in (trained/'bundle', taught[0]))
    for photo in photos[:5]: assert after.classify(photo, confidence_threshold=0, route='ensemble').top=='oval'
    for photo in (trained/'photo.png', photos[6]):
        old,new = (c.classify(photo, route='ensemble').probabilities for c in (before, after))
        rest = np.array([new[c] for c in old])
        np.testing.assert_allclose(rest/rest.sum(), list(old.values()), atol=1e-9)
        assert sum(new.values())==pytest.approx(1)

def test_every_tier_answers_and_a_blind_one_is_not_asked_first(taught, photos):
    classifier = HybridClassifier(taught[0], enable_caching=False)
    needed = set(classifier.bundle.photos.blocks)
    for tier in classifier.bundle.tiers:
        found = classifier.classify(photos[6], route=tier.name)
        assert set(found.probabilities)==set(classifier.classes)
        assert tier.threshold <= 1 or not needed <= set(tier.model.blocks)
    assert classifier.classify([photos[5], photos[6]]).prediction_set
    assert classifier.classify(photos[5], coverage=.99).coverage==.99

def test_forgetting_gives_the_bundle_of_before(trained, taught, tmp_path):
    parent = load_bundle(trained/'bundle').manifest
    assert forget(taught[0], 'oval', tmp_path/'again', trained/'key.pem')==parent['digest']
    for name in parent['files']: assert (tmp_path/'again'/name).read_bytes()==(trained/'bundle'/name).read_bytes()

def test_a_signed_bundle_wants_a_key(trained, photos, taught, tmp_path):
    with pytest.raises(BundleError, match='no_key'): teach(trained/'bundle', 'oval', photos[:5], tmp_path/'x')
    with pytest.raises(BundleError, match='no_key'): forget(taught[0], 'oval', tmp_path/'x')
    assert not (tmp_path/'x').exists() and (taught[0]/SIGNATURE).is_file()

def test_what_cannot_be_taught(trained, photos, taught, tmp_path):
    key,bundle = trained/'key.pem',load_bundle(trained/'bundle')
    with pytest.raises(ConfigError, match='class_exists'): teach(bundle, bundle.classes[0], photos, tmp_path/'x', key)
    with pytest.raises(ConfigError, match='class_exists'): teach(taught[0], 'Oval', photos, tmp_path/'x', key)
    with pytest.raises(DatasetError, match='same file'): teach(bundle, 'oval', [photos[0]]*5, tmp_path/'x', key)
    with pytest.raises(DatasetError, match='known as oval'): teach(taught[0], 'egg', photos[:5], tmp_path/'x', key)
    with pytest.raises(BundleError, match='not_empty'): teach(bundle, 'oval', photos, trained, key)
    with pytest.raises(BundleError, match='no_statistics'): teach(OLD, 'oval', photos, tmp_path/'x')

@pytest.mark.parametrize('change', [{'format': 3}, {'taught': []}, {'taught': None}, {'taught': [{'label': 'circle'}]}])
def test_a_manifest_that_says_otherwise_is_refused(taught, tmp_path, change):
    import shutil

    from amulet_hybrid.model.bundle_files import write_manifest
    folder = tmp_path/'bundle'
    shutil.copytree(taught[0], folder)
    (folder/SIGNATURE).unlink()
    write_manifest(folder, json.loads((folder/MANIFEST).read_text()) | change)
    with pytest.raises(BundleError): load_bundle(folder)

def test_commands(trained, photos, tmp_path):
    def amulet(*words):
        return subprocess.run([sys.executable, '-c', MAIN, *map(str, words)], capture_output=True, text=True)
    common = ('--label', 'oval', '--key', trained/'key.pem')
    done = amulet('teach', photos[0].parent, *common, '--model-dir', trained/'bundle', '--output-dir', tmp_path/'b')
    assert done.returncode==0 and '7 photos' in done.stdout, done.stderr
    done = amulet('forget', *common, '--model-dir', tmp_path/'b', '--output-dir', tmp_path/'c')
    assert done.returncode==0 and load_bundle(trained/'bundle').version in done.stdout, done.stderr
    done = amulet('teach', photos[0], *common, '--model-dir', trained/'bundle', '--output-dir', tmp_path/'d')
    assert done.returncode==1 and 'too_few_photos' in done.stderr
