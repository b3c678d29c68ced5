"""Fine-tune: prune a language model, train what is left for some minutes, and print perplexity: dense,
pruned, recovered.

`python finetune.py MODEL wikitext2-valid.txt`; MODEL is a folder, a hub id or a .gguf file. The end of the
text measures, the rest calibrates and trains.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasp_fx
from fasp_fx.hf import perplexity

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", type=Path)
parser.add_argument("text", type=Path)
for name, default in {
    "sparsity": 0.3,
    "steps": 200,
    "batch": 1,
    "length": 256,
    "calibrate": 64,
    "measure": 40,
    "round": 16,
    "rate": 5e-5,
}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
options = parser.parse_args()
where, gguf = (
    (options.model.parent, {"gguf_file": options.model.name})
    if options.model.suffix == ".gguf"
    else (options.model, {})
)
tokenizer = AutoTokenizer.from_pretrained(where, **gguf)
dense = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **gguf).eval()
ids = torch.tensor(
    tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
)
chunks = ids[: len(ids) // options.length * options.length].view(-1, options.length)
train, test = chunks[: -options.measure], chunks[-options.measure :]
calls = [{"input_ids": chunk[None], "use_cache": False} for chunk in train[: options.calibrate]]
result = fasp_fx.prune(
    dense, (), calls[0], calibration=calls, sparsity=options.sparsity, round_to=options.round
)
print(f"dense {perplexity(dense, test):.3f}\npruned {perplexity(result.module, test):.3f}", flush=True)
# The layers; the vocabulary stays.
weights = [weight.requires_grad_(".layers." in name) for name, weight in result.module.named_parameters()]
optimizer = torch.optim.AdamW(
    [weight for weight in weights if weight.requires_grad], lr=options.rate, weight_decay=0.0
)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, options.rate, total_steps=options.steps, pct_start=0.1
)
for batch in torch.randint(
    len(train), (options.steps, options.batch), generator=torch.Generator().manual_seed(0)
):
    logits = result.module(input_ids=train[batch], use_cache=False).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), train[batch, 1:].flatten()).backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
print(f"recovered {perplexity(result.module, test):.3f}")
