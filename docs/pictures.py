"""Pictures of the home page, taken by a headless Chromium: head of a report, page of the service with an answer.

    python docs/pictures.py runs/amulet6 photo.jpg    # a run folder with report.html and bundle/, and a photo to drop
"""
import io
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tests'))
IMAGES = ROOT/'nbs'/'images'

def shrink(source, target, width=860, height=640, colours=96):
    "The upper part of a screenshot, small enough for a repository"
    from PIL import Image
    picture = Image.open(source).convert('RGB')
    picture = picture.crop((0, 0, picture.width, min(picture.height, picture.width*height//width)))
    picture = picture.resize((width, picture.height*width//picture.width), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.quantize(colours, dither=Image.Dither.NONE).save(data, 'PNG', optimize=True)
    target.write_bytes(data.getvalue())

def wait_for(url, seconds=60):
    "Until a service answers"
    end = time.monotonic()+seconds
    while True:
        try: return urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            if time.monotonic() > end: raise
            time.sleep(.2)

def take(run, photo):
    "Both pictures"
    from chromium import Chromium
    from conftest import free_ports
    IMAGES.mkdir(exist_ok=True)
    browser,port = Chromium(),free_ports(1)
    code = 'from amulet_hybrid.cli.app import main; main()'
    options = ['--model-dir', str(run/'bundle'), '--port', str(port), '--database-url', 'off']
    command = [sys.executable, '-c', code, 'serve', *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as service:
        try:
            report = browser.open((run/'report.html').resolve().as_uri(), 1000, 760)
            report.screenshot(IMAGES/'report.full.png')
            shrink(IMAGES/'report.full.png', IMAGES/'report.png')
            wait_for(f'http://127.0.0.1:{port}/health/ready')
            page = browser.open(f'http://127.0.0.1:{port}/', 1000, 760)
            page.drop('body', photo)
            page.wait("document.querySelector('#answer .verdict') !== null")
            page.wait("!document.querySelector('#main').classList.contains('busy')")
            page.screenshot(IMAGES/'page.full.png')
            shrink(IMAGES/'page.full.png', IMAGES/'page.png')
        finally:
            service.terminate()
            browser.close()
            for part in IMAGES.glob('*.full.png'): part.unlink()

if __name__=='__main__':
    if len(sys.argv)!=3: raise SystemExit(__doc__)
    take(Path(sys.argv[1]), Path(sys.argv[2]).resolve())
