"Many photos at once: what a batch may be given as"
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amulet_hybrid.core import ConfigError, DatasetError
from amulet_hybrid.model.classifier import HybridClassifier
from amulet_hybrid.model.prediction import Failure, Prediction

OLD = Path(__file__).resolve().parent/'data'/'bundle_0_1_0'

@pytest.fixture(scope='module')
def classifier(): return HybridClassifier(OLD/'bundle')

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'deep').mkdir()
    shutil.copy(OLD/'photo_1.png', tmp_path/'a.png')
    shutil.copy(OLD/'photo_2.png', tmp_path/'deep'/'b.png')
    (tmp_path/'notes.txt').write_text('not a photo')
    (tmp_path/'.hidden').write_text('')
    return tmp_path

@pytest.fixture
def want(classifier): return [classifier.classify(OLD/f'photo_{i}.png') for i in (1, 2)]

def test_a_text_is_a_folder_a_pattern_or_a_path(classifier, folder, want):
    for source in (folder, str(folder)):
        found = classifier.classify_batch(source)
        assert [a.success for a in found]==[True, True, False] and found[:2]==want
    assert classifier.classify_batch(f'{folder}/**/*.png')==want
    assert classifier.classify_batch(folder/'*.png')==want[:1]
    assert classifier.classify_batch(str(folder/'a.png'))==want[:1]

def test_nothing_found_is_said(classifier, folder):
    with pytest.raises(DatasetError, match='no_such_folder'): classifier.classify_batch('photos')
    with pytest.raises(DatasetError, match='no_photos'): classifier.classify_batch(f'{folder}/*.jpg')
    with pytest.raises(ConfigError, match='unsupported_type'): classifier.classify_batch(7)
    assert classifier.classify_batch([])==[]

def test_bytes_and_arrays(classifier, folder, want):
    data,pixels = (folder/'a.png').read_bytes(),np.asarray(Image.open(folder/'a.png').convert('RGB'))
    for one in (data, pixels, Image.open(folder/'a.png')):
        for given in (one, [one], (p for p in [one])):
            (found,) = classifier.classify_batch(given)
            assert found.top==want[0].top and found.probabilities==want[0].probabilities
    assert len(classifier.classify_batch(np.stack([pixels]*3)))==3
    assert classifier.classify_batch([[data, data]])[0].top==want[0].top # two photos of one object

def test_a_bad_photo_stays_in_its_place(classifier, folder):
    first,bad,last = classifier.classify_batch([folder/'a.png', folder/'notes.txt', folder/'deep'/'b.png'])
    assert isinstance(first, Prediction) and isinstance(last, Prediction)
    assert isinstance(bad, Failure) and bad.to_dict()['error_code']=='unsupported_format'

def test_names_come_with_answers(classifier, folder):
    assert [name for name,_ in classifier.stream_directory(folder)]==['a.png', 'deep/b.png', 'notes.txt']
    table = classifier.predict_directory(f'{folder}/**/*.png', confidence_threshold=1.)
    assert table['label'].isna().all() and table['top'].notna().all()
