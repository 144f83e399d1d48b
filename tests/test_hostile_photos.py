"Photos that mean harm: small files with work or memory without end, and the same verdict from every door"
import importlib.util
import json
import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amulet_hybrid.core import AmuletError, ImageError, ResourceError
from amulet_hybrid.data import decoder
from amulet_hybrid.data.container import ImageCost, image_cost, read_container
from amulet_hybrid.data.images import LIMITS, open_image, probe_image, read_image
from amulet_hybrid.data.quality import measure_bytes
from amulet_hybrid.data.scan import scan_files

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SECONDS = 60
LINUX = pytest.mark.skipif(sys.platform!='linux', reason='measures memory by /proc')

spec = importlib.util.spec_from_file_location('hostile_bench', ROOT/'benchmarks'/'hostile.py')
hostile = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hostile)
encode,scene,chunk,segment = hostile.encode,hostile.scene,hostile.chunk,hostile.segment

def verdict(data, at_least=224, limits=LIMITS):
    try: return 'read' if read_image(data, limits, at_least).ndim==3 else ''
    except AmuletError as error: return error.code

def quickly(work, seconds=5.): # The attacks took minutes; a bar of half a second is one that coverage can break
    "What `work` gives; it may take so much processor time"
    start = time.process_time()
    found = work()
    assert time.process_time()-start < seconds
    return found

@pytest.fixture
def all_elsewhere(monkeypatch):
    "Every file is decoded by a process, whatever it costs"
    monkeypatch.setattr(decoder, '_HERE_SECONDS', -1)
    yield
    decoder._end_decoders()

# Work

def repeated(times, width=2000, height=1500):
    "A progressive JPEG whose last scan is repeated"
    data = encode(Image.new('L', (width, height), 9), 'JPEG', progressive=True)
    return data[:-2]+data[data.rindex(b'\xff\xda'):-2]*times+data[-2:]

@pytest.mark.parametrize('times', [100, 10_000, 200_000])
def test_repeated_scans_are_counted(times):
    data = repeated(times)
    assert quickly(lambda: verdict(data))=='decompression_bomb'
    row,pixels = quickly(lambda: measure_bytes(data, LIMITS))
    assert row['issues']=='decompression_bomb' and pixels is None

def test_scans_of_real_files_pass():
    assert verdict(repeated(0))==verdict(repeated(40))=='read'
    behind = encode(scene(), 'JPEG')+repeated(5000) # a phone's motion photo: another one behind the end
    assert verdict(behind)=='read'
    assert verdict(encode(scene(), 'JPEG', progressive=True)+repeated(5000))=='read'

@pytest.mark.parametrize('between', [segment(0xfe, b'\xff\xd9'*9), b'\xff'*50, segment(0xdd, b'\0\0')])
def test_scans_hidden_behind_an_end(between):
    data = encode(Image.new('L', (2000, 1500), 9), 'JPEG', progressive=True)
    data = data[:-2]+(between+data[data.rindex(b'\xff\xda'):-2])*5000+data[-2:]
    assert quickly(lambda: verdict(data)) in ('decompression_bomb', 'read', 'truncated')

def test_floods_are_refused_at_once():
    "Chunks, segments and pieces, each of which costs a decoder a step"
    jpeg,png,gif = encode(scene(), 'JPEG'),encode(scene(), 'PNG'),encode(scene(mode='P'), 'GIF')
    table = 13+(3<<(gif[10]&7)+1)
    webp = hostile.riff(hostile.part(b'VP8X', bytes(10)), *[hostile.part(b'JUNK', b'')]*50_000)
    floods = {'png': png[:33]+chunk(b'IDAT', b'')*200_000+png[33:],
              'png texts': png[:33]+chunk(b'tEXt', b'a\0')*200_000+png[33:],
              'jpeg': jpeg[:2]+segment(0xe1, b'Exif\0\0')*200_000+jpeg[2:], 'webp': webp,
              'gif': gif[:table]+b'!\xfe'+b'\1x'*1_000_000+b'\0'+gif[table:]}
    assert {k: quickly(lambda d=d: verdict(d)) for k,d in floods.items()}==dict.fromkeys(floods, 'decompression_bomb')

