"""A bundle that somebody has made to do harm: it reads no other file, hangs nothing, takes no memory that it was not
given, is not another one by the time it is loaded, and does not come back when it is old. Digests are in order in all
of them"""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from amulet_hybrid.base.arrays import pack_arrays, unpack_arrays
from amulet_hybrid.base.signing import make_keys
from amulet_hybrid.core import AmuletError, BundleError, FeatureError
from amulet_hybrid.data.samples import LOGOS, draw_logo
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.contract import EXTRACTORS, BaseFeatureExtractor, make_extractor
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model import bundle as bundle_module
from amulet_hybrid.model.bundle import load_bundle, save_bundle
from amulet_hybrid.model.bundle_files import MANIFEST, MODEL, file_entry, sign_bundle, verify_bundle, write_manifest
from amulet_hybrid.model.classifier import HybridClassifier
from amulet_hybrid.model.trial import BundleGuard, try_bundle

BLOCK = 'cnn:squeezenet1_1'
PHOTO = draw_logo(next(iter(LOGOS)), seed=77, side=64)

@pytest.fixture(scope='module')
def extractor():
    return HybridFeatureExtractor(FeatureConfig(blocks=(BLOCK,), weights='random', cnn_side=64))

@pytest.fixture(scope='module')
def bundle(extractor, tmp_path_factory):
    photos = [draw_logo(kind, seed=piece, side=64) for kind in LOGOS for piece in range(6)]
    labels = np.repeat(list(LOGOS), 6)
    config = TrainingConfig(cv_folds=2, cv_repeats=1, models=('extra_trees',), jobs=1)
    trainer = HybridTrainer(config).fit(extractor.extract_batch(photos), labels, np.arange(len(labels)))
    folder = tmp_path_factory.mktemp('hostile')/'bundle'
    save_bundle(folder, trainer.model_, extractor, keep_training=False)
    return folder

@pytest.fixture
def folder(bundle, tmp_path): return Path(shutil.copytree(bundle, tmp_path/'bundle'))

def in_order(folder, *files, **changes):
    "Digests of changed files, and a changed manifest"
    manifest = json.loads((folder/MANIFEST).read_text()) | changes
    for file in files: manifest['files'][file] = file_entry(folder/file)
    write_manifest(folder, manifest)

def swap_net(folder, model, extractor):
    "Another net, with its digests in order"
    path = folder/'backbone.onnx'
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    blocks = json.loads((folder/MANIFEST).read_text())['blocks']
    net = extractor.extractors[BLOCK]
    blocks[BLOCK]['fingerprint'] = type(net)(**{**net.get_params(), 'onnx': path}).fingerprint()
    in_order(folder, path.name, blocks=blocks)

def swap_arrays(folder, **changes):
    "Other arrays of the first member, with their digests in order"
    path = folder/'ensemble.npz'
    arrays = unpack_arrays(path.read_bytes()) | {f'voice|0|{k}': v for k,v in changes.items()}
    path.write_bytes(pack_arrays(arrays))
    in_order(folder, path.name)

def arrays_of(folder):
    found = unpack_arrays((folder/'ensemble.npz').read_bytes())
    return {k.removeprefix('voice|0|'): v.copy() for k,v in found.items() if k.startswith('voice|0|')}

def net(nodes, weights=(), **more):
    "A net of ours, as far as names go"
    photos = helper.make_tensor_value_info('photos', TensorProto.UINT8, ['n', 'h', 'w', 3])
    pooled = helper.make_tensor_value_info('pooled_mean', TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, 'net', [photos], [pooled], list(weights), **more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)

def node(op, inputs, output, **more): return helper.make_node(op, inputs, [output], **more)
def ints(name, *values): return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)

GREY = [node('Cast', ['photos'], 'x', to=1), node('ReduceMean', ['x', 'all'], 'grey', keepdims=0),
        node('Expand', ['grey', 'size'], 'z0')] # one number, and a square of it
def grey_net(side, *nodes, last='z0', **more):
    weights = [ints('all', 0, 1, 2, 3), ints('size', side, side), ints('first', 0)]
    return net([*GREY, *nodes, node('ReduceMean', [last, 'first'], 'pooled_mean')], weights, **more)

def elsewhere(name='w', location='weights.bin', size=None):
    "A tensor whose numbers lie in another file"
    out = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    out.external_data.add(key='location', value=location)
    if size is not None: out.external_data.add(key='length', value=str(size))
    return out

def code_of(call):
    try: call()
    except AmuletError as error: return error.code
    return 'passed'

