"Real photos: what the software must find in them by itself"
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from amulet_hybrid.audit.inspection import InspectionConfig
from amulet_hybrid.audit.inspector import DatasetInspector
from amulet_hybrid.data.split import leakage
from amulet_hybrid.jobs.train import TrainingRun

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'

def place(variable, default, name):
    "A file or folder of ours, or a skip that says which variable to set"
    path = Path(os.environ.get(variable) or SHARED/default)/name
    if not path.exists(): pytest.skip(f'{path} is not there: set {variable} to the folder that holds {name}')
    return path

def data(name): return place('AMULET_DATA', 'data', name)

def test_amulets_with_weights(tmp_path):
    weights = place('AMULET_WEIGHTS', 'weights', 'mobilenet_v2.pth').parent
    run = TrainingRun(data('amulet6'), output_dir=str(tmp_path), weights=str(weights), preset='balanced', quick=True)
    result = run.run()
    assert result['figures']['balanced_accuracy']['value'] > .75
    assert run.trainer.candidates_['blocks'].str.contains('cnn:efficientnet_lite2').any()

def test_a_split_that_leaks_is_not_used(tmp_path):
    "Augmented first and split afterwards: nearly every test source is in training too"
    run = TrainingRun(data('amulet6_leaky'), groups=str(data('amulet6_leaky_groups.csv')), output_dir=str(tmp_path))
    run.inspect()
    given = leakage(run.manifest)
    run.split()
    assert len(given) > 60 and leakage(run.manifest).empty
    level,text = run.data.notes[0]
    assert level=='warning' and 'on both sides' in text and 'Its split was not used' in text

def test_random_split_is_unmasked(tmp_path):
    "Magnetic tiles, each shot several times: random folds flatter"
    run = TrainingRun(data('magtile'), groups=str(data('magtile_groups.csv')), output_dir=str(tmp_path),
                      blocks=('colour', 'lbp'), weights='none', quick=True)
    result = run.run()
    assert result['random_split']['random_folds'] - result['random_split']['grouped_folds'] > .2
    assert [n for n in result['notes'] if n.startswith('A random split would have shown far more')]
    assert 'A random split would have shown far more' in (tmp_path/'report.html').read_text(encoding='utf-8')

def test_one_in_a_hundred_is_broken(tmp_path):
    photos = tmp_path/'coins'
    for folder in sorted(p for p in data('coins').iterdir() if p.is_dir()):
        (photos/folder.name).mkdir(parents=True)
        names = sorted(p.name for p in folder.iterdir())
        for name in names[::max(1, len(names)//25)][:25]: shutil.copy(folder/name, photos/folder.name/name)
    paths = sorted(photos.rglob('*.jpg'))
    assert len(paths)==200
    for path in paths[50:200:100]: path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
    cut = [p.relative_to(photos).as_posix() for p in paths[50:200:100]]
    result = TrainingRun(photos, groups=str(data('coins_groups.csv')), output_dir=str(tmp_path/'out'),
                         blocks=('colour', 'lbp'), weights='none', quick=True).run()
    found = json.loads((tmp_path/'out'/'inspection.json').read_text(encoding='utf-8'))
    assert [row['path'] for row in found['tables']['unreadable']]==cut
    assert result['left_out']==2 and result['test_photos'] > 20
    report = (tmp_path/'out'/'report.html').read_text(encoding='utf-8').replace('<wbr>', '') # long names may break
    assert all(path in report for path in cut)
    assert len(pd.read_csv(tmp_path/'out'/'manifest.csv'))==200

@pytest.fixture(scope='module')
def inspect(tmp_path_factory):
    cache = tmp_path_factory.mktemp('measured')
    def inspect(name, groups=True, folder=None, **settings):
        "A set as its owner published it, or part of it, and the codes of what was found; no file is measured twice"
        folder = folder or data(name)
        csv = folder.parent/f'{name}_groups.csv'
        inspector = DatasetInspector(InspectionConfig(**settings), cache/name)
        found = inspector.inspect(folder, csv if groups and csv.exists() else None)
        return found,{f.code: f for f in found.findings}
    return inspect

def test_amulets_inspected(inspect):
    "Two amulets lie on black among red; backs that are named front stand out from their names"
    found,codes = inspect('amulet6')
    odd = found.manifest[found.manifest['issues'].str.contains('odd_background')]
    assert odd['label'].tolist()==['somdej_pratanporn_buddhagavak']*2 and (odd['border_l'] < 10).all()
    named = found.tables['name_conflicts']
    assert (named[named['label']=='waek_man']['word']=='front').sum() >= 2 and 'name_conflicts' in codes
    assert not {'label_conflict', 'unreadable', 'no_honest_split'} & set(codes)

TWO_LABELS = {'10c/train__train_36_4.jpg', '50c/train__train_37_4.jpg'} # One coin

@pytest.fixture
def some_coins(tmp_path):
    "All 86 sources of the coins with all their classes, three photos of each class of a source"
    table = pd.read_csv(data('coins_groups.csv')).assign(label=lambda t: t['path'].str.split('/').str[0])
    some = table[table['path'].isin(TWO_LABELS) | (table.groupby(['group', 'label']).cumcount() < 3)]
    for path in some['path']:
        (tmp_path/'coins'/path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data('coins')/path, tmp_path/'coins'/path)
    some[['path', 'group']].to_csv(tmp_path/'coins_groups.csv', index=False)
    return tmp_path/'coins'

def test_coins_inspected(inspect, some_coins):
    "Sources of one class, a coin under two labels, and sources that only the file names betray"
    found,codes = inspect('coins', folder=some_coins)
    assert '25 of 86' in codes['one_class_groups'].text and found.findings[0].code=='label_conflict'
    assert set(found.duplicates[found.duplicates['conflict']]['path'])==TWO_LABELS
    hidden,codes = inspect('coins', groups=False, folder=some_coins)
    assert codes['hidden_groups'].level=='warning' and hidden.facts['hidden_groups']['gap']['value'] > .03
    suggested = hidden.tables['group_suggestions'].query('plausible')
    assert suggested['groups'].iloc[0]==pd.read_csv(data('coins_groups.csv'))['group'].nunique()==86

def test_tiles_inspected(inspect):
    "Nearly all have a twin, some under another label, and a random split would shine"
    found,codes = inspect('magtile')
    assert (len(found.duplicates) >= 941 and found.duplicates['conflict'].sum() >= 14
            and found.findings[0].code=='label_conflict')
    assert found.facts['group_gap']['gap']['low'] > .5 and 'instead of' in codes['random_split_flatters'].text

def test_leaks_found(inspect):
    "69 of 71 test sources are in training too; at least 60 show without being told the sources"
    found,codes = inspect('amulet6_leaky', quick_mode=True)
    assert '69 of 71 groups of the test part are also in train' in codes['split_leaks'].text
    blind,_ = inspect('amulet6_leaky', groups=False, quick_mode=True)
    known = pd.read_csv(data('amulet6_leaky_groups.csv')).set_index('path')['group']
    source = known.reindex(blind.manifest['path']).to_numpy()
    m = blind.manifest.assign(source=source)
    both = m.groupby('group')['split'].transform(lambda s: 'train' in set(s))
    assert m[(m['split']=='test') & both]['source'].nunique() >= 60