def test_what_no_pixel_needs_is_never_unpacked():
    "Texts and profiles that unpack to gigabytes, EXIF whose tags each point to all of it, a PNG with surplus rows"
    png,packed = encode(scene(), 'PNG'),zlib.compress(bytes(10**7))
    bombs = [png[:33]+chunk(b'zTXt', b'a\0\0'+packed)*500+png[33:],
             png[:33]+chunk(b'iCCP', b'a\0\0'+packed)*500+png[33:],
             hostile.with_exif(encode(scene(), 'JPEG'), hostile.tiff([(i, 2, 60_000, 0) for i in range(5400)])),
             hostile.png(64, 64, rows=hostile.png_rows(64, 64, 8, 2)+bytes(10**8))]
    for bomb in bombs:
        assert quickly(lambda data=bomb: verdict(data))=='read'
        quickly(lambda data=bomb: probe_image(data))

def test_estimated_work_has_a_limit():
    assert verdict(repeated(99-6, 8000, 8000))=='decompression_bomb' # 99 scans of 64 megapixels
    usual = encode(scene(1200, 900), 'JPEG')
    assert verdict(usual)=='read' and verdict(usual, limits=LIMITS.replace(decode_seconds=1e-3))=='decompression_bomb'

# Decoding that is stopped

def test_slow_file_is_stopped(monkeypatch, all_elsewhere):
    "It slips under every estimate, and is killed when its time is up; the next one is decoded by another process"
    data = encode(Image.new('L', (6000, 6000)), 'JPEG', progressive=True)
    monkeypatch.setattr(decoder, 'image_cost', lambda file, at_least=None: ImageCost(1e-9, 2**28, 1))
    processes,made = [],decoder.DecoderProcess
    def make():
        processes.append(made())
        return processes[-1]
    monkeypatch.setattr(decoder, 'DecoderProcess', make)
    with pytest.raises(ImageError, match='stopped after') as told: read_image(data, LIMITS.replace(decode_seconds=.02))
    assert told.value.code=='decode_timeout'
    assert verdict(encode(scene(), 'PNG'))=='read'
    assert len(processes)==2 and processes[0].process.returncode is not None # gone, and waited for

def test_a_decoder_that_waits_is_stopped_by_the_clock(monkeypatch, all_elsewhere):
    "One that takes no processor time"
    monkeypatch.setattr(decoder, '_BOOT', 'import time; time.sleep(1000)')
    assert verdict(encode(scene(), 'PNG'), limits=LIMITS.replace(decode_seconds=.1))=='decode_timeout'

def test_a_decoder_that_breaks_down_is_no_harm(monkeypatch, all_elsewhere):
    monkeypatch.setattr(decoder, '_BOOT', 'import os, sys; sys.stdin.buffer.readline(); os.abort()')
    assert verdict(encode(scene(), 'PNG'))=='corrupt_image'
    monkeypatch.setattr(decoder, '_BOOT', 'import os, sys; sys.stdin.buffer.readline(); os.kill(os.getpid(), 9)')
    assert verdict(encode(scene(), 'PNG'))=='out_of_memory' # the system did that, the photo is not to blame

def test_same_pixels_elsewhere(all_elsewhere, monkeypatch):
    files = [encode(scene(300, 200), 'JPEG'), encode(scene(mode='RGBA'), 'PNG'), encode(scene(mode='I;16'), 'PNG'),
             encode(scene(), 'WEBP'), encode(scene(mode='P'), 'GIF'), encode(scene(300, 200), 'JPEG')[:-900]]
    half = LIMITS.replace(min_decoded=.1)
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda data: read_image(data, half, 90), files*2))
    monkeypatch.setattr(decoder, '_HERE_SECONDS', 100)
    for pixels,data in zip(found, files*2): assert np.array_equal(pixels, read_image(data, half, 90))

def ended(pid):
    "Whether a process is gone, or would be if its new parent looked"
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] in 'ZX'
    except OSError: return True

@LINUX
@pytest.mark.parametrize('end', ['pass', 'os.kill(os.getpid(), 9)'])
def test_decoder_ends_with_its_parent(end, tmp_path):
    "From a plain script, without a guard for the main module, and from a thread"
    (tmp_path/'photo.png').write_bytes(encode(scene(), 'PNG'))
    (tmp_path/'script.py').write_text(f'''
import os, threading
from amulet_hybrid.data import decoder
from amulet_hybrid.data.images import read_image
decoder._HERE_SECONDS = -1
thread = threading.Thread(target=lambda: print(read_image('photo.png').shape))
thread.start(); thread.join()
print(decoder._DECODERS[0].process.pid, flush=True)
{end}''')
    done = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    shape,pid = done.stdout.splitlines()
    assert shape=='(72, 96, 3)' and not done.stderr
    until = time.monotonic()+SECONDS
    while not ended(pid): assert time.monotonic() < until

