"""What must hold for any input (Hypothesis): splits part no group, a manifest loses no file, duplicates are a
partition, and JSON is refused exactly when it is nested too deep"""
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from amulet_hybrid.core import AmuletError, SplitError
from amulet_hybrid.data.duplicates import clusters, near_hashes
from amulet_hybrid.data.manifest import groups_from_csv, make_manifest
from amulet_hybrid.data.split import assign_groups, check_groups, folds, holdout, leakage, split_dataset_stratified
from amulet_hybrid.serve.request_body import check_json

# The same examples on every machine, and no limit of time: a busy machine finds no other bugs
always = settings(derandomize=True, deadline=None, max_examples=60)
few = settings(always, max_examples=20)

@st.composite
def labelled(draw):
    "Labels and groups of 8 to 60 photos; a group may hold several classes"
    n = draw(st.integers(8, 60))
    labels = draw(st.lists(st.sampled_from(['gold', 'clay', 'พระ']), min_size=n, max_size=n))
    groups = draw(st.lists(st.integers(0, draw(st.integers(2, n))), min_size=n, max_size=n))
    return np.array(labels),np.array([f'g{g}' for g in groups])

@always
@given(labelled(), st.floats(.1, .5), st.integers(0, 9))
def test_a_holdout_parts_no_group(data, test_size, seed):
    labels,groups = data
    try: part = holdout(labels, groups, test_size, seed)
    except SplitError: return
    check_groups(part, groups)
    assert set(part)=={'train', 'test'} and len(part)==len(labels)
    assert all(set(part[labels==name])=={'train', 'test'} for name in set(labels))
    assert (part==holdout(labels, groups, test_size, seed)).all()

@always
@given(labelled(), st.integers(2, 6), st.integers(0, 9))
def test_folds_part_no_group(data, k, seed):
    labels,groups = data
    try: fold = folds(labels, groups, k, seed)
    except SplitError: return
    check_groups(fold, groups)
    assert fold.min()==0 and fold.max() < k and len(np.unique(fold))==fold.max()+1 >= 2

@always
@given(labelled(), st.integers(0, 9))
def test_every_photo_gets_one_bin(data, seed):
    labels,groups = data
    shares = np.array([.6, .2, .2])
    found = assign_groups(labels, groups, shares, seed)
    assert found.shape==(len(labels),) and set(found) <= {0, 1, 2}
    check_groups(found, groups)

@few
@given(labelled(), st.integers(0, 9))
def test_three_parts_do_not_leak(data, seed):
    labels,groups = data
    table = pd.DataFrame({'path': [f'{i}.jpg' for i in range(len(labels))], 'label': labels, 'group': groups})
    try: parted = split_dataset_stratified(table, seed=seed)
    except SplitError: return
    assert len(parted)==len(table) and not len(leakage(parted))

names = st.text(st.characters(codec='utf-8', exclude_categories=('Cs', 'Cc', 'Zl', 'Zp'),
                              exclude_characters='/\\:*?"<>|\0'),
                min_size=1, max_size=12).map(str.strip).filter(lambda s: s and s[0] not in '._~' and s[-1]!='.')

@few
@given(st.dictionaries(names, st.sets(names, min_size=1, max_size=4), min_size=2, max_size=4))
def test_a_manifest_loses_no_file(tree):
    assume(not {n.casefold() for n in tree} & {'train', 'val', 'valid', 'validation', 'test', 'testing', 'training'})
    with tempfile.TemporaryDirectory() as folder:
        made = set()
        for label,files in tree.items():
            (Path(folder)/label).mkdir(exist_ok=True)
            for name in files:
                path = Path(folder)/label/f'{name}.jpg'
                path.write_bytes(b'x')
                made.add((path.relative_to(folder).as_posix(), label))
        manifest,root = make_manifest(folder)
        assert root==Path(folder) and manifest['path'].is_unique
        assert set(zip(manifest['path'], manifest['label']))==made

@few
@given(st.dictionaries(names, st.sampled_from(['a', 'b', 'c']), min_size=1, max_size=8))
def test_groups_of_a_table_arrive(known):
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder)/'groups.csv'
        pd.DataFrame({'path': list(known), 'group': list(known.values())}).to_csv(table, index=False)
        found = groups_from_csv(pd.Series([*known, 'nobody.jpg']), table)
    assert list(found)[:-1]==list(known.values()) and not found.iloc[-1]

@always
@given(st.integers(1, 30), st.data())
def test_clusters_are_connected_components(n, data):
    pairs = np.array(data.draw(st.lists(st.tuples(st.integers(0, n-1), st.integers(0, n-1)), max_size=40)),
                     int).reshape(-1, 2)
    found = np.asarray(clusters(n, pairs))
    graph = coo_array((np.ones(len(pairs)), (pairs[:,0], pairs[:,1])), shape=(n, n))
    truth = connected_components(graph, directed=False)[1]
    assert ((found[:,None]==found)==(truth[:,None]==truth)).all()

@few
@given(st.integers(0, 2**32-1), st.integers(2, 60), st.integers(0, 12))
def test_near_hashes_are_all_found(seed, n, radius):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**63, n, dtype=np.uint64)
    # copies with a bit changed
    hashes[n//2:] = hashes[:n-n//2] ^ (np.uint64(1) << rng.integers(0, 63, n-n//2, dtype=np.uint64))
    apart = np.bitwise_count(hashes[:,None] ^ hashes)
    truth = {(i, j) for i,j in np.argwhere(apart <= radius) if i < j}
    assert {tuple(sorted(p)) for p in np.asarray(near_hashes(hashes, radius, exact=True)).tolist()}=={(int(i), int(j))
            for i,j in truth}

values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8),
                      lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(st.text(max_size=4), inner, max_size=4), max_leaves=20)

def depth_of(value) -> int:
    "Brackets around the innermost value"
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1+max(map(depth_of, inside), default=0)

@always
@given(values, st.integers(0, 6), st.booleans())
def test_depth_is_counted_without_parsing(value, limit, plain):
    data = json.dumps(value, ensure_ascii=plain).encode()
    if depth_of(value) <= limit: check_json(data, limit)
    else:
        with pytest.raises(AmuletError): check_json(data, limit)

@always
@given(st.binary(max_size=200))
def test_depth_of_anything(data):
    "Bytes that are no JSON are counted or refused, never an error of ours"
    try: check_json(data, 8)
    except AmuletError: pass
