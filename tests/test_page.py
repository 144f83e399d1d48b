"""The page in a real browser, before a real service: photos dropped, pasted and taken, one thing and many, rows of a
table, what is shown, and what happens when nothing goes right"""
import base64
import csv
import hashlib
import io
import json
import os
import re
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
    from amulet_hybrid.base.html import small_jpeg
    from amulet_hybrid.data.images import read_image
    from amulet_hybrid.features.config import FeatureConfig
    from amulet_hybrid.features.extractor import HybridFeatureExtractor
    from amulet_hybrid.learn.config import TrainingConfig
    from amulet_hybrid.learn.trainer import HybridTrainer
    from amulet_hybrid.model.bundle import BundleInfo, HeldOut, save_bundle
    from amulet_hybrid.model.similar_photos import PhotoIndex
    root = place('AMULET_DATA', 'data', 'amulet6')
    photos = {d.name: sorted(d.iterdir()) for d in sorted(root.iterdir()) if d.is_dir()}
    paths,labels = zip(*[(p, c) for c,those in photos.items() for p in those[1:16]])
    folder = tmp_path_factory.mktemp('amulets')
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'hog'), weights='none'), folder/'cache')
    features = extractor.extract_batch(list(paths))
    config = TrainingConfig(cv_folds=3, cv_repeats=1, models=('logistic_balanced',), jobs=1)
    trainer = HybridTrainer(config).fit(features, np.array(labels), np.arange(len(labels)), extractor.encoders())
    index = PhotoIndex.fit(features, np.searchsorted(trainer.classes_, labels), [p.name for p in paths],
                           thumbnails=[small_jpeg(read_image(p), 96) for p in paths])
    save_bundle(folder/'bundle', trainer.model_, extractor, held_out=HeldOut(features, paths, 2),
                info=BundleInfo(title='Thai amulets'), photos=index)
    return folder/'bundle',{c: those[0] for c,those in photos.items()}

@pytest.fixture(scope='module')
def serve(amulets, tmp_path_factory):
    "Starts `amulet serve`"
    import httpx
    started = []
    def start(bundle=amulets[0], **settings):
        port,home = free_ports(1),tmp_path_factory.mktemp('service')
        env = os.environ|{f'AMULET_{k.upper()}': str(v) for k,v in ({'journal_dir': home/'journal'}|settings).items()}
        command = [Path(sys.executable).parent/'amulet', 'serve', '--model-dir', bundle, '--port', str(port)]
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

def views(page, *photos):
    "Drop photos, say that they are of one thing, and wait for the answer"
    page.run("document.querySelector('#answer .verdict')?.remove()")
    page.drop('#drop', *photos)
    page.wait("!document.querySelector('#choice').hidden")
    page.click('#one-thing')
    page.wait(ANSWERED)

BATCH_DONE = "batch && !batch.stop && !document.querySelector('#batch').hidden"
ROWS = ("[...document.querySelectorAll('#rows tr')].map(r => [r.className, ...[...r.cells].slice(1)"
        ".map(c => c.innerText)])")

def saved(page):
    "The file that the page gives, as a list of dicts"
    page.run("window.made = URL.createObjectURL; "
             "URL.createObjectURL = b => { window.blob = b; return made.call(URL, b) }")
    page.click('#save')
    text = page.run("blob.arrayBuffer().then(b => new TextDecoder('utf-8', {ignoreBOM: true}).decode(b))")
    page.run("URL.createObjectURL = made")
    assert text.startswith('\ufeff') and text.endswith('\r\n')
    return list(csv.DictReader(io.StringIO(text[1:], newline='')))

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
    least = f'{100*want.confidence_threshold:.0f}'
    assert 0 < want.confidence_threshold < 1 and re.search(rf'{least}\s*%\s*for a name', page.text('dl'))
    page.run("document.querySelector('#about').open = true")
    assert re.search(rf'no name where its confidence is below {least}\s*%, by itself', page.text('#card'))
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
    page.drop('#drop', *list(amulets[1].values())[:3])
    page.wait("!document.querySelector('#choice').hidden")
    page.screenshot(SHOTS/'page_choice_narrow.png')
    page.click('#different-things')
    page.wait(BATCH_DONE)
    assert page.run('document.documentElement.scrollWidth')==390
    page.screenshot(SHOTS/'page_batch_dark.png')

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
    views(page, *photos[:2])
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

