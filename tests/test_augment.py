"""Made photos on real sets: what judges stays untouched, what leaks is refused, what was preprocessed in training is so
in the bundle"""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from amulet_hybrid.augment.run import AugmentRunConfig, run_augmentation
from amulet_hybrid.core import SplitError, file_digest
from amulet_hybrid.data.images import read_image
from amulet_hybrid.data.samples import NO_FAULTS, make_samples
from amulet_hybrid.data.split import leakage
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.features.preprocessing import create_artifact_preprocessor
from amulet_hybrid.jobs.evaluate import evaluate_bundle
from amulet_hybrid.jobs.train import TrainingRun
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model.bundle import load_bundle, save_bundle

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'

def data(name):
    "A set of real photos, or a skip that says which variable to set"
    path = Path(os.environ.get('AMULET_DATA') or SHARED/'data')/name
    if not path.exists(): pytest.skip(f'{path} is not there: set AMULET_DATA to the folder that holds {name}')
    return path

def augment(photos, output, **settings):
    "A light run without models"
    values = {'input_dir': str(photos), 'output_dir': str(output), 'preset': 'light', 'check_labels': False, 'jobs': 2}
    return run_augmentation(AugmentRunConfig.from_dict(values | settings))

def test_a_made_folder_is_trained_on_as_it_is_parted(tmp_path):
    """Every class reaches its target; the photos that judge are byte for byte those of the set, and training uses the
    parts as they are"""
    photos = data('amulet6')
    run = augment(photos, tmp_path/'more', target_samples=40)
    made = run.folder.manifest
    assert made[made['split']=='train'].groupby('label').size().min() >= 40 and made.loc[made['made'],
            'split'].eq('train').all() and leakage(made).empty
    judges = made.loc[made['split']=='test', 'path']
    assert {file_digest(tmp_path/'more'/p) for p in judges} <= {file_digest(p) for p in photos.rglob('*.jpg')}
    training = TrainingRun(tmp_path/'more'/'photos.csv', output_dir=str(tmp_path/'train'), weights='none', quick=True)
    training.inspect(); training.split()
    assert set(training.manifest.loc[training.manifest['split']=='test', 'path'])==set(judges)
    assert not any('was not used' in text for _,text in training.data.notes)

def test_made_photos_teach_and_judge_nothing(tmp_path):
    """From the folder of made photos to a bundle that can be judged again; what is preprocessed in training is so when
    judged"""
    make_samples(tmp_path/'photos', photos=60, classes=2, side=96, faults=NO_FAULTS)
    augment(tmp_path/'photos', tmp_path/'more', groups=str(tmp_path/'photos'/'groups.csv'), augmentation_factor=2.)
    training = TrainingRun(tmp_path/'more', output_dir=str(tmp_path/'train'), blocks=('colour', 'lbp'),
                           preprocessing='artifact', quick=True, jobs=1)
    result = training.run()
    about = load_bundle(result['bundle']).manifest['data']
    made = training.data.made
    assert about['made']==len(training.features.augmented)==len(made) > 10
    assert not set(training.manifest['path']) & set(made['path'])
    assert len(training.trainer.y_)==(training.manifest['split']=='train').sum()
    again = evaluate_bundle(load_bundle(result['bundle']), output_dir=tmp_path/'again', quick=True)
    assert again.metrics.n==result['test_photos'] and any('as it was then' in text for _,text in again.notes)

def test_a_split_that_leaks_is_refused(tmp_path):
    "Augmented first and split afterwards: a photo made of a training photo would show what a test photo shows"
    with pytest.raises(SplitError, match='group_parted'):
        augment(data('amulet6_leaky'), tmp_path/'more', groups=str(data('amulet6_leaky_groups.csv')))
    assert not (tmp_path/'more').exists()

def test_a_bundle_sees_what_training_saw(tmp_path):
    "Preprocessing goes into the bundle with the features, and changes the same pixels there"
    table = make_samples(tmp_path/'photos', photos=32, classes=2, side=96, faults=NO_FAULTS, seed=4)
    paths = [tmp_path/'photos'/p for p in table['path']]
    settings = create_artifact_preprocessor(96).to_dict()
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=('hog', 'colour'), weights='none', preprocessing=settings))
    features = extractor.extract_batch(paths)
    plain = HybridFeatureExtractor(FeatureConfig(blocks=('hog', 'colour'), weights='none')).extract_batch(paths)
    assert not np.allclose(features['colour'], plain['colour'])
    trainer = HybridTrainer(TrainingConfig(quick=True, jobs=1, novelty=False), joins=[('hog', 'colour')])
    model = trainer.fit(features, table['label'].tolist(), pd.factorize(table['source'])[0]).model_
    save_bundle(tmp_path/'bundle', model, extractor)
    served = load_bundle(tmp_path/'bundle').extractor
    assert served.config.preprocessing==settings
    for path in paths[:6]:
        assert (served.read(path).rgb==create_artifact_preprocessor(96)(read_image(path,
                at_least=extractor.config.decode_at))).all()
    again = served.extract_batch(paths)
    assert all((again[name]==features[name]).all() for name in model.blocks)
