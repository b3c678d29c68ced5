"""Train a small text classifier by transformers' Trainer and let it shrink on the way. Stopped at any time
and started again, it goes on to the same end.

    python train_trainer.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fasp_fx.training import Schedule, cubic, trainer_callback

torch.manual_seed(0)
config = BertConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
)
model = BertForSequenceClassification(config)
texts = torch.randint(0, 64, (512, 16))
examples: Any = [{"input_ids": text, "labels": int(text.sum() % 2)} for text in texts]
batches = [{"input_ids": part} for part in texts.split(64)]
schedule = Schedule(cubic(0.4, begin=20, end=80, times=2), batches, exclude=("*.attention.*",))
folder = Path(sys.argv[1])
# The callback writes its file last, so that a checkpoint with it is whole.
last = max(folder.glob("checkpoint-*/pruning.json"), key=lambda file: file.stat().st_mtime, default=None)
if last:
    schedule.load_state_dict(json.loads(last.read_text()))
    model = schedule.shrink(model)
how = TrainingArguments(
    str(folder),
    max_steps=120,
    per_device_train_batch_size=32,
    learning_rate=1e-3,
    save_steps=40,
    logging_steps=20,
)
trainer = Trainer(model, how, train_dataset=examples, callbacks=[trainer_callback(schedule)])
trainer.train(resume_from_checkpoint=last and str(last.parent))
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print(losses, f"{schedule.left:.3f} left", sum(weight.numel() for weight in model.parameters()))
