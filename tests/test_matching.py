"Local matching from training to the answer: found, shown, kept out of bundles that do without, and checked when loaded"
import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from amulet_hybrid.base.arrays import pack_arrays, unpack_arrays
from amulet_hybrid.cli.app import app
from amulet_hybrid.core import BundleError, FeatureError
from amulet_hybrid.data.images import resize_image
from amulet_hybrid.data.samples import DESIGNS, draw_amulet
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.features.local_matching import POINTS, LocalPoints
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.match_evidence import MatchRows
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model.bundle import HeldOut, load_bundle, save_bundle
from amulet_hybrid.model.bundle_files import MANIFEST, file_entry, write_manifest
from amulet_hybrid.model.classifier import HybridClassifier
from amulet_hybrid.serve.schemas import prediction_fields

NAMES = list(DESIGNS)[:3]
Y = np.repeat(np.arange(3), 16)
PHOTOS = [draw_amulet(DESIGNS[NAMES[c]], seed=i//2, view=2*(i%2), side=160) for i,c in enumerate(Y)] # twice each piece
KNOWN = np.arange(len(Y))%2==0 # the other photo of each piece is new

def measured(photos):
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'lbp')), jobs=1)
    blocks = extractor.extract_batch(photos)
    extractor.extractors[POINTS] = LocalPoints()
    return extractor,blocks,np.stack([extractor.extractors[POINTS].extract_features(p) for p in photos])

def trained(matching, with_points=True):
    "A model of the known photos; each is there again with its colours exchanged, as another group"
    known = [p for p,k in zip(PHOTOS, KNOWN) if k]
    photos,y = [*known, *(p[:,:,::-1].copy() for p in known)],np.tile(Y[KNOWN], 2)
    extractor,blocks,points = measured(photos)
    config = TrainingConfig(quick=True, cv_repeats=1, jobs=1, novelty=False, models=('logistic_balanced',),
                            matching=matching)
    files = MatchRows(points, [f'photo_{i}.jpg' for i in range(len(y))], [f'{i:064x}' for i in range(len(y))])
    trainer = HybridTrainer(config).fit(blocks, np.array(NAMES)[y], np.arange(len(y)), extractor.encoders(),
                                        extractor.block_info, points=files if with_points else None)
    return extractor,trainer

@pytest.fixture(scope='module')
def always(): return trained('always')

@pytest.fixture(scope='module')
def folder(always, tmp_path_factory):
    extractor,trainer = always
    new = [p for p,k in zip(PHOTOS, KNOWN) if not k]
    _,blocks,points = measured(new)
    out = tmp_path_factory.mktemp('matching')/'bundle'
    save_bundle(out, trainer.model_, extractor, held_out=HeldOut(blocks | {POINTS: points}, new)) # both answer alike
    return out

def test_a_new_photo_of_a_known_piece_is_found(folder):
    classifier,new = HybridClassifier(folder),np.flatnonzero(~KNOWN)
    found = [classifier.classify(PHOTOS[i]) for i in new]
    shown = [p.match for p in found if p.match]
    assert len(shown) >= len(new)/3
    assert np.mean([p.match['label']==NAMES[Y[i]] for i,p in zip(new, found) if p.match]) >= .7
    for match in shown:
        assert set(match)=={'label', 'photo', 'digest', 'inliers', 'points'} and match['photo'].startswith('photo_')
        assert len(match['points'])==match['inliers'] and np.isfinite(match['points']).all()
    json.dumps([p.to_dict() for p in found], allow_nan=False)
    again = classifier.classify(PHOTOS[new[0]])
    assert again.cached and again.match==found[0].match and again.probabilities==found[0].probabilities
    assert 'matching' in found[0].timings and 'local' in found[0].timings

def test_an_explanation_counts_the_matched_points(folder):
    classifier,counted = HybridClassifier(folder, enable_caching=False),0
    matching,extractor = classifier.bundle.model.matching,classifier.bundle.extractor
    for i in np.flatnonzero(~KNOWN)[:8]:
        found = classifier.explain(PHOTOS[i])
        rows = {b: r[None] for b,r in extractor.extract(extractor.read(PHOTOS[i])).items()}
        matches = matching.find(classifier.bundle.model.vote(rows)[0], rows)
        def worth(name, matches=matches):
            c = classifier.classes.index(name)
            return np.clip(len(matches[c][1])-matching.start, 0, 6) if c in matches else 0
        part = next(p for p in found.parts if p.member=='matched photos')
        assert abs(part.contribution-matching.weight*(worth(found.label)-worth(found.against))) < 1e-6
        assert abs(found.check) < 1e-4
        counted += part.contribution!=0
    assert counted

def with_match(classifier):
    "Photo and explanation of the first new photo whose answer is one of a matched class"
    for i in np.flatnonzero(~KNOWN):
        found = classifier.explain(PHOTOS[i])
        if found.match: return PHOTOS[i],found
    raise AssertionError('no photo was matched')

def known_photos():
    "Name -> pixels of the training photos, as `trained` names them"
    known = [p for p,k in zip(PHOTOS, KNOWN) if k]
    return {f'photo_{i}.jpg': p for i,p in enumerate([*known, *(p[:,:,::-1].copy() for p in known)])}