def test_a_view_is_removed(page, amulets):
    "What is left is asked again; the keyboard stays where it was"
    photos = list(amulets[1].values())[:3]
    views(page, *photos)
    page.screenshot(SHOTS/'page_views.png')
    names = page.run("[...document.querySelectorAll('#strip button')].map(b => b.ariaLabel)")
    assert names==[f'Remove this photo: {p.name}' for p in photos]
    asked = len(page.requests())
    for left in (2, 1):
        page.run("document.querySelector('#answer .verdict').remove()")
        page.click('#strip li:first-child button')
        page.wait(ANSWERED)
        assert page.run('photos.map(f => f.name)')==[p.name for p in photos[-left:]]
        assert page.run("document.activeElement.closest('#strip, #more') !== null")
    assert page.run("document.querySelector('#strip').hidden") and photos[2].name in page.text('#name')
    assert len([u for u in page.requests()[asked:] if u.endswith('predict/file')])==2

def test_several_photos_need_a_word(page, amulets):
    "Nothing is asked before; the answer of last time is offered first; a view that is added belongs to the one thing"
    photos = list(amulets[1].values())
    page.drop('#drop', *photos[:3])
    page.wait("!document.querySelector('#choice').hidden")
    assert page.run("document.activeElement.id")=='one-thing' and '3 photos' in page.text('#choice')
    page.screenshot(SHOTS/'page_choice.png')
    page.click('#strip li:first-child button') # not this one
    assert '2 photos' in page.text('#choice')
    page.click('#different-things')
    page.wait(BATCH_DONE)
    page.drop('#drop', *photos[:2])
    page.wait("!document.querySelector('#choice').hidden")
    assert page.run("document.activeElement.id")=='different-things'
    page.click('#one-thing')
    page.wait(ANSWERED)
    data = base64.b64encode(photos[2].read_bytes()).decode()
    page.run(f'''document.querySelector('#answer .verdict').remove(); (() => {{ const d = new DataTransfer();
        const bytes = Uint8Array.from(atob('{data}'), c => c.charCodeAt(0));
        for (const n of ['c.jpg', 'd.jpg']) d.items.add(new File([bytes], n, {{type: 'image/jpeg'}}));
        adding = true; const f = document.querySelector('#file'); f.files = d.files;
        f.dispatchEvent(new Event('change')) }})()''')
    page.wait(ANSWERED)
    assert '4 photos of one thing' in page.text('#name')

def test_limits_are_told_before_anything_is_sent(page, amulets):
    page.run('info.limits.max_bytes = 1000')
    asked = len(page.requests())
    ask(page, list(amulets[1].values())[0])
    assert ('at most 1 kB' in page.text('.verdict') and 'image_too_large' in page.text('#out')
            and not [u for u in page.requests()[asked:] if 'predict' in u])
    page.run('Object.assign(info.limits, {max_bytes: 1e9, max_photos: 2})')
    views(page, *list(amulets[1].values())[:3])
    assert 'At most 2 photos' in page.text('.verdict')

def test_a_note_is_in_the_answer(page, tmp_path):
    answer = {'predicted_class': 'a', 'top_class': 'a', 'confidence': .9, 'probabilities': {'a': .9, 'b': .1},
              'note': 'Photo 2 of 3 was left out: it cannot be decoded', 'prediction_id': '0'*32}
    page.run(f'window.fetch = () => Promise.resolve(new Response({json.dumps(json.dumps(answer))}, {{status: 200}}))')
    ask(page, noise(tmp_path))
    assert 'Photo 2 of 3' in page.text('#out > .note')
    page.wait("/Photo 2 of 3/.test(document.querySelector('#announcement').textContent)")
    page.screenshot(SHOTS/'page_note.png')

