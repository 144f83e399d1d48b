"The service on a real port: what a test client inside the process cannot show"
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from PIL import Image

SERVER = '''
import sys, time
from types import SimpleNamespace
from amulet_hybrid.images import read_image
from amulet_hybrid.serving import create_app, serve

class Slow:
    classes,model_version = ['clay', 'gold'],'slow-1'
    def classify(self, photo, confidence_threshold=None):
        time.sleep(1)
        gold = float(read_image(photo).mean()/255)
        return SimpleNamespace(label='gold', top='gold', confidence=gold, probabilities={'clay': 1-gold, 'gold': gold}, reason='', prediction_set=[], coverage=None, novelty=None,
                               timings={})

serve(create_app(Slow(), max_bytes=2**20), port=int(sys.argv[1]))
'''

def photo():
    out = io.BytesIO()
    Image.new('L', (16,16), 230).save(out, 'PNG')
    return out.getvalue()

@pytest.fixture
def server():
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, '-c', SERVER, str(port)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    url = f'http://127.0.0.1:{port}'
    try:
        for _ in range(300):
            try: httpx.get(f'{url}/health'); break
            except httpx.ConnectError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(.1)
        yield process,url
    finally:
        process.kill()
        process.communicate()

def ask(url):
    "A prediction under way: the thread that waits for it, and where the answer will be"
    answers = []
    worker = threading.Thread(target=lambda: answers.append(httpx.post(f'{url}/predict/file', files={'file': photo()}, timeout=30)))
    worker.start()
    return worker,answers

def test_event_loop_stays_free(server):
    "`/health` answers while a prediction is under way"
    _,url = server
    worker,answers = ask(url)
    time.sleep(.3)
    start = time.perf_counter()
    assert httpx.get(f'{url}/health').json()['predictions_count']==0
    took = time.perf_counter()-start
    worker.join()
    assert took < .5
    assert answers[0].json()['predicted_class']=='gold'

def test_too_large_is_told_not_cut_off(server):
    "A client that sends 60 MB at once still gets to read why it was refused, with and without a length"
    _,url = server
    def pieces():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        for _ in range(60): yield b'x'*2**20
    for request in (dict(files={'file': b'x'*60*2**20}), dict(content=pieces(), headers={'content-type': 'multipart/form-data; boundary=x'})):
        r = httpx.post(f'{url}/predict/file', timeout=60, **request)
        assert (r.status_code, r.json()['error_code'])==(413, 'image_too_large')

@pytest.mark.skipif(sys.platform!='linux', reason='reads /proc')
def test_refused_bodies_take_no_memory(server):
    process,url = server
    def resident(): return int(open(f'/proc/{process.pid}/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')
    httpx.post(f'{url}/predict/file', files={'file': b'x'*2**21}, timeout=60)
    before = resident()
    for _ in range(3): httpx.post(f'{url}/predict/file', files={'file': b'x'*60*2**20}, timeout=60)
    assert resident()-before < 20*2**20

@pytest.mark.parametrize('stop', [signal.SIGINT, signal.SIGTERM])
def test_stops_gracefully(server, stop):
    "What has begun is finished; then the process ends"
    process,url = server
    worker,answers = ask(url)
    time.sleep(.4)
    process.send_signal(stop)
    worker.join()
    assert answers[0].json()['predicted_class']=='gold'
    _,told = process.communicate(timeout=20)
    assert process.returncode==(0 if stop==signal.SIGINT else -signal.SIGTERM)
    assert 'Application shutdown complete' in told and 'Traceback' not in told

def test_port_in_use(server):
    _,url = server
    again = subprocess.run([sys.executable, '-c', SERVER, url.split(':')[-1]], capture_output=True, text=True, timeout=60)
    assert again.returncode==1 and '[port_in_use]' in again.stderr
