"The feature cache under bad treatment: killed writers, many processes, flipped bytes, files cut short, a limit"
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import time
from functools import cache as once

import numpy as np
import pytest

from amulet_hybrid.features.cache import FeatureCache, block_key

WIDTH = 1500

def key_of(i): return hashlib.sha256(str(i).encode()).hexdigest()

@once
def row_of(key, block='hog', width=WIDTH):
    "The only right row of a photo in a block"
    return np.random.default_rng([int(key[:8], 16), *block.encode()]).random(width, dtype=np.float32)

def rows_of(numbers, block='hog', width=WIDTH): return {key_of(i): row_of(key_of(i), block, width) for i in numbers}

def check(found, block='hog'):
    for key,row in found.items(): assert np.array_equal(row, row_of(key, block)), key
    return len(found)

def to_disk(cache):
    "Work the log into the file and close it"
    cache.file.use(lambda db: db.execute('pragma wal_checkpoint(truncate)').fetchall())
    cache.file.close()
    return cache.file.newest()

@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING, 'amulet_hybrid')
    return caplog

CHILD = f'''
import random, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_cache import FeatureCache, check, key_of, rows_of
chance,cache = random.Random(int(sys.argv[2])),FeatureCache(sys.argv[1], float(sys.argv[3]) if sys.argv[3] else None)
cache.table.grain = 0 # every use is written, so that readers write as well
print('ready', flush=True)
while True:
    block = chance.choice(['hog', 'lbp'])
    some = [chance.randrange(3000) for _ in range(chance.randint(1, 120))]
    if chance.random() < .6: cache.store(block, rows_of(some, block))
    elif chance.random() < .9: check(cache.load(block, map(key_of, some)), block)
    else: check(cache.load(block), block)
    print('.', flush=True)
'''