def _graph(**more):
    value = helper.make_tensor_value_info('v', TensorProto.FLOAT, None)
    return helper.make_graph([node('Identity', ['w'], 'v')], 'inside', [], [value], [elsewhere()], **more)

def _with_function():
    model = grey_net(3)
    function = model.functions.add(name='own', domain='mine')
    function.node.add(op_type='Constant').attribute.add(name='value', t=elsewhere())
    return model

def _with_training():
    model = grey_net(3)
    model.training_info.add().algorithm.CopyFrom(_graph())
    return model

def _sparse():
    values = helper.make_sparse_tensor(numpy_helper.from_array(np.ones(1, np.float32), 'w'), ints('at', 0), [2**40])
    return grey_net(3, sparse_initializer=[values])

HOSTILE_NETS = {
    'weights in another file': (lambda: net([node('Identity', ['w'], 'pooled_mean')], [elsewhere()]), 'external_data'),
    'weights two folders up': (lambda: net([node('Identity', ['w'], 'pooled_mean')],
                                           [elsewhere(location='../../secret.bin')]), 'external_data'),
    'a constant in another file': (lambda: net([node('Constant', [], 'pooled_mean', value=elsewhere())]),
                                   'external_data'),
    'in a branch': (lambda: grey_net(3, node('If', ['x'], 'y', then_branch=_graph(), else_branch=_graph())),
                    'unsupported_net'),
    'in a function': (_with_function, 'unsupported_net'),
    'in the steps of training': (_with_training, 'unsupported_net'),
    'sparse weights': (_sparse, 'unsupported_net'),
    'a loop': (lambda: grey_net(3, node('Loop', ['all', ''], 'y', body=_graph())), 'unsupported_net'),
    'a scan': (lambda: grey_net(3, node('Scan', ['x'], 'y', body=_graph(), num_scan_inputs=1)), 'unsupported_net'),
    'an operator of its own': (lambda: grey_net(3, node('Run', ['x'], 'y', domain='mine')), 'unsupported_net'),
    'a size by the pixels': (lambda: net([node('Cast', ['photos'], 'n', to=7),
                                          node('ConstantOfShape', ['n'], 'pooled_mean')]), 'unsupported_net'),
    'no net': (lambda: b'nothing', 'bad_net'),
    "onnxruntime's own format": (lambda: b'\x08\x08\x1a\x02ORTM', 'bad_net'),
}

@pytest.mark.parametrize('what', HOSTILE_NETS)
def test_a_hostile_net_never_comes_to_onnxruntime(folder, extractor, tmp_path, monkeypatch, what):
    make,code = HOSTILE_NETS[what]
    monkeypatch.chdir(tmp_path) # where onnxruntime would look
    (tmp_path/'weights.bin').write_bytes(np.ones(3, np.float32).tobytes())
    swap_net(folder, make(), extractor)
    def asked(*args, **more): raise AssertionError('onnxruntime saw it')
    monkeypatch.setattr(onnxruntime, 'InferenceSession', asked)
    assert code_of(lambda: load_bundle(folder))==code
    assert code_of(lambda: verify_bundle(folder)) in (code, 'bad_onnx')

@pytest.mark.parametrize('what', ['weights in another file', 'a loop'])
def test_nor_does_a_classifier_that_is_a_net(folder, monkeypatch, what):
    make,code = HOSTILE_NETS[what]
    swap_arrays(folder, kind=np.array('onnx'), model=np.frombuffer(make().SerializeToString(), np.uint8),
                output=np.array('pooled_mean'))
    assert code_of(lambda: load_bundle(folder))==code

def test_a_net_of_ones_own_is_made_whole_from_its_own_folder_only(tmp_path):
    own = tmp_path/'nets'/'mine.onnx'
    own.parent.mkdir()
    def written(location):
        photos = helper.make_tensor_value_info('photos', TensorProto.FLOAT, [1, 3, 32, 32])
        row = helper.make_tensor_value_info('row', TensorProto.FLOAT, None)
        nodes = [node('ReduceMean', ['photos', 'axes'], 'mean', keepdims=0), node('Mul', ['mean', 'w'], 'row')]
        graph = helper.make_graph(nodes, 'net', [photos], [row], [elsewhere(location=location), ints('axes', 2, 3)])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9), own)
        return make_extractor(f'onnx:{own}', cache_dir=tmp_path/'cache')
    for place in (own.parent/'weights.bin', tmp_path/'secret.bin'):
        place.write_bytes(np.arange(3, dtype=np.float32).tobytes())
    (own.parent/'link.bin').symlink_to('../secret.bin')
    assert make_extractor('onnx:'+str(written('weights.bin').files()['path'])).extract_features(PHOTO)[0]==0
    for location in ('../secret.bin', 'link.bin', str(tmp_path/'secret.bin'), 'gone.bin', '/dev/zero'):
        with pytest.raises(FeatureError, match='external_data'): written(location).prepare()

