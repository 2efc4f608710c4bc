"""Conversion of models of PyTorch's: which layers become this library's, and what they keep."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest

torch = pytest.importorskip("torch")

from torch.nn.utils import parametrize  # noqa: E402

import cupybn.torch  # noqa: E402
from cupybn.torch import convert  # noqa: E402

KINDS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


class Own(torch.nn.BatchNorm2d):
    """A layer of somebody's own."""


class Block(torch.nn.Module):
    """Layers in containers, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)
        self.norm = torch.nn.BatchNorm2d(3)
        self.again = self.norm
        self.listed = torch.nn.ModuleList([torch.nn.BatchNorm2d(3), torch.nn.Sequential(torch.nn.BatchNorm2d(3))])
        self.named = torch.nn.ModuleDict({"a": torch.nn.BatchNorm3d(3)})
        self.unseen = [self.norm]

    def forward(self, x):
        x = self.again(torch.relu(self.norm(self.conv(x))))
        for layer in self.listed:
            x = layer(x)
        return self.named["a"](x[:, :, None])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_a_layer(kind):
    """The layer stays the same object, so it shares all with itself."""
    layer = getattr(torch.nn, kind)(3, eps=1e-3, momentum=None).eval()
    kept = dict(layer.state_dict(keep_vars=True))
    text = repr(layer)
    converted = convert(layer)
    assert type(converted) is getattr(cupybn.torch, kind)
    assert isinstance(converted, getattr(torch.nn, kind))
    assert converted is layer
    assert not converted.training
    assert all(converted.state_dict(keep_vars=True)[name] is tensor for name, tensor in kept.items())
    assert repr(converted) == text
    assert converted.activation is None


def test_nested_models():
    """All layers are found wherever they are, in place; a second time changes nothing."""
    model, x = Block(), torch.randn(4, 3, 5, 5)
    original = copy.deepcopy(model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert convert(model) is model
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 4
    assert {type(norm).__module__ for norm in norms} == {"cupybn.torch.layers"}
    assert model.norm is model.again is model.unseen[0]
    assert list(model.named_parameters()) == list(parameters.items())
    assert list(model.named_buffers()) == list(buffers.items())
    types = list(map(type, model.modules()))
    assert list(map(type, convert(model).modules())) == types
    torch.testing.assert_close(model(x), original(x))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, original.state_dict()[name])
    assert model.norm.num_batches_tracked == 2
    original.load_state_dict(model.state_dict())
    model.load_state_dict(original.state_dict())
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert list(map(type, other.modules())) == types
        assert other.norm is other.again
        assert torch.equal(other.eval()(x), model.eval()(x))
        model.train()


def test_layers_that_are_left_alone():
    """Layers of other classes: derived, synchronized, lazy, parametrized ones, and other norms."""
    others = [
        Own(3),
        torch.nn.SyncBatchNorm(3),
        torch.nn.LazyBatchNorm2d(),
        torch.nn.InstanceNorm2d(3),
        torch.nn.GroupNorm(1, 3),
        torch.nn.BatchNorm2d(3),
    ]
    parametrize.register_parametrization(others[-1], "weight", torch.nn.Softplus())
    types = list(map(type, others))
    convert(torch.nn.Sequential(*others))
    assert list(map(type, others)) == types
    lazy = others[2]
    lazy(torch.randn(2, 3, 2, 2))
    assert type(convert(lazy)) is cupybn.torch.BatchNorm2d  # it is one like others now


def test_what_a_layer_has_besides():
    """Attributes, frozen parameters, hooks of all kinds, and handles that still remove them."""
    layer = torch.nn.BatchNorm1d(3)
    layer.note = object()
    layer.bias.requires_grad_(False)
    layer.register_buffer("own", torch.ones(2))
    note, called = layer.note, []
    handles = [
        layer.register_forward_pre_hook(lambda *_: called.append("before")),
        layer.register_forward_hook(lambda *_: called.append("after")),
        layer.register_full_backward_hook(lambda *_: called.append("back")),
        layer.register_state_dict_pre_hook(lambda *_: called.append("state")),
        layer.register_load_state_dict_post_hook(lambda *_: called.append("loaded")),
    ]
    seen = weakref.ref(layer)
    convert(layer)
    assert layer is seen()
    assert layer.note is note
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).sum().backward()
    layer.load_state_dict(layer.state_dict())
    assert called == ["before", "after", "back", "state", "loaded"]
    assert layer.bias.grad is None
    assert layer.weight.grad is not None
    for handle in handles:
        handle.remove()
    called.clear()
    layer(x).sum().backward()
    layer.state_dict()
    assert called == []


def test_whose_optimizer_goes_on():
    """An optimizer that was made before moves the parameters of the converted model."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    convert(model)
    model(torch.randn(4, 3)).pow(3).sum().backward()
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_memory_formats_of_models():
    model = convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = model(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_torchs_own_conversion():
    """PyTorch's conversion for several processes takes these layers for its own."""
    model = convert(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
    weight = model[0].weight
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is torch.nn.SyncBatchNorm
    assert model[0].weight is weight


def test_several_processes(tmp_path):
    """`DistributedDataParallel` takes a converted model, whose gradients are those of the model alone."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no processes")
    model, x = convert(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))), torch.randn(4, 3)
    alone = copy.deepcopy(model)
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        spread = torch.nn.parallel.DistributedDataParallel(model)
        for each in spread, alone:
            for _ in range(2):
                each(x).pow(3).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert torch.equal(model[1].running_mean, alone[1].running_mean)


def test_errors():
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module \(got dict\)"):
        convert({})