def recorded(service, n):
    "The labels of the first `n` feedbacks"
    rows,end = [],time.monotonic()+60
    while len(rows) < n and time.monotonic() < end:
        time.sleep(.1)
        with (suppress(sqlite3.OperationalError), # it may not be there yet
              closing(sqlite3.connect(f'file:{service[2]}/amulet.db?mode=ro', uri=True)) as db):
            rows = [label for label, in db.execute('select true_label from feedback order by rowid')]
    return rows

def test_training_photos_are_shown_when_asked_for(page, amulets, service):
    "Four of each of the three most probable classes, as pictures; no file is named"
    ask(page, list(amulets[1].values())[0])
    assert not page.run("document.querySelectorAll('.like').length")
    assert page.text('.why button')=='Show me why'
    page.click('.why button')
    page.wait("document.querySelectorAll('.like').length")
    assert page.run("[...document.querySelectorAll('.like')].map(l => l.children.length)")==[4, 4, 4]
    page.wait("document.querySelector('.why .map')?.naturalWidth > 100")
    assert 'rather than' in page.text('.why h3') and 'log odds' in page.text('.why .note')
    page.wait("[...document.querySelectorAll('.like img')].every(i => i.naturalWidth > 40)")
    first = page.text('.bars .top span')
    assert f'Most like it among photos of {first}' in page.text('.why')
    assert 'of known photos are no nearer' in page.text('.like') and '.jpg' not in page.text('.why')
    page.screenshot(SHOTS/'page_why.png')
    assert page.complaints()==[]

def test_a_claim_is_judged(page, amulets):
    "Each photo passes for its own class or is not sure of it, and for no class that is far from it"
    label,photo = list(amulets[1].items())[0]
    ask(page, photo)
    for claim in (label, list(amulets[1])[-1]):
        page.run("(name => { const s = document.querySelector('.why select'); s.value = name; "
                 f"s.dispatchEvent(new Event('change')) }})({json.dumps(claim)})")
        page.wait(f"/pass(es)? for {claim.replace('_', ' ')}/.test(document.querySelector('.claim')?.innerText)")
        assert 'wrong claims passed in training' in page.text('.why .note')
        assert page.run("document.querySelectorAll('.like li').length")==4
        page.screenshot(SHOTS/f'page_claim_{claim==label}.png')
    assert page.text('.claim').startswith('It does not pass')
    assert page.complaints()==[]

def test_feedback_is_recorded(page, service, amulets):
    ask(page, list(amulets[1].values())[0])
    page.run("(s => { s.value = 'waek_man'; s.dispatchEvent(new Event('change')) })(document.querySelector('#answer "
             "select[aria-label^=What]'))")
    page.wait("/noted: waek man/.test(document.querySelector('#answer').innerText)")
    assert recorded(service, 1)==['waek_man']
    ask(page, list(amulets[1].values())[1]) # now one that is not on the list
    page.run("(s => { s.selectedIndex = s.options.length-1; s.dispatchEvent(new Event('change')) })"
             "(document.querySelector('#answer select[aria-label^=What]'))")
    assert (page.run("document.activeElement.ariaLabel")=='Its name'
            and page.run("document.activeElement.maxLength")==200)
    page.screenshot(SHOTS/'page_other.png')
    page.run("document.activeElement.value = '  '")
    page.click('.other button') # says nothing
    page.run("document.querySelector('.other input').value = ' พระรอด, no one knows '")
    page.click('.other button')
    page.wait("/noted: พระรอด, no one knows/.test(document.querySelector('#answer').innerText)")
    assert recorded(service, 2)==['waek_man', 'พระรอด, no one knows']

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
    for _ in range(15):
        page.press('Tab', 9)
        reached.append(page.run("document.activeElement.id || document.activeElement.ariaLabel || "
                                "document.activeElement.innerText || document.activeElement.tagName"))
    assert {'file', 'fresh', 'more', 'snap', 'What it really is', 'How it was decided', 'The same from a program',
            'For programs', 'Reference'} <= set(reached)
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

