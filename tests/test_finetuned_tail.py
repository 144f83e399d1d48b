"A fine-tuned last stage from the settings of a run to the answer of its bundle: without torch, and off is said"
import json
import subprocess
import sys

import numpy as np
import pytest

from amulet_hybrid.core import AmuletError, MissingExtraError
from amulet_hybrid.data.samples import make_samples
from amulet_hybrid.jobs.train import TrainingRun
from amulet_hybrid.learn import finetuned_member, finetuned_tail
from amulet_hybrid.model.bundle import load_bundle

BLOCK = 'cnn:squeezenet1_1@maps:side=64'

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    make_samples(folder, photos=54, classes=3, side=96)
    return folder

def trained(photos, output, **settings):
    usual = {'blocks': ('lbp', 'cnn:squeezenet1_1:side=64'), 'weights': 'random', 'quick': True, 'novelty': False,
             'jobs': 1, 'matching': 'never', 'models': ('logistic_balanced',), 'cache_dir': str(photos.parent/'cache')}
    run = TrainingRun(photos, output_dir=output, **usual | settings)
    run.inspect()
    run.split()
    run.extract()
    run.train()
    run.evaluate()
    run.save()
    return run

@pytest.fixture(scope='module')
def always(photos, tmp_path_factory): return trained(photos, tmp_path_factory.mktemp('always'), finetune='always')

def test_it_votes_and_is_told(always):
    members = {m.candidate.title: m.weight for m in always.trainer.model_.members}
    assert 0 < members['finetuned'] < 1 and abs(sum(members.values())-1) < 1e-9
    said = [text for _,text in always.trainer.notes_ if 'fine-tuned last stage' in text]
    assert 'of the vote' in said[0] and 'million multiplications' in said[1]
    assert BLOCK in always.trainer.model_.blocks
    assert 'fine-tuned last stage' in (always.finished.report).read_text()
    assert 'finetuned' in (always.finished.bundle/'MODEL_CARD.md').read_text()

def test_the_bundle_answers_alike_without_torch(always):
    test = always.data.rows('test')
    want = always.trainer.model_.predict_proba(always.features.part(test))
    paths = [str(always.data.root/p) for p in always.data.part('test')['path']]
    code = ('import json, sys\nfrom amulet_hybrid.model.classifier import HybridClassifier\n'
            'c = HybridClassifier(sys.argv[1])\n'
            'found = [c.classify(p, route="ensemble").probabilities for p in sys.argv[2:]]\n'
            'assert "torch" not in sys.modules\nprint(json.dumps(found))')
    done = subprocess.run([sys.executable, '-c', code, str(always.finished.bundle), *paths], capture_output=True,
                          text=True, check=True)
    found = [list(p.values()) for p in json.loads(done.stdout.splitlines()[-1])]
    np.testing.assert_allclose(found, want, atol=1e-4)

def test_same_input_same_digest(always, photos, tmp_path):
    assert trained(photos, tmp_path, finetune='always').result['digest']==always.result['digest']

def test_a_run_that_does_without_holds_nothing_of_it(photos, tmp_path):
    never = trained(photos, tmp_path/'never')
    assert BLOCK not in never.features.blocks and not any('ine-tun' in text for _,text in never.trainer.notes_)
    assert BLOCK not in load_bundle(never.finished.bundle).extractor.extractors

def test_off_is_said(photos, tmp_path, monkeypatch):
    bare = trained(photos, tmp_path/'bare', finetune='auto', blocks=('lbp',))
    assert any('Fine-tuning is off: none of the blocks' in text for _,text in bare.trainer.notes_)
    with pytest.raises(AmuletError): trained(photos, tmp_path/'no', finetune='always', blocks=('lbp',))
    def missing(*args): raise MissingExtraError("this needs the package 'torch', which is not installed")
    monkeypatch.setattr(finetuned_tail, 'require', missing)
    monkeypatch.setattr(finetuned_member.joblib, 'Parallel', lambda **kw: lambda jobs: (f(*a, **k) for f,a,k in jobs))
    gone = trained(photos, tmp_path/'gone', finetune='auto', cache_dir=str(tmp_path/'cache'))
    assert any("Fine-tuning is off: this needs the package 'torch'" in text for _,text in gone.trainer.notes_)
    assert all(m.candidate.model!='finetuned' for m in gone.trainer.model_.members)
