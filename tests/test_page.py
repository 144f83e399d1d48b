"""The page in a real browser, before a real service: photos dropped, pasted and taken, what is shown, and what happens
when nothing goes right"""
import base64
import hashlib
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from chromium import Chromium
from conftest import free_ports
from PIL import Image
from test_real import place

ANSWERED = '''document.querySelector('#answer .verdict')
    && !document.querySelector('#main').classList.contains('busy')'''
SHOTS = Path(tempfile.gettempdir()) # page_*.png, to be looked at

@pytest.fixture(scope='module')
def amulets(tmp_path_factory):
    "A bundle of real amulets, and one photo of each class that it has not seen"
    from amulet_hybrid.features.config import FeatureConfig
    from amulet_hybrid.features.extractor import HybridFeatureExtractor
    from amulet_hybrid.learn.config import TrainingConfig
    from amulet_hybrid.learn.trainer import HybridTrainer
    from amulet_hybrid.model.bundle import BundleInfo, HeldOut, save_bundle
    root = place('AMULET_DATA', 'data', 'amulet6')
    photos = {d.name: sorted(d.iterdir()) for d in sorted(root.iterdir()) if d.is_dir()}
    paths,labels = zip(*[(p, c) for c,those in photos.items() for p in those[1:16]])
    folder = tmp_path_factory.mktemp('amulets')
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'hog'), weights='none'), folder/'cache')
    features = extractor.extract_batch(list(paths))
    config = TrainingConfig(cv_folds=3, models=('logistic_balanced',), jobs=1)
    trainer = HybridTrainer(config).fit(features, np.array(labels), np.arange(len(labels)), extractor.encoders())
    save_bundle(folder/'bundle', trainer.model_, extractor, held_out=HeldOut(features, paths, 2),
                info=BundleInfo(title='Thai amulets'))
    return folder/'bundle',{c: those[0] for c,those in photos.items()}