def broken(folder):
    path = folder/'=broken, "here".jpg'
    path.write_text('not a photo')
    return path

def test_a_batch(page, amulets, service, tmp_path):
    "Each photo has its line; a broken one harms no other; the list can be sorted and taken home"
    from amulet_hybrid.model.classifier import HybridClassifier
    want = HybridClassifier(amulets[0])
    photos = [*list(amulets[1].values())[:3], broken(tmp_path), noise(tmp_path)]
    page.drop('#drop', *photos)
    page.wait("!document.querySelector('#choice').hidden")
    page.click('#different-things')
    page.wait(BATCH_DONE)
    assert page.text('#progress-text')=='5 of 5' and page.run("document.querySelector('#progress').value")==5
    rows = page.run(ROWS)
    assert [r[1] for r in rows]==[p.name for p in photos]
    for row,photo in zip(rows, photos[:3]):
        seen = want.classify(photo)
        assert seen.top.replace('_', ' ') in row[2] or row[0]=='unseen'
        assert float(row[3].split()[0])==pytest.approx(100*seen.confidence, abs=1)
    assert rows[3][0]=='failed' and rows[3][3]=='' and 'PNG' in rows[3][2]
    assert rows[4][0]=='unseen' and 'Never seen' in rows[4][2]
    assert '1 without an answer' in page.text('#batch-said')
    page.wait("/1 without an answer/.test(document.querySelector('#announcement').textContent)")
    page.screenshot(SHOTS/'page_batch.png')
    table = saved(page)
    assert list(table[0])==['file', 'label', 'confidence', 'reason', 'error_code', 'error_message', 'prediction_id',
                            'model_version']
    assert [r['file'] for r in table]==[*(p.name for p in photos[:3]), "'"+photos[3].name, photos[4].name]
    assert table[3]['error_code']=='unsupported_format' and table[3]['label']=='' and table[3]['error_message']
    assert table[4]['label']=='' and table[4]['reason'] and len(table[4]['prediction_id'])==32
    assert table[0]['model_version']==want.model_version
    page.click('#by-confidence button')
    shown = page.run(ROWS)
    assert shown[0][0]=='failed' and page.run("document.querySelector('#by-confidence').ariaSort")=='ascending'
    page.click('#by-confidence button')
    numbers = [float(r[3].split()[0]) for r in page.run(ROWS) if r[3]]
    assert numbers==sorted(numbers, reverse=True)
    page.click('#by-name button')
    assert [r[1] for r in page.run(ROWS)][0]==photos[3].name
    page.click('#forget')
    assert page.run("document.querySelector('#batch').hidden && batch === null")
    assert page.complaints()==[]

def test_a_line_shows_its_photo(page, amulets, tmp_path):
    "As if it had been asked alone, without another request; the way back leads to the line"
    photos = [*list(amulets[1].values())[:2], broken(tmp_path)]
    page.drop('#drop', *photos)
    page.wait("!document.querySelector('#choice').hidden")
    page.click('#different-things')
    page.wait(BATCH_DONE)
    asked = len([u for u in page.requests() if 'predict' in u])
    page.click('#rows tr:nth-child(2) td:nth-child(3)')
    page.wait(ANSWERED)
    assert (photos[1].name in page.text('#name') and len(page.run("[...document.querySelectorAll('.bars li')]"))==6
            and page.run("document.querySelector('#answer select[aria-label^=What]') !== null && "
                         "document.activeElement.id")=='back')
    assert 'predict/file' in page.run("document.querySelector('#answer pre').textContent")
    page.screenshot(SHOTS/'page_batch_line.png')
    page.click('#back')
    assert page.run("document.activeElement.innerText")==photos[1].name
    page.run("document.querySelector('#rows tr:nth-child(3) button').click()")
    page.wait("document.querySelector('#answer').classList.contains('failed')")
    assert 'unsupported_format' in page.text('#out') and len([u for u in page.requests() if 'predict' in u])==asked
    page.size(360, 844)
    assert page.run('document.documentElement.scrollWidth')==360
    assert page.run("(b => b.scrollWidth <= b.clientWidth)(document.querySelector('#batch-scroll'))")
    page.screenshot(SHOTS/'page_batch_narrow.png')