def test_the_match_of_an_explanation_is_that_of_the_answer(folder):
    classifier = HybridClassifier(folder, enable_caching=False)
    photo,found = with_match(classifier)
    assert found.match==classifier.classify(photo).match and found.match['label']==found.label
    assert f'{found.match["inliers"]} points agree' in found.match_words and found.match['photo'] in found.match_words
    assert found.match['photo'] not in found.words # which leaves over HTTP
    json.dumps(found.to_dict(), allow_nan=False)
    turned = classifier.explain(photo, found.against, found.label)
    assert turned.match is None and turned.match_words==''
    with pytest.raises(FeatureError): turned.draw_match(photo)

def test_matched_points_lie_where_they_are_drawn(folder):
    classifier = HybridClassifier(folder, enable_caching=False)
    photo,found = with_match(classifier)
    other = known_photos()[found.match['photo']]
    drawn = np.asarray(found.draw_match(other, 200)).astype(int)
    bare = np.hstack([resize_image(p, 200) for p in (photo, other)]).astype(int)
    changed = np.abs(drawn-bare).sum(2) > 30
    assert 0 < changed.mean() < .6
    for right,down,right_there,down_there in found.match['points']:
        for x,y in ((200*right, 200*down), (200+200*right_there, 200*down_there)):
            assert changed[max(0, int(y)-4):int(y)+5, max(0, int(x)-4):int(x)+5].any()

@pytest.mark.parametrize('there', ['the photo', 'another file', 'no file', 'a name that leads out'])
def test_the_match_as_a_file(folder, tmp_path, there):
    "`amulet explain` draws the training photo if it is in the folder, and is the one that was trained on"
    classifier = HybridClassifier(folder, enable_caching=False)
    photo,found = with_match(classifier)
    Image.fromarray(photo).save(tmp_path/'new.png')
    (tmp_path/'photos').mkdir()
    name = found.match['photo']
    Image.fromarray(known_photos()[name]).save(tmp_path/'photos'/'known.png')
    content,model = (tmp_path/'photos'/'known.png').read_bytes(),tmp_path/'bundle'
    shutil.copytree(folder, model)
    arrays = unpack_arrays((model/'ensemble.npz').read_bytes())
    row = list(arrays['part|matching|photos']).index(name)
    digests,names = (arrays[f'part|matching|{k}'].astype('U64') for k in ('digests', 'photos'))
    digests[row] = hashlib.sha256(content+b' '*(there=='another file')).hexdigest()[:12]
    names[row] = name if there!='a name that leads out' else f'../{name}'
    for k,values in (('digests', digests), ('photos', names)): arrays[f'part|matching|{k}'] = values
    (model/'ensemble.npz').write_bytes(pack_arrays(arrays))
    manifest = json.loads((model/MANIFEST).read_text())
    manifest['files']['ensemble.npz'] = file_entry(model/'ensemble.npz')
    write_manifest(model, manifest)
    at = {'no file': 'elsewhere.jpg', 'a name that leads out': f'../{name}'}.get(there, name)
    (tmp_path/'photos'/at).write_bytes(content)
    said = CliRunner().invoke(app, ['explain', str(tmp_path/'new.png'), '--model-dir', str(model), '--data-dir',
                                    str(tmp_path/'photos'), '--output-dir', str(tmp_path/'why')])
    assert said.exit_code==0, said.output
    assert f'{found.match["inliers"]} points agree' in said.output
    assert (tmp_path/'why'/'new_match.png').exists()==(there=='the photo')
    assert ('is not drawn' in said.output)==(there!='the photo')

def test_file_names_do_not_leave_over_http(folder):
    classifier = HybridClassifier(folder)
    prediction = next(p for p in map(classifier.classify, PHOTOS) if p.match)
    assert set(prediction_fields(prediction)['match'])=={'label', 'digest', 'inliers'}

def test_the_card_says_that_it_is_on(folder): assert 'Local matching is on' in (folder/'MODEL_CARD.md').read_text()

def test_same_input_same_digest(always, tmp_path):
    extractor,trainer = always
    assert save_bundle(tmp_path/'a', trainer.model_, extractor)==save_bundle(tmp_path/'b', trained('always')[1].model_,
                                                                             extractor)

def test_a_bundle_that_does_without_is_the_same_as_before(tmp_path):
    digests = []
    for name,(extractor,trainer) in {'never': trained('never'), 'none': trained('auto', False)}.items():
        digests.append(save_bundle(tmp_path/name, trainer.model_, extractor))
        assert 'matching' not in (tmp_path/name/'model.json').read_text()
        assert POINTS not in load_bundle(tmp_path/name).extractor.extractors
    assert digests[0]==digests[1]

@pytest.mark.parametrize('change', [
    {'y': np.full(48, 3, np.int32)}, {'y': np.full(48, -1, np.int32)}, {'counts': np.full(48, 10**6, np.int32)},
    {'patches': np.zeros((10,48), np.uint8)}, {'patches': np.zeros((10,4), np.uint8)}, {'weight': np.array(np.inf)},
    {'start': np.array(-1)}, {'photos': np.zeros(48)}, {'digests': np.array(['a'])},
    {'looks': np.zeros((0,4), np.int8)},
    {'block': np.array(['a', 'b'])}, {'block': np.array('no_such_block')}], ids=str)
def test_points_that_do_not_fit_are_refused(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path/'bundle')
    arrays = unpack_arrays((copy/'ensemble.npz').read_bytes()) | {f'part|matching|{k}': v for k,v in change.items()}
    (copy/'ensemble.npz').write_bytes(pack_arrays(arrays))
    manifest = json.loads((copy/MANIFEST).read_text())
    manifest['files']['ensemble.npz'] = file_entry(copy/'ensemble.npz')
    write_manifest(copy, manifest)
    with pytest.raises(BundleError): load_bundle(copy)