def test_a_fork_has_decoders_of_its_own(all_elsewhere):
    if not hasattr(os, 'fork'): pytest.skip('no forks here')
    data = encode(scene(), 'PNG')
    assert verdict(data)=='read'
    child = os.fork()
    if not child:
        code = 1
        try: code = 0 if not decoder._DECODERS and verdict(data)=='read' else 2
        finally:
            decoder._end_decoders()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])==0
    assert verdict(data)=='read'

# Memory

GROWTH = '''
import sys
from amulet_hybrid.data.images import read_image
def status(name): return int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1])/1024
import cv2
for small in sys.argv[2:]: read_image(small)
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
pixels = read_image(sys.argv[1])
print(status('VmHWM')-before, pixels.shape[0])
'''

def dotted(side):
    "An animated WEBP of a large canvas in some hundred bytes"
    dot = encode(Image.new('RGB', (2, 2), 'red'), 'WEBP', lossless=True)[12:]
    return hostile.animation(side, side, 3, dot, box=(2, 2))

LARGE = {'animated WEBP': (lambda: dotted(3000), 4),
         'animated WEBP, full': (lambda: hostile.animation(3000, 3000, 2,
                                                           encode(Image.new('RGB', (3000, 3000)), 'WEBP',
                                                                  lossless=True)[12:],
                                                           box=(3000, 3000)), 12),
         '16-bit PNG': (lambda: hostile.png(3000, 3000, 16, 0, hostile.png_rows(3000, 3000, 16, 0)), 6),
         '16-bit PNG with alpha': (lambda: hostile.png(3000, 3000, 16, 6, hostile.png_rows(3000, 3000, 16, 6)), 8),
         'palette PNG': (lambda: hostile.png(3000, 3000, 8, 3, hostile.png_rows(3000, 3000, 8, 3)), 5),
         'CMYK JPEG': (lambda: encode(Image.new('CMYK', (3000, 3000)), 'JPEG'), 8)}

@LINUX
@pytest.mark.parametrize('kind', LARGE)
def test_memory_is_a_few_bytes_a_pixel(kind, tmp_path):
    "Of 9 megapixels, the result of 3 bytes a pixel with it; and the estimate that the budget goes by is not too low"
    make,most = LARGE[kind]
    data = make()
    for name,content in {'large': data, 'small': encode(scene(), 'PNG')}.items(): (tmp_path/name).write_bytes(content)
    done = subprocess.run([sys.executable, '-c', GROWTH, 'large', 'small'], cwd=tmp_path, capture_output=True,
                          text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=SECONDS)
    megabytes,height = done.stdout.split()
    assert height=='3000' and float(megabytes) < most*9e6/2**20+10, done.stdout+done.stderr
    assert float(megabytes) < image_cost(read_container(data)).memory/2**20

THREADS = '''
import sys
from concurrent.futures import ThreadPoolExecutor
from amulet_hybrid.data.decoder import decoding_budget
from amulet_hybrid.data.images import read_image
def status(name): return int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1])/1024
read_image('small')
before = status('VmRSS')
with ThreadPoolExecutor(8) as pool: sides = list(pool.map(lambda _: read_image('large').shape[0], range(16)))
print(status('VmHWM')-before, decoding_budget().total/2**20, len(sides))
'''

@LINUX
def test_threads_keep_within_one_budget(tmp_path):
    "Eight at once want 500 MB, and have 190"
    (tmp_path/'large').write_bytes(LARGE['16-bit PNG with alpha'][0]())
    (tmp_path/'small').write_bytes(encode(scene(), 'PNG'))
    done = subprocess.run([sys.executable, '-c', THREADS], cwd=tmp_path, capture_output=True, text=True,
                          timeout=SECONDS,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), 'AMULET_MEMORY_LIMIT': str(512*2**20)})
    megabytes,total,read = map(float, done.stdout.split())
    assert total==192 and read==16 and megabytes < total+2*27, done.stderr # two results may outlive their decoding

@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setenv('AMULET_MEMORY_LIMIT', str(32*2**20))
    decoder._BUDGET.clear()
    yield
    decoder._BUDGET.clear()

