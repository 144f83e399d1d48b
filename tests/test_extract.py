"Features of a folder as a process: `amulet extract`, killed half way and started again"
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.data.samples import make_samples
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.features.folder import FeatureFolder, write_features

AMULET = Path(sys.executable).parent/'amulet'
PROGRAM = '''
import sys
from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.features.contract import BaseFeatureExtractor
from amulet_hybrid.features.folder import write_features
from amulet_hybrid.features.extractor import FeatureConfig, HybridFeatureExtractor
measure = BaseFeatureExtractor.measure_many
def slowly(self, photos):
    import time
    time.sleep(.02)
    return measure(self, photos)
BaseFeatureExtractor.measure_many = slowly
manifest,root = make_manifest(sys.argv[1])
write_features(HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'hog'))), manifest, root, sys.argv[2], every=32)
'''

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')/'photos'
    make_samples(folder, photos=240, classes=3, side=96)
    return folder

@pytest.fixture(scope='module')
def straight(photos, tmp_path_factory):
    manifest,root = make_manifest(photos)
    return write_features(HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'hog'))), manifest, root,
                          tmp_path_factory.mktemp('straight')/'features')

def extract(*words):
    return subprocess.run([AMULET, 'extract', *map(str, words)], capture_output=True, text=True, timeout=120)

def test_killed_half_way_it_goes_on_where_it_stopped(photos, straight, tmp_path):
    out = tmp_path/'features'
    process = subprocess.Popen([sys.executable, '-c', PROGRAM, str(photos), str(out)])
    until = time.monotonic()+60
    while not (out/'done.json').exists() or int((out/'done.json').read_text()) < 64:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = FeatureFolder(out)
    done = kept.done
    assert 64 <= done < len(straight.photos)
    for name,rows in kept.blocks.items(): np.testing.assert_array_equal(rows, straight.blocks[name][:done])
    # as if killed within a write
    with open(out/kept.about['blocks']['hog']['file'], 'ab') as file: file.write(b'half a row')
    again = extract('--data-dir', photos, '--blocks', 'colour+hog', '--output-dir', out)
    assert again.returncode==0, again.stderr
    for name in straight.blocks:
        file = kept.about['blocks'][name]['file']
        assert (out/file).read_bytes()==(straight.folder/file).read_bytes()
    assert kept.errors()==straight.errors() and kept.complete
    assert list(kept.photos['path'])==list(straight.photos['path'])

def test_what_cannot_be_read_is_said(photos, straight, tmp_path):
    done = extract('--data-dir', photos, '--blocks', 'colour+hog', '--output-dir', tmp_path/'features', '--cache-dir',
                   tmp_path/'cache', '--jobs', 2)
    assert done.returncode==0 and len(straight.errors()) >= 3
    for e in straight.errors(): assert f'! {e["path"]}: {e["error_code"]}: ' in done.stdout
    twice = extract('--data-dir', photos, '--blocks', 'hog', '--output-dir', tmp_path/'more', '--cache-dir',
                    tmp_path/'cache')
    assert 'ms a photo' in done.stdout and 'ms a photo' not in twice.stdout # all from the cache
    np.testing.assert_array_equal(FeatureFolder(tmp_path/'more').blocks['hog'], straight.blocks['hog'])

def test_features_of_other_blocks_are_not_written_over(photos, straight, tmp_path):
    refused = extract('--data-dir', photos, '--blocks', 'lbp', '--output-dir', straight.folder)
    assert refused.returncode==1 and '[other_features]' in refused.stderr and 'Traceback' not in refused.stderr
    assert json.loads((straight.folder/'done.json').read_text())==len(straight.photos)
    wrong = extract('--data-dir', photos, '--blocks', 'hog:cell=big', '--output-dir', tmp_path/'features')
    assert wrong.returncode==1 and 'is no int' in wrong.stderr
