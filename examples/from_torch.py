"""A network that PyTorch has trained: its checkpoint, run without PyTorch, folded, and saved for PyTorch to read.

PyTorch trains a small network on handwritten digits: four convolutions, of which one is grouped and one transposed, and
a hidden linear layer, each with batch norm and ReLU. Its state dict is saved as .safetensors and as .pt.
`load_checkpoint` fills the batch norm layers of this package from either file; with the convolutions of layers.py they
give PyTorch's scores, but for rounding. So do the weights alone, after `fold_conv_bn` and `fold_linear_bn`. What
`save_checkpoint` writes, PyTorch reads back to the same bits.

    pip install '.[examples]' torch
    python examples/from_torch.py
"""

import sys
from importlib.util import find_spec

import numpy as np

import cupybn
import layers
from layers import to_numpy, xp

STEPS, BATCH_SIZE, LEARNING_RATE, BOUND = 120, 64, 0.1, 1e-5
CONVOLUTIONS = {  # (C_in, C_out, kernel), and settings as PyTorch's classes and `convolution` below take them
    "first": ((1, 16, 3), {"padding": 1}),
    "grouped": ((16, 32, 3), {"stride": 2, "padding": 1, "groups": 4}),
    "transposed": ((32, 16, 2), {"stride": 2, "groups": 2}),
    "last": ((16, 32, 3), {"stride": 2, "padding": 1}),
}
TRANSPOSED = ("transposed",)


def torch_network():
    """The network in PyTorch. Its state dict has keys such as first.conv.weight and first.bn.running_mean."""
    from collections import OrderedDict

    from torch import nn

    network = nn.Sequential()
    for name, (shape, settings) in CONVOLUTIONS.items():
        conv = (nn.ConvTranspose2d if name in TRANSPOSED else nn.Conv2d)(*shape, **settings, bias=name != "first")
        network.add_module(name, nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(shape[1]), relu=nn.ReLU())))
    network.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    hidden = OrderedDict(linear=nn.Linear(32, 32), bn=nn.BatchNorm1d(32), relu=nn.ReLU())
    network.add_module("hidden", nn.Sequential(hidden))
    network.add_module("classes", nn.Linear(32, 10))
    return network


def train(x, labels):
    """A network that PyTorch has trained for some steps."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)  # as in layers.options
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = torch_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for _ in tqdm(range(STEPS), desc="PyTorch", unit="step"):
        batch = rng.choice(len(x), BATCH_SIZE, replace=False)
        loss = torch.nn.functional.cross_entropy(network(torch.tensor(x[batch])), torch.tensor(labels[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def write(state, path):
    """A state dict as a file, by PyTorch."""
    import torch
    from safetensors.torch import save_file

    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)


def read(path):
    """The state dict of a file, by PyTorch."""
    import torch
    from safetensors.torch import load_file

    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def load_norms(path):
    """Batch norm layers for all that a file has, by prefix. It tells neither their eps nor their inputs' rank."""
    found = cupybn.find_batch_norms(path)
    norms = {
        prefix: (cupybn.BatchNorm1d if prefix == "hidden.bn." else cupybn.BatchNorm2d)(channels).eval()
        for prefix, channels in found.items()
    }
    cupybn.load_checkpoint(path, norms)
    return norms


def convolution(x, weight, bias, transpose=False, stride=1, padding=0, groups=1):
    """Convolution as PyTorch has it: each group of channels for itself."""
    parts = zip(xp.split(x, groups, axis=1), xp.split(weight, groups), strict=True)
    if transpose:
        parts = [layers.conv_transpose2d(part, part_weight, stride, padding) for part, part_weight in parts]
    else:
        parts = [layers.conv2d(part, part_weight, stride, padding)[0] for part, part_weight in parts]
    y = xp.concatenate(parts, axis=1)
    return y if bias is None else y + bias[:, None, None]


def scores_of(weights, norms, x):
    """Scores by the weights of a state dict. Batch norm that is not in norms has been folded into them."""

    def norm_relu(name, x):
        prefix = f"{name}.bn."
        return xp.maximum(norms[prefix](x) if prefix in norms else x, 0)

    for name, (_, settings) in CONVOLUTIONS.items():
        weight, bias = weights[f"{name}.conv.weight"], weights.get(f"{name}.conv.bias")
        x = norm_relu(name, convolution(x, weight, bias, name in TRANSPOSED, **settings))
    x = x.mean(axis=(2, 3)) @ weights["hidden.linear.weight"].T + weights["hidden.linear.bias"]
    return norm_relu("hidden", x) @ weights["classes.weight"].T + weights["classes.bias"]


def fold(weights, norms):
    """Weights that do the work of batch norm, too."""
    folded = dict(weights)
    for name, (_, settings) in CONVOLUTIONS.items():
        weight, bias, norm = f"{name}.conv.weight", f"{name}.conv.bias", norms[f"{name}.bn."]
        how = {"transpose": name in TRANSPOSED, "groups": settings.get("groups", 1)}
        folded[weight], folded[bias] = cupybn.fold_conv_bn(weights[weight], weights.get(bias), norm, **how)
    weight, bias = "hidden.linear.weight", "hidden.linear.bias"
    folded[weight], folded[bias] = cupybn.fold_linear_bn(weights[weight], weights[bias], norms["hidden.bn."])
    return folded


def same_bits(state, expected):
    return state.keys() == expected.keys() and all(
        state[key].dtype == value.dtype and state[key].numpy().tobytes() == value.numpy().tobytes()
        for key, value in expected.items()
    )


def main():
    args = layers.options(__doc__, "the checkpoints", needed=("safetensors",))
    if find_spec("torch") is None:
        print("skipped: PyTorch cannot be found, from which this example comes: pip install torch")
        return
    import torch
    from safetensors.numpy import load_file
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)  # (N, 1, 8, 8), from 0 to 1
    data = train_test_split(images, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    x, x_test, labels, labels_test = data
    network = train(x, labels)
    with torch.no_grad():
        expected = network(torch.tensor(x_test)).numpy()
    print(f"PyTorch: {(expected.argmax(axis=1) == labels_test).mean():.1%} of {len(x_test)} held-out digits right")

    paths = [args.output / f"digits{suffix}" for suffix in (".safetensors", ".pt")]
    for path in paths:
        write(network.state_dict(), path)
    weights = {key: xp.asarray(value) for key, value in load_file(paths[0]).items() if ".bn." not in key}
    for path in paths:
        norms = load_norms(path)
        print(f"{path}: batch norm", *(f"{prefix}* ({norm.num_features})" for prefix, norm in norms.items()))
        folded = fold(weights, norms)
        for what, scores in {
            "as it is": scores_of(weights, norms, xp.asarray(x_test)),
            "folded": scores_of(folded, {}, xp.asarray(x_test)),
        }.items():
            error = abs(to_numpy(scores) - expected).max() / abs(expected).max()
            print(f"  {what:9}: largest difference from PyTorch {error:.1e} of the largest score")
            if not error <= BOUND:
                sys.exit(f"expected a difference of {BOUND} or less")

        saved = path.with_stem("norms")
        cupybn.save_checkpoint(saved, norms)
        if not same_bits(read(saved), {key: value for key, value in network.state_dict().items() if ".bn." in key}):
            sys.exit(f"expected PyTorch to read from {saved} what it had written")
        print(f"  {saved}, read by PyTorch: the same bits")


if __name__ == "__main__":
    layers.run(main)
