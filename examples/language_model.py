"""Language model: prune it, save it as a folder of transformers, load that like any other and let it write.

`python language_model.py MODEL TEXT --out small`; MODEL is a folder, a hub id or a .gguf file, TEXT is what
calibrates.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from fasp_fx import hf

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", type=Path)
parser.add_argument("text", type=Path)
parser.add_argument("--out", default="small", help="a new folder")
parser.add_argument("--prompt", default="The river rose in the night, and")
for name, default in {"sparsity": 0.2, "round": 16, "length": 512, "chunks": 32, "tokens": 40}.items():
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
batches = (
    ids[: len(ids) // options.length * options.length].view(-1, 1, options.length)[: options.chunks].unbind()
)
pruned = hf.prune(dense, tokenizer, calibration=batches, sparsity=options.sparsity, round_to=options.round)
print(pruned.report)
pruned.save_pretrained(options.out)
# The code of the class is saved along.
smaller = AutoModelForCausalLM.from_pretrained(options.out, trust_remote_code=True)
write = pipeline("text-generation", model=smaller, tokenizer=AutoTokenizer.from_pretrained(options.out))
print(write(options.prompt, max_new_tokens=options.tokens, do_sample=False)[0]["generated_text"])
