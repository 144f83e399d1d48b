"A training that is killed at random moments ends with the same weights; the same code on a GPU"
import json
import subprocess
import sys

import pytest

torch = pytest.importorskip('torch')

DRIVER = '''
import json, os, random, signal, sys, tempfile
import torch
torch.set_num_threads(1)
from amulet_hybrid.augment.torch_transforms import create_pipeline_from_preset
from amulet_hybrid.data.samples import DESIGNS, draw_amulet
from amulet_hybrid.learn.finetune import TwoStageTrainer
from amulet_hybrid.learn.transfer_model import create_transfer_model, state_digest

class Amulets:
    labels = [i%3 for i in range(14)]
    photos = [draw_amulet(list(DESIGNS.values())[i%3], i, side=48) for i in range(14)]
    def __init__(self, tell): self.tell = tell
    def __len__(self): return len(self.labels)
    def __getitem__(self, i):
        self.tell()
        return self.photos[i],self.labels[i]

def train(folder, tell):
    "Two stages with everything on, taken up where a checkpoint is; its digest goes into a file"
    def loaders():
        pipeline = create_pipeline_from_preset('medium', image_size=48, batch_size=5)
        data = Amulets(tell)
        return pipeline.create_dataloader(data, 'train', 'balanced_batch'),pipeline.create_dataloader(data, 'val')
    net = create_transfer_model('timm/test_resnet', 3, pretrained=False, device='cpu')
    trainer = TwoStageTrainer(net, device='cpu', checkpoint_dir=folder, resume=True, checkpoint_steps=2, accumulate=2,
                              class_weights=True, focal_gamma=1.)
    trainer.train_stage1(*loaders(), epochs=2, lr=1e-2)
    trainer.train_stage2(*loaders(), epochs=2, unfreeze_layers=-1)
    history = trainer.history.drop(columns='seconds').to_dict('list')
    with open(f'{folder}/end.json', 'w') as file: json.dump([state_digest(trainer.model), repr(history)], file)

def begin(folder, most):
    "A process that trains and is killed when it has asked for so many photos; True: it ended before that"
    read,write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try: train(folder, lambda: os.write(write, b'.'))
        finally: os._exit(0)
    os.close(write)
    seen = 0
    while seen < most and (got := os.read(read, 1)): seen += 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    return seen < most

kills,rng = int(sys.argv[1]),random.Random(int(sys.argv[2]))
ends,killed = [],0
for stop in (False, True):
    with tempfile.TemporaryDirectory() as folder:
        while not begin(folder, rng.randint(1, int(sys.argv[3])) if stop and killed < kills else 10**9):
            killed += 1
        ends.append(json.load(open(f'{folder}/end.json')))
print(json.dumps({'killed': killed, 'same': ends[0]==ends[1], 'ends': ends}))
'''

def killed_and_resumed(kills, seed, most):
    "What the driver says: how often a run was killed, and whether it ended as the one that was left alone"
    done = subprocess.run([sys.executable, '-c', DRIVER, str(kills), str(seed), str(most)], capture_output=True,
                          text=True)
    assert done.returncode==0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])

def test_killed_at_random_moments_a_training_ends_with_the_same_weights():
    found = killed_and_resumed(4, 1, 45)
    assert found['killed'] >= 3
    assert found['same'], found['ends']

@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
def test_on_a_gpu_in_mixed_precision():
    from amulet_hybrid.learn.finetune import TwoStageTrainer
    from amulet_hybrid.learn.transfer_model import create_transfer_model
    net = create_transfer_model('timm/test_resnet', 3, pretrained=False, device='cuda')
    trainer = TwoStageTrainer(net, device='cuda')
    photos = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches = list(zip(photos.split(8), (torch.arange(24)%3).split(8), strict=True))
    trainer.train_stage1(batches, batches, epochs=2)
    trainer.train_stage2(batches, batches, epochs=3, unfreeze_layers=-1)
    assert trainer.history['train_loss'].notna().all()
    assert all(bool(torch.isfinite(v).all()) for v in trainer.model.state_dict().values())