def many(page, n, limits='{}'):
    "Give the page `n` small photos that are drawn by the page itself"
    page.run(f'''Object.assign(info.limits, {limits}); new Promise(done => {{
        const c = Object.assign(document.createElement('canvas'), {{width: 40, height: 40}}), x = c.getContext('2d');
        const files = []; const next = i => {{ if (i === {n}) {{ take(files); return done() }}
            x.fillStyle = `hsl(${{i*7}} 70% 50%)`; x.fillRect(0, 0, 40, 40);
            c.toBlob(b => {{ files.push(new File([b], `photo ${{i+1}}.png`)); next(i+1) }}) }};
        next(0) }})''')

# Answers in place of the service; `replies` come first: each is a status, the seconds to wait, or 'ok'
STAND_IN = '''window.sizes = []; window.held = []; window.fetch = async (u, o) => {
    const n = o.body.getAll ? o.body.getAll('files').length : JSON.parse(o.body).rows.length;
    sizes.push(n);
    const [status, wait] = replies.shift() || [200, 0];
    if (status === 0) await new Promise((_, failed) => o.signal.onabort = () => failed(o.signal.reason));
    if (status !== 200) return new Response(JSON.stringify({error_code: 'busy', error_message: 'too many'}),
                                            {status, headers: {'Retry-After': String(wait)}});
    const one = {success: true, predicted_class: 'a', top_class: 'a', confidence: .9, probabilities: {a: .9, b: .1}};
    return new Response(JSON.stringify({success: true, results: Array(n).fill(one)})) }'''

def test_more_than_a_few_are_a_batch_in_chunks(page):
    "Nothing is asked first; chunks are small; it can be stopped and go on; a busy service is waited for"
    page.run('window.replies = [[200, 0], [503, 1], [200, 0], [0, 0]]; '+STAND_IN)
    many(page, 40)
    page.wait("/again in 1 s/.test(document.querySelector('#batch-said').textContent)")
    page.wait('sizes.length === 4')
    assert page.text('#progress-text')=='16 of 40' and page.run("document.querySelector('#save').disabled")is False
    page.screenshot(SHOTS/'page_progress.png')
    page.click('#halt')
    page.wait('!batch.stop')
    assert '16 named, 24 not asked' in page.text('#batch-said') and page.run(ROWS)[39][2]=='not asked'
    assert [r['reason'] for r in saved(page)].count('not asked')==24
    page.click('#resume')
    page.wait(BATCH_DONE+" && /40 of 40/.test(document.querySelector('#progress-text').textContent)")
    assert page.run('sizes')==[8, 8, 8, 8, 8, 8, 8] and page.run("document.querySelector('#resume').hidden")
    many(page, 9, '{max_photos: 2}')
    page.wait(BATCH_DONE+' && batch.items.length === 9')
    assert page.run('sizes.slice(7)')==[2, 2, 2, 2, 1]

def test_hundreds_of_photos(page):
    "The page stays alive, and draws only the pictures in view"
    page.run('window.replies = []; '+STAND_IN)
    page.run("window.urls = 0; for (const [f, d] of [['createObjectURL', 1], ['revokeObjectURL', -1]]) "
             "{ const real = URL[f]; URL[f] = x => { urls += d; return real.call(URL, x) } }")
    page.run("window.longest = 0; new PerformanceObserver(l => l.getEntries().forEach(e => "
             "longest = Math.max(longest, e.duration))).observe({type: 'longtask'})")
    many(page, 500)
    page.wait(BATCH_DONE)
    assert page.run("document.querySelectorAll('#rows tr').length")==500 and '500 named' in page.text('#batch-said')
    assert page.run("document.querySelectorAll('#rows img[src]').length") < 40
    page.run("document.querySelector('#batch-scroll').scrollTop = 1e6")
    page.wait("document.querySelector('#rows tr:last-child img').src && !document.querySelector('#rows img').src")
    assert page.run('urls') < 40 and page.run('longest') < 2000
    page.click('#forget')
    page.wait('urls === 0')

