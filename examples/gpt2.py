"""A small GPT-2 of transformers, from random weights, on the bytes of any text, with the TWEO penalty.

    python examples/gpt2.py --text README.md --tweo-weight 0.01 --updates 300

Language models are not what this package is for: nothing of its validation, quantization or recipes knows text. `Tweo`
takes any module with transformer blocks, though. The two lines that concern TWEO are marked.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tweo_timm import Tweo, TweoConfig

LENGTH = 64
SIZES = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 4, "n_head": 4}
CONFIG = GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM", **SIZES)


def main(argv: Sequence[str] | None = None) -> Iterator[dict[str, float]]:
    """Train; yield one row of numbers per update."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in {"--text": Path(__file__), "--tweo-weight": 0.01, "--updates": 300, "--lr": 3e-3}.items():
        parser.add_argument(name, type=type(default), default=default, help=f"({default})")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    text = torch.tensor(list(options.text.read_bytes()))
    model = GPT2LMHeadModel(CONFIG).train()
    tweo = Tweo(model, TweoConfig(weight=options.tweo_weight))  # TWEO, 1 of 2
    optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    for _ in range(options.updates):
        starts = torch.randint(0, len(text) - LENGTH, (16,)).tolist()
        tokens = torch.stack([text[start : start + LENGTH] for start in starts])
        task, penalty = model(tokens, labels=tokens).loss, tweo.penalty()  # TWEO, 2 of 2
        optimizer.zero_grad()
        (task + penalty).backward()
        optimizer.step()
        yield {"loss": task.item(), "penalty": penalty.item(), "peak": float(tweo.peak_abs)}


if __name__ == "__main__":
    for step, row in enumerate(main()):
        if step % 20 == 0:
            print(step, {name: round(value, 4) for name, value in row.items()}, flush=True)