def start(folder, seed, limit=''):
    child = subprocess.Popen([sys.executable, '-c', CHILD, folder, str(seed), str(limit)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True,
                             env={**os.environ, 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'})
    assert child.stdout.readline()=='ready\n', child.stderr.read()
    return child

@pytest.mark.parametrize('limit', ['', .015])
def test_writers_are_killed_and_every_row_is_right(tmp_path, told, limit):
    "Two processes write and read; one of them is killed in the middle again and again, the other lives through it all"
    survivor,chance = start(tmp_path, 1, limit),random.Random(0)
    ours = FeatureCache(tmp_path, limit or None)
    try:
        for i in range(12):
            victim = start(tmp_path, 100+i, limit)
            time.sleep(chance.uniform(.005, .25))
            assert victim.poll() is None, victim.stderr.read()
            victim.send_signal(signal.SIGKILL)
            victim.communicate()
            check(ours.load('hog', map(key_of, range(i*100, i*100+200))))
            assert survivor.poll() is None, survivor.stderr.read()
            if limit: assert ours.file.newest().stat().st_size <= limit*10**9
    finally:
        survivor.kill()
        out,error = survivor.communicate()
    assert error=='' and out.count('.') > 10
    assert not told.messages
    assert check(ours.load('hog')) and check(ours.load('lbp'), 'lbp')
    ours.store('fresh', rows_of(range(50), 'fresh'))
    assert check(FeatureCache(tmp_path).load('fresh'), 'fresh')==50
    if limit: assert ours.cache_stats()['bytes_on_disk'] <= limit*10**9 # with the log
    assert ours.file.use(lambda db: db.execute('pragma integrity_check').fetchall())==[(b'ok',)]
    assert [p.name for p in (tmp_path/'features').glob('*.sqlite')]==['000001.sqlite']

def test_killed_between_rows_and_commit(tmp_path):
    "The rows of a piece are there when all of them are, and not before"
    FeatureCache(tmp_path).store('hog', rows_of(range(10)))
    code = f'''if True:
        import os, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_cache import FeatureCache, rows_of
        cache = FeatureCache({str(tmp_path)!r})
        db = cache.file.open()
        db.execute('pragma cache_size=1') # what is not committed reaches the disk
        db.set_trace_callback(lambda line: line=='COMMIT' and os.kill(os.getpid(), 9))
        cache.store('hog', rows_of(range(10, 500)))'''
    assert subprocess.run([sys.executable, '-c', code]).returncode==-signal.SIGKILL
    cache = FeatureCache(tmp_path)
    assert check(cache.load('hog'))==10
    cache.store('hog', rows_of(range(10, 500)))
    assert check(cache.load('hog'))==500

def test_flipped_bytes(tmp_path, told):
    "Anywhere in the file: a row is right or absent, and after it was stored again it is there"
    whole = FeatureCache(tmp_path/'whole')
    for block in ('hog', 'lbp'): whole.store(block, rows_of(range(120), block))
    data = to_disk(whole).read_bytes()
    rng = np.random.default_rng(0)
    damaged = 0
    for turn in range(60):
        spoilt = bytearray(data)
        places = [rng.integers(100)] if turn%3==0 else rng.integers(100, 16384,
                                                                    3) if turn%3==1 else rng.integers(len(data),
                size=100)
        for place in places: spoilt[place] ^= 1 << rng.integers(8)
        folder = tmp_path/str(turn)/'features'
        folder.mkdir(parents=True)
        (folder/'000001.sqlite').write_bytes(spoilt)
        cache = FeatureCache(tmp_path/str(turn))
        for block in ('hog', 'lbp'):
            damaged += check(cache.load(block), block) < 120
            check(cache.load(block, map(key_of, range(120))), block)
            cache.store(block, rows_of(range(120), block))
            cache.load(block) # what was damaged and not yet read goes now
            cache.store(block, rows_of(range(120), block))
            assert check(cache.load(block), block)==120
        cache.file.close()
    assert damaged > 30 and told.messages

@pytest.mark.parametrize('share', [0, .001, .1, .5, .99])
def test_a_file_cut_short(tmp_path, told, share):
    cache = FeatureCache(tmp_path)
    cache.store('hog', rows_of(range(200)))
    path = to_disk(cache)
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    cache = FeatureCache(tmp_path)
    found = check(cache.load('hog'))
    assert found < 200 and (told.messages or not share)
    cache.store('hog', rows_of(range(200)))
    assert check(FeatureCache(tmp_path).load('hog'))==200

def test_a_log_cut_short_or_flipped(tmp_path):
    "What is in the log only is right or absent as well"
    cache,rng = FeatureCache(tmp_path/'whole'),np.random.default_rng(0)
    for i in range(0, 200, 20): cache.store('hog', rows_of(range(i, i+20)))
    parts = {p.name: p.read_bytes() for p in (tmp_path/'whole'/'features').iterdir() if not p.name.endswith('-shm')}
    assert len(parts['000001.sqlite-wal']) > 100_000
    for turn in range(20):
        folder = tmp_path/str(turn)/'features'
        folder.mkdir(parents=True)
        log = bytearray(parts['000001.sqlite-wal'])
        place = int(rng.integers(len(log)))
        if turn%2: log = log[:place]
        else: log[place] ^= 255
        (folder/'000001.sqlite').write_bytes(parts['000001.sqlite'])
        (folder/'000001.sqlite-wal').write_bytes(log)
        other = FeatureCache(tmp_path/str(turn))
        assert check(other.load('hog'))%20==0
        other.store('hog', rows_of(range(200)))
        assert check(other.load('hog'))==200

@pytest.mark.parametrize('kind', ['text', 'database', 'tables'])
def test_a_foreign_file(tmp_path, told, kind):
    folder = tmp_path/'features'
    folder.mkdir()
    if kind=='text': (folder/'000001.sqlite').write_text('a letter to my grandmother\n'*1000)
    else:
        db = sqlite3.connect(folder/'000001.sqlite')
        db.execute('create table letters(text)' if kind=='database' else 'create table known(text)')
        if kind=='tables': db.execute('pragma application_id=1634559537')
        db.commit()
        db.close()
    cache = FeatureCache(tmp_path)
    assert cache.load('hog')=={}
    assert len(told.messages)==1 and 'begun anew' in told.messages[0]
    cache.store('hog', rows_of(range(5)))
    assert check(FeatureCache(tmp_path).load('hog'))==5
    assert sorted(p.name for p in folder.glob('*.sqlite'))==['000002.sqlite']

def test_cleared_or_removed_under_another(tmp_path):
    "A process whose file has gone goes on with the new one; nothing of the old one comes back"
    a,b = FeatureCache(tmp_path),FeatureCache(tmp_path)
    for _ in range(5):
        a.store('hog', rows_of(range(20)))
        assert check(b.load('hog'))==20
        b.clear_cache()
        assert a.load('hog')=={} and a.cache_stats()['entries']==0
        a.store('hog', rows_of(range(20, 25)))
        assert check(b.load('hog'))==5
        for path in (tmp_path/'features').iterdir(): path.unlink()
        b.store('hog', rows_of(range(3)))
        a.store('hog', rows_of(range(3, 5)))
        assert check(a.load('hog'))==check(b.load('hog'))==5

def test_eviction_keeps_the_limit_and_drops_the_oldest(tmp_path, monkeypatch):
    cache,now = FeatureCache(tmp_path, .02),[10**9]
    monkeypatch.setattr(time, 'time', lambda: now[0])
    for i in range(0, 6000, 250):
        now[0] += 7200
        cache.store('hog', rows_of(range(i, i+250)))
        cache.load('hog', map(key_of, range(100))) # in use all the time
        assert cache.cache_stats()['bytes_on_disk'] <= .02*10**9
    rows = cache.load('hog')
    left,kept = check(rows),[i for i in range(6000) if key_of(i) in rows]
    assert kept[:100]==list(range(100)) and kept[100:]==list(range(kept[100], 6000))
    stats = cache.cache_stats()
    assert stats['evictions']==6000-left and stats['entries']==left and left*4*WIDTH > .6*.02*10**9
    smaller = FeatureCache(tmp_path, .01)
    smaller.store('hog', rows_of([6000]))
    assert smaller.cache_stats()['bytes_on_disk'] <= .01*10**9
    assert key_of(6000) in smaller.load('hog') and check(smaller.load('hog')) < left

@pytest.mark.parametrize('width', [1, 60, 2100, 5000, 40_000])
def test_limit_holds_for_rows_of_any_width(tmp_path, width):
    cache = FeatureCache(tmp_path, .01)
    for i in range(8):
        cache.store('hog', {key_of(f'{i} {j}'): np.full(width, i, np.float32)
                            for j in range(min(5000, 3*10**6//(4*width)))})
    assert cache.cache_stats()['bytes_on_disk'] <= 10**7
    assert cache.load('hog', [key_of('7 0')])[key_of('7 0')][0]==7

def test_one_byte_or_one_setting_misses(tmp_path):
    from PIL import Image  # here and not above: the processes that are killed import this file

    from amulet_hybrid.core import file_digest
    from amulet_hybrid.features import classical  # noqa: F401 (it registers its blocks)
    from amulet_hybrid.features.contract import make_extractor
    path,cache = tmp_path/'photo.png',FeatureCache(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64,64,3), dtype=np.uint8)).save(path)
    sha,hog = file_digest(path),make_extractor('hog')
    key = block_key(hog.fingerprint(), mode='stretch', decode_at=320)
    cache.store(key, {sha: hog.extract_features(np.zeros((64,64,3), np.uint8))})
    assert list(cache.load(key, [sha]))==[sha]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert cache.load(key, [file_digest(path)])=={}
    others = [block_key(hog.fingerprint(), mode='fit', decode_at=320),
              block_key(hog.fingerprint(), mode='stretch', decode_at=321)]
    for other in (*others, block_key(make_extractor('lbp').fingerprint(), mode='stretch', decode_at=320)):
        assert cache.load(other, [sha])=={}
    for name,value in hog.get_params().items():
        if isinstance(value, int):
            assert cache.load(block_key(make_extractor('hog', **{name: value+1}).fingerprint(), mode='stretch',
                                        decode_at=320), [sha])=={}
    hog.version = hog.version+1
    assert cache.load(block_key(hog.fingerprint(), mode='stretch', decode_at=320), [sha])=={}

def _in_a_fork(cache, queue):
    cache.store('hog', rows_of(range(20, 40)))
    queue.put(check(cache.load('hog')))

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_forked_and_pickled(tmp_path):
    cache,queue = FeatureCache(tmp_path),multiprocessing.get_context('fork').Queue()
    cache.store('hog', rows_of(range(20)))
    children = [multiprocessing.get_context('fork').Process(target=_in_a_fork, args=(cache, queue)) for _ in range(3)]
    for child in children: child.start()
    assert [queue.get(timeout=60) for _ in children]==[40]*3
    for child in children: child.join(60)
    assert check(cache.load('hog'))==check(pickle.loads(pickle.dumps(cache)).load('hog'))==40

def test_a_cache_out_of_order_stops_nothing(tmp_path, told):
    (tmp_path/'features').write_text('a file where the folder should be')
    cache = FeatureCache(tmp_path)
    cache.store('hog', rows_of(range(3)))
    assert cache.load('hog')=={} and 'goes on without it' in told.messages[0]

def test_disk_full(tmp_path, told):
    cache = FeatureCache(tmp_path)
    cache.store('hog', rows_of(range(20)))
    cache.file.open().execute('pragma max_page_count=20')
    cache.store('hog', rows_of(range(20, 400)))
    assert 'full' in told.messages[0]
    assert check(cache.load('hog'))==20
    cache.file.close()
    cache.store('hog', rows_of(range(20, 400)))
    assert check(cache.load('hog'))==400

@pytest.fixture
def extractor(tmp_path):
    "Two blocks, features kept"
    from amulet_hybrid.features.config import FeatureConfig
    from amulet_hybrid.features.extractor import HybridFeatureExtractor
    return HybridFeatureExtractor(FeatureConfig(blocks=('hog', 'lbp')), tmp_path/'cache', jobs=2)

def photo_of(seed, side=96): return np.random.default_rng(seed).integers(0, 255, (side,side,3), dtype=np.uint8)

def test_arrays_are_known_by_their_pixels(extractor):
    photos = [photo_of(i) for i in range(5)]
    first = extractor.extract_batch(photos)
    assert set(extractor.milliseconds)=={'decode', 'hog', 'lbp'}
    again = extractor.extract_batch([p.copy() for p in photos[::-1]])
    assert extractor.milliseconds=={} # nothing was read or measured
    for name in first: np.testing.assert_array_equal(again[name], first[name][::-1])
    changed = photos[0].copy()
    changed[0,0,0] ^= 1
    extractor.extract_batch([changed])
    assert extractor.milliseconds
    assert extractor.cache.cache_stats()['entries']==2*6

def test_files_are_known_by_their_bytes(extractor, tmp_path):
    from PIL import Image
    paths = [tmp_path/f'{i}.png' for i in range(3)]
    for i,path in enumerate(paths): Image.fromarray(photo_of(i)).save(path)
    first = extractor.extract_batch(paths)
    moved = paths[0].rename(tmp_path/'other name.png')
    again = extractor.extract_batch([moved, str(paths[1]), paths[2].read_bytes()])
    assert extractor.milliseconds=={}
    for name in first: np.testing.assert_array_equal(again[name], first[name])
    Image.fromarray(photo_of(9)).save(paths[1]) # another photo under the same name
    assert (extractor.extract_batch([paths[1]])['hog'][0]!=first['hog'][1]).any()

def test_a_photo_that_cannot_be_read_is_not_kept(extractor, tmp_path):
    from amulet_hybrid.core import ImageError
    for source in (b'no photo', tmp_path/'none.jpg'):
        with pytest.raises(ImageError): extractor.extract_batch([source])
    assert extractor.cache.cache_stats()['entries']==0

def test_views_and_settings_of_a_photo_are_part_of_its_key(extractor):
    from amulet_hybrid.features.contract import Photo
    wide = np.concatenate([photo_of(0), photo_of(1)], axis=1)
    whole,fitted = (extractor.extract_batch([Photo(wide, mode)])['hog'] for mode in ('stretch', 'fit'))
    assert (whole!=fitted).any()
    np.testing.assert_array_equal(extractor.extract_batch([Photo(wide, 'fit')])['hog'], fitted)

def test_limit_of_the_extractor(tmp_path):
    from amulet_hybrid.core import ConfigError
    from amulet_hybrid.features.config import FeatureConfig
    from amulet_hybrid.features.extractor import HybridFeatureExtractor
    config = FeatureConfig(blocks=('hog',))
    assert HybridFeatureExtractor(config, tmp_path).cache.limit==20*10**9
    assert HybridFeatureExtractor(config, tmp_path, cache_bytes=None).cache.limit==np.inf
    with pytest.raises(ConfigError, match='cache_bytes'): HybridFeatureExtractor(config, tmp_path, cache_bytes=1)
    small = HybridFeatureExtractor(config.replace(blocks=('hog:sides=128,256,512',)), tmp_path/'small',
                                   cache_bytes=10**7)
    for i in range(0, 240, 60): small.extract_batch([photo_of(j, 16) for j in range(i, i+60)])
    assert small.cache.cache_stats()['bytes_on_disk'] <= 10**7 and small.cache.cache_stats()['evictions'] > 0