def test_one_bad_chunk_is_asked_photo_by_photo(page):
    "What failed for a while can be asked again, alone or all; a service that is away halts the batch"
    page.run('window.replies = [[500, 0], [200, 0], [422, 0]]; '+STAND_IN)
    many(page, 9)
    page.wait(BATCH_DONE)
    assert page.run('sizes')==[8, *[1]*8, 1] and [r[0] for r in page.run(ROWS)].count('failed')==1
    page.run("window.replies = [[504, 0], ...Array(8).fill([504, 0])]")
    page.click('#rows .failed button') # refused for good, so there is nothing to press
    assert not page.run("document.querySelector('#out button.main')")
    many(page, 9)
    page.wait(BATCH_DONE+" && /without an answer/.test(document.querySelector('#batch-said').textContent)")
    assert not page.run("document.querySelector('#resume').hidden")
    page.run("const answer = {success: true, predicted_class: 'a', "
             "top_class: 'a', confidence: .9, probabilities: {a: .9}}; "
             "window.fetch = async () => new Response(JSON.stringify(answer))")
    page.click('#rows tr:first-child button')
    page.click('#out button.main')
    page.wait("document.querySelector('#rows tr').className === 'sure'")
    page.run("window.fetch = async () => { throw new TypeError('gone') }")
    many(page, 10)
    page.wait(BATCH_DONE+' && batch.items.length === 10')
    assert 'cannot be reached' in page.text('#batch-said') and not page.run("document.querySelector('#resume').hidden")

def test_a_folder_is_a_batch(page, amulets, tmp_path):
    "With the folders in it; what is no photo is left out, and that is said"
    photos = list(amulets[1].values())
    (tmp_path/'box'/'deep').mkdir(parents=True)
    shutil.copy(photos[0], tmp_path/'box'/'a.jpg')
    shutil.copy(photos[1], tmp_path/'box'/'deep'/'b.jpg')
    (tmp_path/'box'/'list.txt').write_text('words')
    (tmp_path/'box'/'.hidden.jpg').write_text('words')
    page.drop('#drop', tmp_path/'box')
    page.wait(BATCH_DONE)
    assert [r[1] for r in page.run(ROWS)]==['box/a.jpg', 'box/deep/b.jpg']
    assert 'Left out, as no photos: 1 (list.txt' in page.text('#batch-said')

def test_cells_of_the_file_are_safe(page):
    "No formula, and nothing that breaks a line"
    cells = ['=1+1', '+a', '-b', '@c', '\tx', '\ry', 'a"b', 'a,b', 'a\nb', 'plain', .5, None]
    safe = ["'=1+1", "'+a", "'-b", "'@c", '"\'\tx"', '"\'\ry"', '"a""b"', '"a,b"', '"a\nb"', 'plain', '0.5', '']
    assert page.run(f'{json.dumps(cells)}.map(csvCell)')==safe

@pytest.fixture(scope='module')
def flowers(serve, tmp_path_factory):
    "A service of a model of a table of numbers and words, and the table"
    import pandas as pd

    from amulet_hybrid.jobs.table import TableRun
    rng,folder = np.random.default_rng(0),tmp_path_factory.mktemp('flowers')
    kind = np.repeat(['rose', 'lily', 'aster'], 40)
    height = np.repeat([1., 2., 3.], 40)+rng.normal(0, .3, 120)
    table = pd.DataFrame({'height': height.round(3), 'petals, each': rng.normal(0, 1, 120).round(3),
                          'soil': np.where(rng.random(120) < .7, np.repeat(['clay', 'sand', 'peat'], 40), 'clay'),
                          'kind': kind})
    table.to_csv(folder/'flowers.csv', index=False)
    TableRun(folder/'flowers.csv', target='kind', output_dir=str(folder/'out'), quick=True, jobs=1).run()
    return serve(folder/'out'/'bundle'),table