def test_lack_of_memory_never_drops_a_photo(little_memory, tmp_path):
    "Inspection and training stop and say so; a bad file is still a bad file"
    (tmp_path/'large.png').write_bytes(encode(Image.new('RGB', (2000, 2000)), 'PNG'))
    (tmp_path/'bad.png').write_bytes(b'\x89PNG and no more')
    assert verdict((tmp_path/'bad.png').read_bytes())=='corrupt_image'
    with pytest.raises(ResourceError, match='needs_memory') as told: scan_files(['bad.png', 'large.png'], tmp_path)
    assert 'large.png' in str(told.value.where)
    with pytest.raises(ResourceError, match='large.png'): read_image(tmp_path/'large.png')

def test_memory_error_is_no_corrupt_image(monkeypatch):
    def fails(*_): raise MemoryError
    monkeypatch.setattr(decoder, 'decode_still', fails)
    assert verdict(encode(scene(), 'PNG'))=='out_of_memory'

def test_waiting_has_an_end_where_callers_wait(monkeypatch):
    monkeypatch.setattr(decoder, '_PATIENCE', [.01])
    budget = decoder.decoding_budget()
    with budget.hold(budget.total): assert verdict(encode(scene(), 'PNG'))=='out_of_memory'
    assert verdict(encode(scene(), 'PNG'))=='read'

def test_lack_of_memory_is_503(caplog, monkeypatch):
    testclient = pytest.importorskip('fastapi.testclient',
                                     reason="fastapi is not installed; pip install 'amulet_hybrid[serve]'")
    from amulet_hybrid.model.prediction import Prediction
    from amulet_hybrid.serve.app import create_app
    from amulet_hybrid.serve.settings import Settings
    class Grey:
        classes,model_version = ['clay', 'gold'],'1'
        def classify(self, photo, confidence_threshold=None):
            grey = float(read_image(photo[0] if isinstance(photo, list) else photo).mean()/255)
            return Prediction('gold', 'gold', grey, {'clay': 1-grey, 'gold': grey})
    client = testclient.TestClient(create_app(Grey(), Settings(answer_cache='off')), base_url='http://localhost')
    def send(): return client.post('/predict/file', files={'file': encode(scene(), 'PNG')})
    assert send().status_code==200
    def fails(*_): raise MemoryError
    monkeypatch.setattr(decoder, 'decode_still', fails)
    with caplog.at_level('WARNING', 'amulet_hybrid'): answer = send()
    assert (answer.status_code, answer.json()['error_code'])==(503,
                                                               'out_of_memory') and int(answer.headers['retry-after'])
    assert any('no memory left' in line.getMessage() for line in caplog.records)

# What is let in

@pytest.mark.parametrize('size', [(5712, 4284), (8160, 6144), (16_000, 3800)])
def test_photos_of_phones_are_let_in(size):
    "24 and 50 megapixels, and a panorama, decoded at reduced scale"
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new('L', size, 90), 'JPEG', exif=exif, quality=20)
    pixels = read_image(data, at_least=224)
    assert (pixels.shape[0] > pixels.shape[1]) and 224 <= min(pixels.shape[:2]) < 900
    assert probe_image(data).width==size[1]

def test_harmless_oddities_are_let_in():
    "EXIF that is broken in any way, pages in captions, anything behind the end"
    jpeg,tiff = encode(scene(), 'JPEG'),hostile.tiff
    blocks = [b'', b'MM\0*', tiff([(0x8825, 4, 1, 0)]), tiff([(0x112, 3, 1, 9)]), tiff([(0x8769, 4, 1, 9999)]),
              tiff([], first=2**31),
              tiff([(0x112, 3, 1, 0)], count=65_535), b'II*\0\x08\0\0\0\xff\xff', os.urandom(200)]
    odd = [hostile.with_exif(jpeg, block) for block in blocks]
    odd += [jpeg[:2]+segment(0xed, b'Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\6<html>')+jpeg[2:], jpeg+b'\0'*999,
            jpeg+b'PK\5\6'+bytes(99),
            jpeg+b'<script>alert(1)</script>', encode(scene(), 'PNG')+b'%PDF-1.7',
            jpeg[:2]+segment(0xfe, b'<?php evil();')+jpeg[2:]]
    plain = read_image(jpeg)
    for data in odd:
        assert verdict(data)=='read'
        assert open_image(data).info.rotated is False
    assert np.array_equal(read_image(odd[-1]), plain)

def test_a_phone_of_200_megapixels():
    "A JPEG is decoded at an eighth of its size; a PNG of that size would have to be decoded whole, and is refused"
    data = encode(Image.new('L', (16_320, 12_240), 90), 'JPEG')
    photo = read_image(data, at_least=320)
    assert photo.shape==(1530, 2040, 3) and (photo==90).all()
    with pytest.raises(ImageError, match='decompression_bomb'): read_image(hostile.png(16_320, 12_240))