@pytest.fixture(scope='module')
def serve(amulets, tmp_path_factory):
    "Starts `amulet serve`"
    import httpx
    started = []
    def start(**settings):
        port,home = free_ports(1),tmp_path_factory.mktemp('service')
        env = os.environ|{f'AMULET_{k.upper()}': str(v) for k,v in ({'journal_dir': home/'journal'}|settings).items()}
        command = [Path(sys.executable).parent/'amulet', 'serve', '--model-dir', amulets[0], '--port', str(port)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(process)
        end = time.monotonic()+120
        while True:
            try: httpx.get(f'http://127.0.0.1:{port}/health/ready', timeout=60); break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < end, 'the service did not start'
                time.sleep(.1)
        return f'http://127.0.0.1:{port}/',process,home
    yield start
    for process in started: process.kill(); process.wait()

@pytest.fixture(scope='module')
def service(serve): return serve()

@pytest.fixture(scope='module')
def browser():
    one = Chromium()
    yield one
    one.close()

@pytest.fixture
def page(browser, service):
    "The page, wide and light, and ready"
    one = browser.open(service[0])
    one.wait("document.querySelector('#state').classList.contains('up')")
    return one

def ask(page, *photos):
    "Drop photos and wait for the answer"
    page.run("document.querySelector('#answer .verdict')?.remove()")
    page.drop('#drop', *photos)
    page.wait(ANSWERED)

def test_a_photo_is_dropped(page, amulets, service):
    """The answer is that of the service, in words and bars; nothing is asked of anybody else, and the policy has no
    complaint"""
    from amulet_hybrid.model.classifier import HybridClassifier
    want = HybridClassifier(amulets[0])
    for photo in list(amulets[1].values())[:3]:
        ask(page, photo)
        seen = want.classify(photo)
        assert seen.top.replace('_', ' ') in page.text('.verdict') or 'Never seen' in page.text('.verdict')
        rows = page.run("[...document.querySelectorAll('.bars li')].map(r => [r.children[0].innerText, "
                        "r.querySelector('i').getBoundingClientRect().width/r.offsetWidth])")
        assert [name for name,_ in rows]==[c.replace('_', ' ')
                                           for c,_ in sorted(seen.probabilities.items(), key=lambda kv: -kv[1])]
        assert rows[0][1]==pytest.approx(seen.confidence, abs=.02)
        assert photo.name in page.text('#name')
    assert '6 classes' in page.text('#state') and len(page.run("[...document.querySelectorAll('#list li')].map(l => "
                                                               "l.innerText)"))==3
    page.run("document.querySelectorAll('#answer details').forEach(d => d.open = true)")
    assert 'stranger than' in page.text('dl') and 'ms in the model' in page.text('dl')
    page.screenshot(SHOTS/'page_wide.png')
    assert page.complaints()==[] and all(u.startswith((service[0], 'blob:', 'data:')) for u in page.requests())

def test_narrow_and_dark(browser, service, amulets):
    "A phone: nothing is cut off, and the answer is brought into view"
    page = browser.open(service[0], 390, 844, dark=True, touch=True)
    page.wait("document.querySelector('#state').classList.contains('up')")
    ask(page, list(amulets[1].values())[1])
    page.run("document.querySelector('#about').open = true")
    assert page.run('document.documentElement.scrollWidth')==390
    top,bottom = page.run("(r => [r.top, r.bottom])(document.querySelector('.verdict').getBoundingClientRect())")
    assert top >= 0 and bottom <= 844
    page.run("document.querySelector('#about').open = false")
    page.screenshot(SHOTS/'page_narrow.png')
    assert page.run("getComputedStyle(document.body).backgroundColor")=='rgb(18, 23, 27)'

def noise(folder):
    path = folder/"it's noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96,96,3), dtype=np.uint8)).save(path)
    return path

def test_never_seen_and_not_sure(page, amulets, tmp_path):
    "Both are said in words, and neither looks like a name"
    ask(page, noise(tmp_path))
    assert ('Never seen' in page.text('.verdict') and 'do not rely on that' in page.text('.verdict')
            and page.run("document.querySelector('#answer').className")=='card unseen')
    page.screenshot(SHOTS/'page_unseen.png')
    page.run("window.real = fetch; window.fetch = (u, o) => real(String(u).replace('predict/file', "
             "'predict/file?confidence_threshold=1'), o)")
    ask(page, list(amulets[1].values())[3])
    assert all(words in page.text('.verdict') for words in ('Not sure', 'Perhaps', 'below the threshold',
                                                            'Another photo'))
    page.wait("/Not sure/.test(document.querySelector('#announcement').textContent)") # and read out
    page.screenshot(SHOTS/'page_unsure.png')

def test_several_views_paste_camera_and_back(page, amulets):
    photos = list(amulets[1].values())
    ask(page, *photos[:2])
    assert (page.run("document.querySelectorAll('#strip img').length")==2
            and '2 photos of one thing' in page.text('#name'))
    data = base64.b64encode(photos[2].read_bytes()).decode()
    page.run(f'''document.querySelector('#answer .verdict').remove(); (() => {{ const d = new DataTransfer();
        const bytes = Uint8Array.from(atob('{data}'), c => c.charCodeAt(0));
        d.items.add(new File([bytes], 'pasted.jpg', {{type: 'image/jpeg'}}));
        document.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: d, bubbles: true}})) }})()''')
    page.wait(ANSWERED)
    assert 'pasted.jpg' in page.text('#name') and page.run("document.querySelector('#strip').hidden")
    page.run("document.querySelector('#answer .verdict').remove()")
    page.click('#snap')
    page.wait("document.querySelector('#camera-box').open && document.querySelector('#video').videoWidth > 0")
    page.click('#shoot')
    page.wait(ANSWERED)
    assert 'camera.jpg' in page.text('#name') and page.run("document.querySelector('#video').srcObject")is None
    page.click('#list li:nth-child(3) button') # the first one
    assert '2 photos of one thing' in page.text('#name')

def test_feedback_is_recorded(page, service, amulets):
    ask(page, list(amulets[1].values())[0])
    page.run("(s => { s.value = 'waek_man'; s.dispatchEvent(new Event('change')) })(document.querySelector('#answer "
             "select'))")
    page.wait("/noted: waek man/.test(document.querySelector('#answer').innerText)")
    rows,end = [],time.monotonic()+60
    while not rows and time.monotonic() < end:
        time.sleep(.1)
        with (suppress(sqlite3.OperationalError), # it may not be there yet
              closing(sqlite3.connect(f'file:{service[2]}/amulet.db?mode=ro', uri=True)) as db):
            rows = db.execute('select true_label from feedback').fetchall()
    assert rows==[('waek_man',)]

def test_the_command_does_the_same(page, tmp_path):
    "Copied into a shell, quotes in a file's name and all"
    if not shutil.which('curl'): pytest.skip('no curl here: apt-get install curl')
    ask(page, noise(tmp_path))
    command = page.run("document.querySelector('#answer pre').textContent")
    done = subprocess.run(['sh', '-c', f'{command} -s'], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout)['success'], done.stdout+done.stderr

def test_failures_are_said(page, tmp_path):
    (tmp_path/'text.jpg').write_text('not a photo')
    ask(page, tmp_path/'text.jpg')
    assert ('No answer for this photo' in page.text('.verdict')
            and page.run("document.querySelector('.verdict').getAttribute('role')")=='alert')
    # the same again would not help
    assert 'unsupported_format' in page.text('#out') and not page.run("[...document.querySelectorAll('#out "
                                                                      "button')].length")
    page.screenshot(SHOTS/'page_error.png')
    busy = json.dumps({'error_code': 'busy', 'error_message': 'too many'})
    page.run(f"window.real = fetch; window.fetch = () => Promise.resolve(new Response({busy!r}, {{status: 503, "
             f"headers: {{'Retry-After': '3'}}}}))")
    ask(page, noise(tmp_path))
    assert 'wait 3 s' in page.text('.verdict') and page.text('#out button.main')=='Try again'
    page.run("window.fetch = real")
    page.click('#out button.main')
    page.wait("document.querySelector('#answer').classList.contains('unseen')")

def test_names_are_text(page, tmp_path):
    "A class may be called anything"
    name = '<img src=x onerror="window.hacked=1"><b>bold</b>'
    answer = {'predicted_class': name, 'top_class': name, 'confidence': .9, 'probabilities': {name: .9, 'b': .1},
              'prediction_set': [name, 'b'], 'coverage': .9,
              'prediction_id': '0'*32}
    page.run(f'window.fetch = () => Promise.resolve(new Response({json.dumps(json.dumps(answer))}, {{status: 200}}))')
    ask(page, noise(tmp_path))
    assert '<b>bold</b>' in page.text('.verdict') and page.run("window.hacked || document.querySelectorAll('#out img, "
                                                               "#out b').length")==0

def test_everything_has_a_name_and_can_be_reached(page, amulets):
    "Buttons, fields and pictures say what they are; the keyboard gets everywhere, and one sees where it is"
    ask(page, list(amulets[1].values())[0])
    nodes = [n for n in page.call('Accessibility.getFullAXTree')['nodes'] if not n.get('ignored')]
    named = {(n['role']['value'], n.get('name', {}).get('value', ''))
             for n in nodes if n['role']['value'] in ('button', 'combobox', 'textbox', 'link', 'image', 'region')}
    assert len(named) > 8 and [role for role,name in named if not name]==[]
    reached = []
    for _ in range(14):
        page.press('Tab', 9)
        reached.append(page.run("document.activeElement.id || document.activeElement.ariaLabel || "
                                "document.activeElement.innerText || document.activeElement.tagName"))
    assert {'file', 'fresh', 'more', 'snap', 'What it really is', 'How it was decided', 'The same from a program',
            'For programs'} <= set(reached)
    assert page.run("(e => { e.focus(); return getComputedStyle(document.querySelector('#drop')).outlineStyle "
                    "})(document.querySelector('#file'))")=='solid'

def test_a_key_is_asked_for(serve, browser, amulets):
    "Once; a wrong one is told, the right one goes on with what was asked"
    url,process,_ = serve(api_keys=f'me:{hashlib.sha256(b"open sesame").hexdigest()}')
    page = browser.open(url)
    page.wait("document.querySelector('#key-box').open")
    page.screenshot(SHOTS/'page_key.png')
    for key in ('guess', 'open sesame'):
        page.run(f"document.querySelector('#key').value = '{key}'")
        page.click('#key-box button.main')
        if key=='guess':
            page.wait("document.querySelector('#key-box').open && /not "
                      "accepted/.test(document.querySelector('#key-title').textContent)")
    page.wait("document.querySelector('#state').classList.contains('up')")
    ask(page, list(amulets[1].values())[0])
    assert ('failed' not in page.run("document.querySelector('#answer').className")
            and '$AMULET_API_KEY' in page.run("document.querySelector('#answer pre').textContent"))
    assert 'open sesame' not in page.run('document.documentElement.outerHTML')
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    ask(page, list(amulets[1].values())[0])
    assert 'cannot be reached' in page.text('.verdict') and page.text('#out button.main')=='Try again'

def test_without_javascript(service, amulets):
    "The form alone does it"
    import httpx
    text = httpx.get(service[0]).text
    assert 'action="predict/file" method="post" enctype="multipart/form-data"' in text
    photo = io.BytesIO(list(amulets[1].values())[0].read_bytes())
    assert httpx.post(f'{service[0]}predict/file', files={'files': photo}, timeout=60).json()['success']