@pytest.fixture
def rows(browser, flowers):
    "The page of the table's model, ready"
    one = browser.open(flowers[0][0])
    one.wait("!document.querySelector('#row-form').hidden")
    return one

VALUES = "[...document.querySelectorAll('#fields input')].map(i => i.value)"

def paste(page, text):
    page.run(f"(t => {{ t.value = {json.dumps(text)}; t.dispatchEvent(new Event('input')) }})"
             "(document.querySelector('#row-text'))")

def test_a_row_is_asked(rows, flowers, tmp_path):
    "The same verdict, bars, feedback and command as for a photo; what is empty is missing"
    assert rows.run("document.querySelector('#form').hidden && !document.querySelector('#drop').offsetHeight")
    labels = rows.run("[...document.querySelectorAll('#fields label')].map(l => l.innerText)")
    assert labels==['height', 'petals, each', 'soil'] and 'row' in rows.text('#purpose')
    rows.click('#row-form .main')
    assert 'All fields are empty' in rows.text('.verdict')
    rows.run("const f = document.querySelectorAll('#fields input'); f[0].value = ' 1.02 '; f[2].value = 'clay'; "
             "window.real = fetch; window.fetch = (u, o) => { window.sent = o.body; return real(u, o) }")
    rows.run("document.querySelector('.verdict').remove()")
    rows.click('#row-form .main')
    rows.wait(ANSWERED)
    assert json.loads(rows.run('sent'))=={'features': {'height': 1.02, 'soil': 'clay'}}
    assert 'rose' in rows.text('.verdict') and len(rows.run("[...document.querySelectorAll('.bars li')]"))==3
    assert rows.run("document.querySelector('#answer select[aria-label^=What]') !== null")
    rows.run("document.querySelectorAll('#answer details').forEach(d => d.open = true)")
    assert 'known rows' in rows.text('dl') or 'stranger' not in rows.text('dl')
    if shutil.which('curl'):
        command = rows.run("document.querySelector('#answer pre').textContent")
        done = subprocess.run(['sh', '-c', f'{command} -s'], cwd=tmp_path, capture_output=True, text=True)
        assert json.loads(done.stdout)['predicted_class']=='rose', done.stdout+done.stderr
    rows.screenshot(SHOTS/'page_row.png')
    rows.size(390, 844)
    assert rows.run('document.documentElement.scrollWidth')==390
    rows.screenshot(SHOTS/'page_row_narrow.png')
    assert rows.complaints()==[]
    rows.run("document.querySelector('#fields input').value = 'tall'")
    rows.run("document.querySelector('.verdict').remove()")
    rows.click('#row-form .main')
    rows.wait(ANSWERED)
    assert 'bad_feature' in rows.text('#out') and 'No answer for this row' in rows.text('.verdict')

def test_a_row_is_pasted(rows):
    "A line of a spreadsheet or of a CSV file, one below its header, or JSON; what does not fit is told"
    for text,values in (('1\t2\tsand', ['1', '2', 'sand']), ('1.5,"2",peat\n', ['1.5', '2', 'peat']),
                        ('1,5;2,25;clay', ['1.5', '2.25', 'clay']),
                        ('kind,soil,height\nrose,clay,7', ['7', '', 'clay']),
                        ('{"soil": "sand", "height": null, "petals, each": 3}', ['', '3', 'sand']),
                        ('{"features": {"height": 4}}', ['4', '', ''])):
        paste(rows, text)
        assert rows.run(VALUES)==values and 'fields filled' in rows.text('#row-said')
    paste(rows, '{"height": 1, "weight": 2}')
    assert 'Not among the columns: weight' in rows.text('#row-said')
    for text,says in (('1,2', '2 values, but 3 columns'), ('{"height": ', 'cannot be read')):
        paste(rows, text)
        assert says in rows.text('#row-said') and rows.run(VALUES)[0]=='1'
    rows.click('#clear')
    assert rows.run(VALUES)==['', '', '']
    kinds = rows.run("['1', '-2.5e3', '007', '1e999', 'True', 'x', '', 'NA', '12345678901234567890'].map(valueOf)")
    assert kinds==[1, -2500, '007', '1e999', True, 'x', None, None, '12345678901234567890']

