"""Extraction on a Ray cluster: the same rows as on this machine, also when a node dies half way (needs: pip install
'amulet_hybrid[ray]')"""
import subprocess
import sys

import numpy as np
import pytest

from amulet_hybrid.data.samples import NO_FAULTS, make_samples
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor

pytest.importorskip('ray.data', reason="Ray is not installed; pip install 'amulet_hybrid[ray]'")

PROGRAM = '''
import sys
import numpy as np, ray
from ray.cluster_utils import Cluster
from amulet_hybrid.features.contract import BaseFeatureExtractor
from amulet_hybrid.features.extractor import FeatureConfig, HybridFeatureExtractor
from pathlib import Path

class Where(BaseFeatureExtractor):
    "Number of the node that measured it: what is slow enough to be killed half way"
    name = 'where'
    def measure(self, photo):
        import time
        time.sleep(.05)
        return np.array([int(ray.get_runtime_context().get_node_id()[:6], 16)])

photos,out = sorted(Path(sys.argv[1]).rglob('*.jpg'))+[b'no photo'],Path(sys.argv[2])
watchful = {'health_check_initial_delay_ms': 1000, 'health_check_period_ms': 500, 'health_check_timeout_ms': 5000,
            'health_check_failure_threshold': 10} # a dead node is noticed in seconds
cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1, 'include_dashboard': False,
                                                        '_system_config': watchful})
doomed = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level='error')
extractor = HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'hog')), engine='ray')
extractor.extractors['where'] = Where()
extractor.widths = lambda: {**{k: len(v) for k,v in extractor.extract(extractor.read(photos[0]),
                                                                      ['colour', 'hog']).items()}, 'where': 1}
rows,errors = [],{}
for batch in extractor.extract_stream(photos, batch_size=16):
    rows.append(batch.blocks)
    errors |= batch.errors
    if len(rows)==2 and doomed is not None:
        cluster.remove_node(doomed, allow_graceful=False)
        doomed = None
np.savez(out, errors=np.array([f'{i} {e.code}' for i,e in errors.items()]),
         **{name: np.concatenate([r[name] for r in rows]) for name in rows[0]})
ray.shutdown()
cluster.shutdown()
'''

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    make_samples(folder, photos=96, classes=4, side=96, faults=NO_FAULTS)
    return folder

def test_a_node_dies_half_way_and_nothing_is_lost(photos, tmp_path):
    for _ in range(4): # a busy machine may need longer for a node than the 30 s that Ray waits
        done = subprocess.run([sys.executable, '-c', PROGRAM, str(photos), str(tmp_path/'rows.npz')],
                              capture_output=True, text=True, timeout=600)
        if 'timed out during startup' not in done.stderr: break
    assert done.returncode==0, done.stderr[-3000:]
    paths = sorted(photos.rglob('*.jpg'))
    wanted = HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'hog'))).extract_batch(paths)
    with np.load(tmp_path/'rows.npz') as got:
        for name in wanted:
            np.testing.assert_array_equal(got[name][:-1], wanted[name])
            assert np.isnan(got[name][-1]).all()
        assert got['errors'].tolist()==[f'{len(paths)} unsupported_format']
        assert len(np.unique(got['where'][:-1]))==2 # both nodes had measured some
