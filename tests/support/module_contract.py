"""The contract of every backbone with tools that use its modules: hooks, adapters, quantised layers, sharding.

These tools act when a module is called, and expect that it returns a tensor.
"""

import contextlib
import copy
import socket

import pytest
import torch
from timm.models._features import FeatureHookNet
from torch import nn
from torch.nn.modules.conv import _ConvNd

from support.seeded import image
from terrazzo.errors import InputError

SIZE = (64, 64)
ODD = (70, 50)  # not a multiple of the patch size


@contextlib.contextmanager
def alone():
    """A process group with a single process."""
    with socket.socket() as port:
        port.bind(("localhost", 0))
        address = f"tcp://localhost:{port.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Stages and blocks, by name."""
    lists = ("stages", "blocks")
    parents = {name: name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_modules()}
    return {name: module for name, module in model.named_modules() if parents[name] in lists}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, _ConvNd))}


def check_hooks(model: nn.Module) -> None:
    """A hook on every layer, block and stage fires, takes a tensor, and changes no output."""
    x, seen = image(SIZE, batch=2), {}
    with torch.no_grad():
        wanted = model(x)
        watched = blocks_of(model) | layers_of(model)
        hooks = [
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
            for name, module in watched.items()
        ]
        found = model(x)
    for hook in hooks:
        hook.remove()
    assert set(watched) - set(seen) == set(), "these modules were never called"
    assert [name for name, out in seen.items() if not isinstance(out, torch.Tensor)] == []
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def check_maps_for_gradients(model: nn.Module) -> None:
    """The outputs of the last stage and of its last block are tensors with gradients of a class, as Grad-CAM needs."""
    kept, units = [], model.stages if hasattr(model, "stages") else model.blocks
    last = [units[-1], *([units[-1].blocks[-1]] if hasattr(units[-1], "blocks") else [])]
    hooks = [module.register_forward_hook(lambda _, __, out: kept.append(out)) for module in last]
    logits = model(image(SIZE))
    grads = torch.autograd.grad(logits[0, 0], kept)
    for hook in hooks:
        hook.remove()
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def check_alone(model: nn.Module) -> None:
    """A stage or block accepts a map alone, or refuses it and says that a state is missing."""
    x, units = image(SIZE), model.stages if hasattr(model, "stages") else model.blocks
    with torch.no_grad():
        wanted = model.forward_intermediates(x, indices=[0], output_fmt=model.output_fmt, intermediates_only=True)[0]
        x, state = model.begin(x)
        try:
            found = units[0](x)
        except InputError as error:
            if "call it as block(x, state) with model.begin(image)" not in str(error):
                raise
            found = units[0](x, state)
        torch.testing.assert_close(found if found.dim() == 4 else model.to_map(found, state), wanted)


def check_timms_hooks(model: nn.Module) -> None:
    """timm's extractor by hooks gives the same maps as the model's interface."""
    x, last = image(SIZE), len(model.feature_info) - 1
    found = FeatureHookNet(copy.deepcopy(model), out_indices=(0, last))(x)
    own = model.forward_intermediates(x, indices=[0, last], output_fmt=model.output_fmt, intermediates_only=True)
    for one, other in zip(found, own):
        if one.dim() == 4:
            torch.testing.assert_close(one, other)
        else:  # tokens of a plain backbone; there may be prefix tokens in front of the patches
            assert one.shape[0] == 1
            assert one.shape[2] == other.shape[-1]


def check_adapters(model: nn.Module) -> None:
    """LoRA trains on every layer that PEFT can merge, and a merged model gives the same outputs."""
    peft = pytest.importorskip("peft")
    names = [name for name, layer in layers_of(model).items() if getattr(layer, "groups", 1) == 1]
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=names)).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    x = image(ODD)
    out = adapted(x)
    out.square().sum().backward()
    learned = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(learned) == 2 * len(names)
    assert [name for name, p in learned.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    with torch.no_grad():
        assert not torch.allclose(model(x), out, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(adapted.merge_and_unload()(x), out.detach(), rtol=1e-3, atol=1e-4)


def check_dynamic_int8(model: nn.Module) -> None:
    """All linear layers run in int8, and outputs stay nearly the same."""
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    x = image(SIZE, batch=2)
    with torch.no_grad():
        wanted, found = model(x), quantized(x)
    assert (found - wanted).norm() < 0.3 * wanted.norm()
    assert not torch.equal(found, wanted)


def check_sharded(model: nn.Module) -> None:
    """A step with sharded parameters has the gradients of unsharded parameters, also with checkpointing."""
    pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")
    import terrazzo.openmmlab  # noqa: F401
    from terrazzo.openmmlab.sharded import FullyShardedModel

    x = image(SIZE, batch=2)
    for again in (False, True):
        model.set_grad_checkpointing(again)
        whole, parts = copy.deepcopy(model), copy.deepcopy(model)
        with alone():
            sharded = FullyShardedModel(parts, min_parameters=1)
            wanted, found = whole(x), sharded(x)
            torch.testing.assert_close(found, wanted)
            wanted.square().mean().backward()
            found.square().mean().backward()
            for (name, one), other in zip(whole.named_parameters(), parts.parameters()):
                torch.testing.assert_close(other.grad.full_tensor(), one.grad, msg=lambda text, n=name: f"{n}: {text}")
            torch.nn.utils.clip_grad_norm_(sharded.parameters(), 1.0)
            torch.optim.SGD(sharded.parameters(), 0.1).step()
            assert sharded(x).isfinite().all()
            assert not torch.equal(sharded(x), found)
    model.set_grad_checkpointing(False)


CHECKS = {
    "alone": check_alone,
    "timm's hooks": check_timms_hooks,
    "hooks": check_hooks,
    "maps for gradients": check_maps_for_gradients,
    "adapters": check_adapters,
    "dynamic int8": check_dynamic_int8,
    "sharded": check_sharded,
}