@pytest.mark.skipif(sys.platform!='linux', reason='memory of another process is read from /proc')
def test_a_decoder_gives_back_what_a_photo_took():
    "It goes on for a minute beside a service: pixels of the last photo, cut or whole, are not kept"
    rows = hostile.png_rows(4000, 4000, 8, 2)
    cut = hostile.png(4000, 4000, rows=rows)[:-2000]
    decoder_process = decoder.DecoderProcess()
    def resident():
        with open(f'/proc/{decoder_process.process.pid}/status') as file:
            return int(next(line for line in file if line.startswith('VmRSS')).split()[1])/1024
    try:
        file = read_container(cut)
        cost = image_cost(file)
        held = []
        for _ in range(4):
            with pytest.raises(OSError): decoder_process.decode(file, None, 1, cost, 60.)
            twice = ImageCost(2*cost.seconds, 2*cost.memory, cost.pixels)
            decoder_process.decode(file, None, 1, twice, 60., partly=True)
            # it answers the next one when it has let go of this one
            decoder_process.decode(read_container(encode(scene(40, 30), 'PNG')), None, 1, cost, 60.)
            held.append(resident())
    finally: decoder_process.close()
    assert max(held) < 110, held # a picture has 64 MB

# One door, one verdict

CHEAP = ['repeated_scans', 'scan_disguises', 'segment_floods', 'jpeg_headers', 'png_floods', 'png_lies', 'gif_floods',
         'gif_lies', 'webp_lies', 'bmp_lies', 'exif_breakage', 'polyglots', 'icc_junk', 'truncated', 'mutated',
         'foreign', 'zip_bombs', 'box_lies', 'tiff_lies']

def cheap_corpus(count):
    corpus = hostile.Corpus(1)
    corpus.kinds = CHEAP
    corpus.side = lambda: 500
    for _,data in corpus.files(count):
        if 0 < len(data) < 3_000_000: yield data
    yield from (dotted(300), encode(scene(40, 30), 'TIFF'), encode(scene(40, 30), 'JPEG2000'),
                encode(scene(40, 30), 'AVIF', speed=10), hostile.png(32_768, 100),
                hostile.png(8, 8, rows=bytes(999)))

def test_every_door_has_one_verdict(trained, tmp_path):
    "Python, the measuring pass, the command line and HTTP agree on every file"
    testclient = pytest.importorskip('fastapi.testclient',
                                     reason="fastapi is not installed; pip install 'amulet_hybrid[serve]'")
    from amulet_hybrid.model.classifier import ClassifierConfig, HybridClassifier
    from amulet_hybrid.serve.app import create_app
    from amulet_hybrid.serve.settings import Settings
    files = list(cheap_corpus(102))
    classifier = HybridClassifier(trained/'bundle', ClassifierConfig(), enable_caching=False)
    client = testclient.TestClient(create_app(classifier, Settings(answer_cache='off')), base_url='http://localhost')
    folder = tmp_path/'photos'
    folder.mkdir()
    for n,data in enumerate(files): (folder/f'{n:03d}.jpg').write_bytes(data)
    done = subprocess.run([BIN/'amulet', 'predict', folder, '--model-dir', trained/'bundle', '--output', 'out.jsonl'],
                          cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode==0, done.stderr
    said = [json.loads(line) for line in (tmp_path/'out.jsonl').read_text().splitlines()]
    assert len(said)==len(files)
    for n,(data,line) in enumerate(zip(files, said)):
        python = verdict(data)
        answer = classifier.classify_safe(data)
        row,_ = measure_bytes(data, LIMITS)
        http = client.post('/predict/file', files={'file': data})
        assert http.status_code in (200, 413, 415, 422), (n, http.text)
        found = {'python': python, 'classifier': 'read' if answer.success else answer.error_code,
                 'inspection': row['issues'] if row['reason'] else 'read',
                 'http': http.json().get('error_code', 'read'),
                 'command': line.get('error_code') or 'read'}
        assert len(set(found.values()))==1, (n, found)
    assert len({verdict(data) for data in files}) >= 6 # all sorts of them

def test_corpus_is_the_same_each_time():
    a,b = (hostile.Corpus(5),hostile.Corpus(5))
    for corpus in (a, b): corpus.kinds = CHEAP
    assert list(a.files(34))==list(b.files(34))