def test_many_columns_can_be_searched(rows):
    rows.run("fields.clear(); setFields(Array.from({length: 60}, (_, i) => `column ${i}`))")
    assert rows.run("(f => f.scrollHeight > f.clientHeight)(document.querySelector('#fields'))")
    rows.run("(f => { f.value = 'N 59'; f.dispatchEvent(new Event('input')) })(document.querySelector('#find'))")
    assert rows.text('#fields').strip()=='column 59'
    rows.screenshot(SHOTS/'page_columns.png')

def test_a_csv_file_is_answered_row_by_row(rows, flowers, tmp_path):
    "In requests of rows; columns that the model lacks are left out, and that is told; a photo is refused"
    flowers[1].drop(columns='soil').to_csv(tmp_path/'more.csv', index=False)
    rows.run("window.bodies = []; window.real = fetch; "
             "window.fetch = (u, o) => { bodies.push([u, JSON.parse(o.body)]); return real(u, o) }")
    rows.drop('#row-form', tmp_path/'more.csv')
    rows.wait(BATCH_DONE)
    bodies = rows.run('bodies')
    assert [len(b['rows']) for _,b in bodies]==[100, 20] and bodies[0][0].endswith('predict-batch')
    assert bodies[0][1]['rows'][0]=={c: flowers[1][c][0] for c in ('height', 'petals, each')}
    assert 'Missing in the file: soil' in rows.text('#batch-said') and 'kind' in rows.text('#batch-said')
    assert rows.run(ROWS)[119][1]=='Row 120' and rows.text('#batch-title')=='120 rows'
    lines = saved(rows)
    sure = [(line['label'], kind) for line,kind in zip(lines, flowers[1]['kind']) if line['label']]
    assert len(lines)==120 and sure and sum(a==b for a,b in sure) > .8*len(sure)
    assert lines[119]['file']=='Row 120' and len(lines[119]['prediction_id'])==32
    rows.click('#rows tr:nth-child(2) button')
    rows.wait(ANSWERED)
    assert rows.run(VALUES)==[*(f'{flowers[1][c][1]:g}' for c in ('height', 'petals, each')), '']
    rows.screenshot(SHOTS/'page_rows.png')
    rows.size(360, 844)
    assert rows.run('document.documentElement.scrollWidth')==360
    rows.screenshot(SHOTS/'page_rows_narrow.png')
    rows.drop('#row-form', noise(tmp_path))
    rows.wait("document.querySelector('#answer').classList.contains('failed')")
    assert 'not photos' in rows.text('.verdict')
    (tmp_path/'odd.csv').write_text('x,y\n1,2\n')
    rows.drop('#row-form', tmp_path/'odd.csv')
    rows.wait("/no rows with columns/.test(document.querySelector('.verdict').innerText)")

def test_swagger_ui(browser, service):
    "Every operation is shown and can be tried, and nothing comes from elsewhere"
    tab = browser.open(f'{service[0]}docs')
    tab.wait("document.querySelectorAll('.opblock').length > 8")
    tab.click('[id$=health_health_get] .opblock-summary-control')
    tab.wait("!!document.querySelector('.try-out__btn')")
    tab.click('.try-out__btn')
    tab.wait("!!document.querySelector('.execute')")
    tab.click('.execute')
    tab.wait("/\"status\": \"ok\"/.test(document.querySelector('.responses-inner').innerText)")
    assert tab.complaints()==[] and {a.split('/')[2] for a in tab.requests() if a.startswith('http')}=={
        service[0].split('/')[2]}
    tab.screenshot(SHOTS/'page_swagger.png')
    reference = browser.open(f'{service[0]}reference')
    assert '/predict/file' in reference.run('document.body.innerText')
