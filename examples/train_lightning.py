"""Train by Lightning and let the network shrink on the way. Stopped at any time and started again, it goes on
to the same end. Needs `pip install "fasp_fx[lightning]"`.

    python train_lightning.py FOLDER
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fasp_fx.training import Schedule, cubic, lightning_callback


class Digits(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


seed_everything(0)
net: nn.Module = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4))
rows = torch.randn(512, 16)
data = DataLoader(TensorDataset(rows, rows.abs().argmax(1) % 4), batch_size=32)
schedule = Schedule(cubic(0.5, begin=16, end=64, times=2), rows.split(64))
folder = Path(sys.argv[1])
kept = folder / "last.ckpt"
if kept.exists():
    schedule.load_state_dict(torch.load(kept, weights_only=False)["callbacks"]["fasp_fx"])
    net = schedule.shrink(net)
callbacks = [lightning_callback(schedule, "net"), ModelCheckpoint(folder, save_last=True)]
trainer = Trainer(
    max_epochs=8, accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False
)
trainer.fit(Digits(net), data, ckpt_path=str(kept) if kept.exists() else None)
print(f"{schedule.left:.3f} left, loss {trainer.callback_metrics['loss']:.6f}")