def test_a_net_is_known_by_its_bytes_not_by_path_and_time(folder, bundle, extractor):
    "The same path and the same time of change: the old model goes on, the new one is new"
    before = HybridClassifier(folder, enable_caching=False)
    want = before.classify(PHOTO).probabilities
    stamp = (folder/'backbone.onnx').stat()
    model = onnx.load(folder/'backbone.onnx')
    for tensor in model.graph.initializer:
        if tensor.data_type==TensorProto.FLOAT and len(tensor.dims)==4:
            tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32)*np.float32(-.5)).tobytes()
    swap_net(folder, model, extractor)
    os.utime(folder/'backbone.onnx', ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (folder/'backbone.onnx').stat().st_size==stamp.st_size
    after = HybridClassifier(folder, enable_caching=False)
    assert after.classify(PHOTO).probabilities!=want
    assert before.classify(PHOTO).probabilities==want
    shutil.rmtree(folder)
    assert before.classify(PHOTO).probabilities==want # as while a folder is being replaced
    assert HybridClassifier(bundle, enable_caching=False).classify(PHOTO).probabilities==want

def test_what_was_checked_is_what_is_loaded(folder, bundle, monkeypatch):
    "Every file is replaced the moment after it was checked"
    want = HybridClassifier(bundle, enable_caching=False).classify(PHOTO).probabilities
    checked = bundle_module.read_verified
    def then_replaced(*args):
        found = checked(*args)
        for path in folder.iterdir(): path.write_bytes(b'another')
        return found
    monkeypatch.setattr(bundle_module, 'read_verified', then_replaced)
    classifier = HybridClassifier(folder, enable_caching=False)
    assert classifier.classify(PHOTO).probabilities==want
    assert classifier.bundle.card==(bundle/'MODEL_CARD.md').read_text(encoding='utf-8')

def test_files_of_other_blocks_are_those_that_were_checked(tmp_path, monkeypatch):
    "A block of one's own reads its file from a place that only this process writes to"
    class Shifted(BaseFeatureExtractor):
        name = 'shifted'
        def __init__(self, table=''): self.table = table
        def files(self): return {'table': Path(self.table)}
        def measure(self, photo): return photo.view('rgb', 8).mean((0, 1))+float(Path(self.table).read_text())
    monkeypatch.setitem(EXTRACTORS, 'shifted', Shifted)
    (tmp_path/'table.txt').write_text('3')
    own = HybridFeatureExtractor(FeatureConfig(blocks=('hog',)), extractors={'shifted': Shifted(tmp_path/'table.txt')})
    photos = [draw_logo(kind, seed=piece, side=64) for kind in LOGOS for piece in range(6)]
    labels = np.repeat(list(LOGOS), 6)
    trainer = HybridTrainer(TrainingConfig(cv_folds=2, cv_repeats=1, models=('logistic_balanced',), jobs=1))
    model = trainer.fit(own.extract_batch(photos), labels, np.arange(len(labels))).model_
    save_bundle(tmp_path/'bundle', model, own, keep_training=False)
    classifier = HybridClassifier(tmp_path/'bundle', enable_caching=False)
    want = classifier.classify(PHOTO).probabilities
    (tmp_path/'bundle'/'block.txt').write_text('9')
    assert classifier.classify(PHOTO).probabilities==want

def test_trees_that_never_end_and_other_arrays(folder, bundle):
    "Seen before anything is computed"
    arrays = arrays_of(bundle)
    assert str(arrays['kind'])=='forest'
    inner = np.flatnonzero(arrays['left'] >= 0)[0]
    def changed(name, at, value):
        out = arrays[name].copy()
        out[at] = value
        return {name: out}
    hostile = {
        'a circle': changed('left', inner, inner), 'a circle through the root': changed('right', inner, 0),
        'a branch out of the table': changed('left', 0, 10**6), 'a leaf out of the table': changed('left', 0, -10**9),
        'a root out of the table': changed('roots', 0, 10**6), 'a column that no photo has': changed('column', 0, -1),
        'leaves of NaN': changed('leaves', 0, np.nan), 'a cut of NaN': changed('cut', 0, np.nan),
        'leaves of one class': {'leaves': arrays['leaves'][:,:1]}, 'no nodes': {k: arrays[k][:0] for k in (
            'column', 'cut', 'left', 'right')},
        'classes that are not there': {'class_indices': np.array([0, 10**12])},
        'text': {'cut': np.array(['a']*len(arrays['cut']))}, 'another family': {'kind': np.array('perceptron')},
        'a family that is none': {'kind': np.array('eval')}}
    found = {}
    for what,change in hostile.items():
        shutil.copyfile(bundle/'ensemble.npz', folder/'ensemble.npz')
        swap_arrays(folder, **change)
        found[what] = code_of(lambda: load_bundle(folder))
    assert set(found.values())=={'bad_model', 'unknown_head'}, found

def test_files_without_end_are_not_opened(folder):
    def listed(name, size): return json.loads((folder/MANIFEST).read_text())['files'] | {
        name: {'bytes': size, 'sha256': '0'*64}}
    with (folder/'huge.npz').open('wb') as file: file.truncate(5*2**30)
    in_order(folder, files=listed('huge.npz', 5*2**30))
    assert code_of(lambda: load_bundle(folder))=='too_large'
    (folder/'huge.npz').unlink()
    in_order(folder, files=listed('huge.npz', 2**31))
    assert code_of(lambda: load_bundle(folder))=='missing_file'
    in_order(folder, files={f'{i}.npz': {'bytes': 0, 'sha256': ''} for i in range(5000)})
    assert code_of(lambda: load_bundle(folder)) in ('bad_manifest', 'missing_file')

def test_files_larger_than_the_memory_are_not_read(folder, monkeypatch):
    monkeypatch.setenv('AMULET_MEMORY_LIMIT', str(2**20))
    assert code_of(lambda: load_bundle(folder))=='too_large'

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_a_pipe_is_not_waited_for(folder):
    (folder/MODEL).unlink()
    os.mkfifo(folder/MODEL)
    assert code_of(lambda: load_bundle(folder))=='outside'

def test_settings_that_lead_out_of_the_bundle(folder, tmp_path):
    "A block takes its net from the bundle, and names no place of this machine"
    manifest = json.loads((folder/MANIFEST).read_text())
    def with_block(**changes): return {'blocks': {BLOCK: {**manifest['blocks'][BLOCK], **changes}}}
    params = manifest['blocks'][BLOCK]['params']
    found = []
    for change in (with_block(files={}), with_block(files={'weights': 'backbone.onnx'}),
                   with_block(params=params | {'weights': str(tmp_path)}),
                   with_block(params=params | {'cache_dir': str(tmp_path)}),
                   {'features': manifest['features'] | {'preprocessing': '/etc/passwd'}},
                   {'measured': {'decode': 'x'}}, {'measured': {'decode': 1, 'tiers': {'ensemble': {'alone': 1e300}}}},
                   {'classes': ['a']*2}, {'classes': [f'{i}' for i in range(20_000)]}):
        in_order(folder, **(manifest | change))
        found.append(code_of(lambda: load_bundle(folder)))
    assert found==['missing_file']*2+['bad_manifest']*2+['bad_model']+['bad_manifest']*4

ENDLESS = [node('MatMul', [f'z{i}', 'z0'], f'z{i+1}') for i in range(5000)]
GREEDY = {'a terabyte': lambda: grey_net(10**6), 'hours': lambda: grey_net(1500, *ENDLESS, last='z5000')}

@pytest.fixture
def service(folder, tmp_path):
    "A service of the bundle, and what reloads it"
    client_module = pytest.importorskip('fastapi.testclient')
    from amulet_hybrid.serve.app import create_app
    from amulet_hybrid.serve.auth import make_key
    from amulet_hybrid.serve.settings import Settings
    admin,line = make_key('admin')
    def start(**settings):
        settings = Settings(model_dir=folder, admin_key=line.split(':')[1], journal_dir=tmp_path/'journal', **settings)
        def load(): return HybridClassifier(folder, public_key=settings.public_key)
        client = client_module.TestClient(create_app(load(), settings, load), base_url='http://localhost')
        def reload(query=''):
            answer = client.post(f'/admin/reload{query}', headers={'authorization': f'Bearer {admin}'})
            return answer.status_code,answer.json()
        return client,reload
    return start

@pytest.mark.parametrize('what', GREEDY)
def test_a_reload_that_would_hang_or_kill_is_refused(service, folder, extractor, what):
    "A look at the file finds nothing; a process of its own finds it, and the old model goes on"
    client,reload = service(trial_seconds=15)
    before = client.get('/info').json()['model_version']
    swap_net(folder, GREEDY[what](), extractor)
    verify_bundle(folder)
    status,answer = reload()
    assert (status, answer['error_code'])==(409, 'reload_failed') and 'trial_failed' in answer['error_message']
    assert client.get('/info').json()['model_version']==before

def test_a_reload_of_a_whole_bundle(service, folder):
    client,reload = service()
    before = client.get('/info').json()['model_version']
    in_order(folder, data={'note': 'another'})
    status,answer = reload()
    assert status==200 and answer['previous_version']==before!=answer['model_version']
    assert reload('?more=1')[0]==reload('?allow_rollback=perhaps')[0]==422

def test_what_is_loaded_is_what_was_tried(folder, bundle):
    class Loaded: bundle = load_bundle(folder)
    trial = try_bundle(bundle)
    guard = BundleGuard(folder)
    guard.admit(Loaded, trial)
    in_order(folder, measured={}, created='later') # no part of the digest, and still another one
    Loaded.bundle = load_bundle(folder)
    with pytest.raises(BundleError, match='changed_file'): guard.admit(Loaded, trial)

def test_an_older_bundle_comes_back_only_if_it_is_asked_for(service, folder, tmp_path):
    "Also after a restart"
    public = make_keys(tmp_path/'key.pem')
    sign_bundle(folder, tmp_path/'key.pem')
    older = shutil.copytree(folder, tmp_path/'older')
    in_order(folder, data={'note': 'newer'})
    sign_bundle(folder, tmp_path/'key.pem')
    client,reload = service(public_key=public)
    newer = client.get('/info').json()['model_version']
    assert reload()[0]==200 # as old as itself
    shutil.rmtree(folder)
    shutil.copytree(older, folder)
    status,answer = reload()
    assert status==409 and 'older_bundle' in answer['error_message']
    assert client.get('/info').json()['model_version']==newer
    with pytest.raises(BundleError, match='older_bundle'): service(public_key=public) # a restart
    status,answer = reload('?allow_rollback=true')
    assert status==200 and answer['previous_version']==newer
    service(public_key=public) # it was accepted

def test_signatures_of_version_0_1_count_as_older(folder, tmp_path):
    "They say nothing of time, and still show who signed"
    import base64

    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    public = make_keys(tmp_path/'key.pem')
    key = load_pem_private_key((tmp_path/'key.pem').read_bytes(), None)
    sign_bundle(folder, tmp_path/'key.pem')
    said = json.loads((folder/'signature.json').read_text())
    mark = base64.b64encode(key.sign((folder/MANIFEST).read_bytes())).decode()
    (folder/'signature.json').write_text(json.dumps({'algorithm': 'ed25519', 'public_key': said['public_key'],
                                                     'signature': mark}))
    assert load_bundle(folder, public).signed_at==''
    (folder/'signature.json').write_text(json.dumps(said | {'signature': mark})) # a time that nobody signed
    assert code_of(lambda: load_bundle(folder, public))=='bad_signature'

def test_a_trial_knows_extractors_of_ones_own(tmp_path, monkeypatch):
    "Those of a module; it is imported in the other process, too"
    (tmp_path/'brightness_block.py').write_text('''
import numpy as np
from amulet_hybrid.features.contract import EXTRACTORS, BaseFeatureExtractor
class Brightness(BaseFeatureExtractor):
    name = 'brightness'
    def measure(self, photo): return photo.view('grey', 8).ravel().astype(np.float32)
EXTRACTORS['brightness'] = Brightness
''')
    monkeypatch.syspath_prepend(tmp_path)
    import brightness_block
    monkeypatch.setitem(EXTRACTORS, 'brightness', brightness_block.Brightness)
    brightness = {'brightness': brightness_block.Brightness()}
    own = HybridFeatureExtractor(FeatureConfig(blocks=('hog',)), extractors=brightness)
    photos = [draw_logo(kind, seed=piece, side=64) for kind in LOGOS for piece in range(6)]
    labels = np.repeat(list(LOGOS), 6)
    trainer = HybridTrainer(TrainingConfig(cv_folds=2, cv_repeats=1, models=('logistic_balanced',), jobs=1))
    model = trainer.fit(own.extract_batch(photos), labels, np.arange(len(labels))).model_
    save_bundle(tmp_path/'bundle', model, own, keep_training=False)
    assert try_bundle(tmp_path/'bundle').checksum==load_bundle(tmp_path/'bundle').manifest['checksum']
