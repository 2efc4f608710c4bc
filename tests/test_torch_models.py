"""A state dict that PyTorch wrote for a network with batch norm in it: loaded, run, folded, saved back."""

from __future__ import annotations

import numpy as np
import pytest

import cupybn
from tests.checkpoint_files import need
from tests.reference import bits, to_numpy

torch = pytest.importorskip("torch")


def a_network():
    """A network whose convolutions are plain, grouped, transposed, and both, in eval mode after some training."""
    torch.manual_seed(0)
    nn = torch.nn
    layers = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.BatchNorm2d(12, eps=1e-3),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 8, 2, groups=2, bias=False),
        nn.BatchNorm2d(8, affine=False),
    ]
    network = nn.Sequential(nn.Sequential(*layers[:6]), nn.Sequential(*layers[6:]))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
        for _ in range(3):
            network(torch.randn(4, 3, 9, 9) * 3 + 1)
    return network.eval()


def batch_norms(network):
    """The batch norm layers of a network by the prefixes of their keys, each after the convolution before it."""
    modules = dict(network.named_modules())
    return {f"{name}.": module for name, module in modules.items() if isinstance(module, torch.nn.BatchNorm2d)}


def close(ours, theirs):
    """Compare within some roundings of float32, relative to the largest element."""
    np.testing.assert_allclose(to_numpy(ours), theirs, rtol=0, atol=np.abs(theirs).max() * 2e-6)


@pytest.fixture(params=[".pt", ".safetensors"])
def path(request, tmp_path):
    need(request.param)
    return tmp_path / f"network{request.param}"


def save(network, path):
    if path.suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": network.state_dict()}, path)
    else:
        from safetensors.torch import save_file

        save_file(network.state_dict(), path)


@torch.no_grad()
def test_a_network_of_torch(xp, device, path):
    network = a_network()
    save(network, path)
    theirs = batch_norms(network)
    assert cupybn.find_batch_norms(path) == {"0.1.": 8, "0.4.": 12, "1.1.": 6, "1.4.": 8}
    ours = {
        prefix: cupybn.BatchNorm2d(None, eps=module.eps, affine=module.affine, device=device).eval()
        for prefix, module in theirs.items()
    }
    cupybn.load_checkpoint(path, ours)

    convolutions = iter([module for module in network.modules() if isinstance(module, torch.nn.modules.conv._ConvNd)])
    x = torch.randn(2, 3, 9, 9)
    for prefix, layer in ours.items():
        convolution = next(convolutions)
        before = convolution(x)
        expected = theirs[prefix](before)
        close(layer(xp.asarray(before.numpy())), expected.numpy())
        folded = cupybn.fold_conv_bn(
            xp.asarray(convolution.weight.numpy()),
            None if convolution.bias is None else xp.asarray(convolution.bias.numpy()),
            layer,
            transpose=isinstance(convolution, torch.nn.ConvTranspose2d),
            groups=convolution.groups,
        )
        weight, bias = (torch.from_numpy(to_numpy(array)) for array in folded)
        run = torch.nn.functional.conv_transpose2d if convolution.transposed else torch.nn.functional.conv2d
        close(run(x, weight, bias, stride=convolution.stride, groups=convolution.groups), expected.numpy())
        x = expected.relu()

    back = path.with_stem("back")
    cupybn.save_checkpoint(back, ours)
    state = {prefix + name: tensor for prefix, module in theirs.items() for name, tensor in module.state_dict().items()}
    if path.suffix == ".pt":
        loaded = torch.load(back, weights_only=True)
        assert list(loaded) == list(state)
    else:
        from safetensors.torch import load_file

        loaded = load_file(back)
    assert loaded.keys() == state.keys()
    for key, tensor in state.items():
        assert loaded[key].dtype == tensor.dtype
        assert bits(loaded[key].numpy()) == bits(tensor.numpy())
    fresh = a_network()
    keys = fresh.load_state_dict(loaded, strict=False)
    assert keys.unexpected_keys == []
    assert not any("running" in key for key in keys.missing_keys)


@torch.no_grad()
def test_a_network_of_bfloat16(device, path):
    network = a_network().bfloat16()
    save(network, path)
    for dtype in "bfloat16", "float32":
        ours = {
            prefix: cupybn.BatchNorm2d(None, affine=module.affine, device=device, dtype=dtype)
            for prefix, module in batch_norms(network).items()
        }
        cupybn.load_checkpoint(path, ours)
        for prefix, module in batch_norms(network).items():
            for name, tensor in module.state_dict().items():
                array = to_numpy(getattr(ours[prefix], name))
                assert bits(array) == bits(tensor.double().numpy().astype(array.dtype))
    ours = {prefix: layer.to(dtype="bfloat16") for prefix, layer in ours.items()}
    cupybn.save_checkpoint(path, ours)
    fresh = a_network().bfloat16()
    with torch.no_grad():
        for module in batch_norms(fresh).values():
            module.running_mean.zero_()
    state = torch.load(path, weights_only=True) if path.suffix == ".pt" else None
    if state is None:
        from safetensors.torch import load_file

        state = load_file(path)
    fresh.load_state_dict(state, strict=False)
    for one, other in zip(batch_norms(fresh).values(), batch_norms(network).values(), strict=True):
        for tensor, expected in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(tensor, expected)
