"""Write initial weights in which one massive activation has been planted: an outlier made to order, and labelled so.

    python benchmarks/seeded_outlier.py quickstart/seeded.pth                  # planted in the MLP of block 2
    python benchmarks/seeded_outlier.py quickstart/seeded.pth --embedding      # planted in the position embedding

Small models trained for minutes grow large activations everywhere, not the few extreme ones of large models. To see
what those do to quantization, one is planted: channel 7 of token 1 carries 300.

- In an MLP, as the paper explains outliers: a row of fc1 that answers to what marks the token, and a column of fc2
aligned
  with it. The token is marked by 3 in its position embedding.
- In the position embedding: the stream carries 300 when it enters the first block, where no penalty on block outputs
reaches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

TOKEN, CHANNEL, BLOCK, SIZE = 1, 7, 2, 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="FILE")
    parser.add_argument("--embedding", action="store_true", help="plant it in the position embedding")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=14, **kwargs).eval()
    with torch.no_grad():
        plant(model, arguments.embedding)
        outputs: list[torch.Tensor] = []
        model.blocks[BLOCK].register_forward_hook(lambda block, args, output: outputs.append(output))
        model(torch.zeros(1, 3, 32, 32))
    peak = int(outputs[0].abs().argmax())
    token, channel = divmod(peak, outputs[0].shape[-1])
    print(f"block {BLOCK} puts out {float(outputs[0].flatten()[peak]):.1f} at token {token}, channel {channel}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), arguments.output)


def plant(model: torch.nn.Module, embedding: bool) -> None:
    if embedding:
        model.pos_embed[0, TOKEN, CHANNEL] = SIZE
        return
    model.pos_embed[0, TOKEN, CHANNEL] = 3.0
    mlp = model.blocks[BLOCK].mlp
    # After LayerNorm the mark is sqrt(64 - 1) or a little less; other tokens have about 1 there and stay below the
    # bias.
    mlp.fc1.weight[0] = 0.0
    mlp.fc1.weight[0, CHANNEL] = 4.0
    mlp.fc1.bias[0] = -16.0
    mlp.fc2.weight[CHANNEL, 0] = SIZE / (4.0 * 7.8 - 16.0)


if __name__ == "__main__":
    main()
